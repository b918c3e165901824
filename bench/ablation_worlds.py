"""What the tiny model of `mgrpo bench ablation` learns before any run: to read cards and to copy, and no fact.

A world is the training half of the gazetteer with the words of all names, held-out ones too, exchanged at random. Every
episode of a lesson is in a world of its own: what holds in one is false in the next, so that only looking it up helps,
and every word is one that the model has copied. With few worlds it learns them by heart. No held-out record is in any,
exchanged or not.

What takes long to learn is to find a field of a record on a card, and one report a card is little to learn it from: in
a world a sub-agent that has reported is asked for other facts of its card, and at last once more for the first.

Departs from the tokenizer of the example's own tiny model, whose names are fragments it cannot put together again when
it has not met them: here a word is a token. Between words its decoder puts a space, which `fold` does not mind.
"""

from __future__ import annotations

import random
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mgrpo.engine.config import Config
from mgrpo.engine.environment import Split
from mgrpo.engine.model import load_tokenizer
from mgrpo.engine.policy import Policy
from mgrpo.engine.types import MAIN, Action, Answer, Call, Episode, Score, Task, ToolCall, Turn
from mgrpo.engine.usercode import load_name

GEOGRAPHY = Path(__file__).resolve().parents[1] / "examples" / "geography"
DRILL, DRILLS = "drill", 8  # questions after the first report
EOS, UNSEEN = "<eos>", "<unk>"
PROTOCOL = "Question: Request: ask: search: reply: report: answer: error: unknown nothing found gave no ; sub"
SENTENCE = {"What", "Which", "On", "In", "The"}  # capitals that are not a name's
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "initializer_range": 0.1,
} | {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}

_example: Any = load_name(f"{GEOGRAPHY / 'environment.py'}:Geography", "geography", "Class")
_module: Any = sys.modules[_example.__module__]
fold, read_card = _module.fold, _module.read_card


class Worlds(_example):
    """Geography whose training questions are asked in worlds, each so many times; the held-out ones are the real ones.

    The example works in the real world, and all that agents read and write is exchanged on its way.
    """

    def __init__(self, data: str, worlds: int, **options: Any) -> None:
        super().__init__(data, **options)
        self._names = names((Path(data) / "gazetteer.json").read_text(encoding="utf-8"))
        real = super().tasks("train")
        self._asked = [Task(f"{number}-{task.id}", task.data) for number in range(worlds) for task in real]

    def tasks(self, split: Split) -> Sequence[Task]:
        return self._asked if split == "train" else super().tasks(split)

    def prompt(self, call: Call) -> str:
        return exchanged(super().prompt(self._real(call)), self._there(call.task))

    def parse(self, call: Call, text: str) -> Action:
        action = super().parse(call, text)
        goes_on = isinstance(action, Answer) and 0 < len(call.turns) <= DRILLS and drilled(call)
        return (ToolCall(DRILL, ""),) if goes_on else action

    def tool(self, call: Call, use: ToolCall) -> str:
        if use.name == DRILL:
            return drill(call)
        real = ToolCall(use.name, exchanged(use.argument, self._back(call.task)))
        return exchanged(super().tool(call, real), self._there(call.task))

    def score(self, episode: Episode) -> Score:
        return super().score(Episode(self._real(episode.main), [self._real(call) for call in episode.calls]))

    def script(self, call: Call) -> str:
        if len(call.turns) > 1 and drilled(call):
            request = call.turns[-1].observation.removeprefix("Request: ").rstrip("\n")
            call = Call(call.agent, call.task, request, call.turns[:1])
        return exchanged(super().script(self._real(call)), self._there(call.task))

    def _real(self, call: Call) -> Call:
        """The call as it would be in the real world."""
        back = self._back(call.task)
        real = Call(call.agent, call.task, exchanged(call.request, back), ended=call.ended)
        real.answer = None if call.answer is None else exchanged(call.answer, back)
        for turn in call.turns:
            text = exchanged(turn.text, back)
            real.turns.append(Turn(text, super().parse(real, text), exchanged(turn.observation, back), turn.truncated))
        return real

    def _there(self, task: Task) -> Mapping[str, str]:
        """What stands for each word in the task's world."""
        return world(self._names, task.id)[0] if task.data["split"] == "train" else {}

    def _back(self, task: Task) -> Mapping[str, str]:
        return world(self._names, task.id)[1] if task.data["split"] == "train" else {}


@lru_cache(maxsize=1024)
def world(words: tuple[str, ...], seed: str) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """A random exchange of the words for each other, and its inverse."""
    there = dict(zip(words, random.Random(seed).sample(words, len(words)), strict=True))
    return there, {word: real for real, word in there.items()}


def drilled(call: Call) -> bool:
    """Sub-agents, in worlds, that have a card."""
    return call.agent != MAIN and call.task.data["split"] == "train" and bool(read_card(call.turns[0].observation))


def drill(call: Call) -> str:
    """The next question about the card; the last is the first again."""
    left = DRILLS + 1 - len(call.turns)
    card = read_card(call.turns[0].observation)
    facts = [f"{relation} of {name}" for name in card for relation in card[name]]
    return f"Request: {random.Random(f'{call.task.id} {left}').choice(facts) if left else call.request}"


def names(text: str) -> tuple[str, ...]:
    """The words of names that may be exchanged: with a capital, and of a spelling of their own, accents aside."""
    words = sorted({word for word in re.findall(r"\w+", text) if word[0].isupper()} - SENTENCE)
    spelt = Counter(fold(word) for word in words)
    return tuple(word for word in words if spelt[fold(word)] == 1)


def exchanged(text: str, exchange: Mapping[str, str]) -> str:
    return re.sub(r"\w+", lambda found: exchange.get(found[0], found[0]), text)


def write_tiny(folder: Path, data: Path, seed: int) -> None:
    """A Llama of random weights with a token for each word of the data."""
    texts = [(data / name).read_text(encoding="utf-8") for name in ("train.jsonl", "held_out.jsonl", "gazetteer.json")]
    found = {token for text in [PROTOCOL, *texts] for token in re.findall(r"\w+|[^\w\s]", text)}
    words = sorted(token for token in found if not token.isdigit())  # of ids
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate([EOS, UNSEEN, "\n", *words])}, unk_token=UNSEEN)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(" +"), "removed"), pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), "isolated")]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, unk_token=UNSEEN, clean_up_tokenization_spaces=False
    )
    eos: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(fast), tie_word_embeddings=True, **SHAPE, **eos))
        likeness(model)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


@torch.no_grad()
def likeness(model: LlamaForCausalLM) -> None:
    """Begin with heads that look for what is like themselves and copy it (after Trockman and Kolter, arXiv 2305.09828).

    Queries equal keys, and a layer's heads together put out what they read: names are copied after far fewer steps.
    """
    for layer in model.model.layers:
        heads = layer.self_attn
        torch.nn.init.orthogonal_(heads.q_proj.weight)
        heads.k_proj.weight.copy_(heads.q_proj.weight)
        torch.nn.init.orthogonal_(heads.v_proj.weight)
        heads.o_proj.weight.copy_(heads.v_proj.weight.T)


def export(config: Config, agent: str, state: Path, folder: Path) -> None:
    """The weights of an agent's checkpoint as a directory that a run can begin with, whole or not at all."""
    policy = Policy(agent, config.agents[agent], config.compute)
    policy.load_state(state)
    aside = folder.with_name(f".{folder.name}")
    policy.model.save_pretrained(aside)
    load_tokenizer(agent, config.agents[agent]).save_pretrained(aside)
    aside.rename(folder)
