"""What the tiny model of `mgrpo bench ablation` learns before any run: to read cards and to copy, and no fact.

A world is the training half of the gazetteer and its questions with every name's words exchanged for others, drawn from
both halves. What holds in one world is false in the next, so that only looking it up helps; and every word, those of
held-out names too, is one that the model has copied. No held-out record is in any world, exchanged or not.

What takes long to learn is to find a field of a record on a card, and one report a card is little to learn it from: in
a world a sub-agent that has reported is asked for other facts of its card, and at last once more for the first.

Departs from the tokenizer of the example's own tiny model, whose names are fragments it cannot put together again when
it has not met them: here a word is a token. Between words its decoder puts a space, which `fold` does not mind.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mgrpo.engine.config import Config
from mgrpo.engine.environment import Split
from mgrpo.engine.model import load_tokenizer
from mgrpo.engine.policy import Policy
from mgrpo.engine.types import MAIN, Action, Answer, Call, Task, ToolCall
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
    """Geography whose training questions are those of so many worlds; the held-out ones are the real ones."""

    def __init__(self, data: str, worlds: int, **options: Any) -> None:
        super().__init__(data, **options)
        folder = Path(data)
        records, questions = (folder / "gazetteer.json").read_text(), (folder / "train.jsonl").read_text()
        train = [record for record in json.loads(records) if record["split"] == "train"]
        half = json.dumps(train, ensure_ascii=False)
        to, moved = names(records), names(half)
        self._worlds: list[Any] = []
        self._shuffled: list[Task] = []
        for number in range(worlds):
            drawn = random.Random(number).sample(to, len(moved))
            exchange = dict(zip(moved, drawn, strict=True))
            self._worlds.append(_module._book(json.loads(exchanged(half, exchange))))
            for line in exchanged(questions, exchange).splitlines():
                row = json.loads(line)
                self._shuffled.append(Task(f"{number}-{row['id']}", row | {"world": number}))

    def tasks(self, split: Split) -> Sequence[Task]:
        return self._shuffled if split == "train" else super().tasks(split)

    def parse(self, call: Call, text: str) -> Action:
        action = super().parse(call, text)
        goes_on = isinstance(action, Answer) and 0 < len(call.turns) <= DRILLS and self._drilled(call)
        return (ToolCall(DRILL, ""),) if goes_on else action

    def tool(self, call: Call, use: ToolCall) -> str:
        if use.name != DRILL:
            return super().tool(call, use)
        left = DRILLS + 1 - len(call.turns)
        card = read_card(call.turns[0].observation)
        facts = [f"{relation} of {name}" for name in card for relation in card[name]]
        return f"Request: {random.Random(f'{call.task.id} {left}').choice(facts) if left else call.request}"

    def script(self, call: Call) -> str:
        if len(call.turns) < 2 or not self._drilled(call):
            return super().script(call)
        request = call.turns[-1].observation.removeprefix("Request: ").rstrip("\n")
        return super().script(Call(call.agent, call.task, request, call.turns[:1]))

    def _drilled(self, call: Call) -> bool:
        """Sub-agents, in worlds, that have a card."""
        return call.agent != MAIN and "world" in call.task.data and bool(read_card(call.turns[0].observation))

    def _book(self, task: Task) -> Any:
        return self._worlds[task.data["world"]] if "world" in task.data else super()._book(task)


def names(text: str) -> list[str]:
    """The words of names that may be exchanged: with a capital, and of a spelling of their own, accents aside."""
    words = sorted({word for word in re.findall(r"\w+", text) if word[0].isupper()} - SENTENCE)
    spelt = Counter(fold(word) for word in words)
    return [word for word in words if spelt[fold(word)] == 1]


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
