"""Make the ablation's tiny model and its questions: geography at a size that trains in minutes.

In that time a model of half a million weights learns to copy names and to plan hops, but not to find a record on a card
that it has never seen: it memorises the facts. So questions are held out, not countries as in the example: each fact
that a held-out question needs is part of some training question, but no training question equals a held-out one.
Everything else is the example's own: environment, search, rewards.

Unlike in the example's own tiny model, where names are split into fragments, a token is a word here. The decoder puts a
space between words, which `fold` ignores.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mgrpo.engine.config.schema import Config
from mgrpo.engine.model.causal_lm import load_tokenizer
from mgrpo.engine.policy.policy import Policy

HELD_OUT = 480  # questions
EOS, UNSEEN = "<eos>", "<unk>"
PROTOCOL = "Question: Request: ask: search: reply: report: answer: error: unknown nothing found gave no ; sub"
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}
Question = dict[str, Any]  # a line of the example's .jsonl files


def write_questions(out: Path, example: Path) -> None:
    """Write the example's training questions, some of them held out, into a folder; the gazetteer is written last."""
    out.mkdir(parents=True, exist_ok=True)
    lines = (example / "train.jsonl").read_text(encoding="utf-8").splitlines()
    for name, chosen in zip(("train", "held_out"), hold_out([json.loads(line) for line in lines]), strict=True):
        text = "".join(json.dumps(question, ensure_ascii=False) + "\n" for question in chosen)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
    shutil.copy(example / "gazetteer.json", out / "gazetteer.json")


def hold_out(questions: Sequence[Question], count: int = HELD_OUT) -> tuple[list[Question], list[Question]]:
    """Split off `count` held-out questions, so that the rest ask for every fact that these need; seeded."""
    asked = Counter(fact for question in questions for fact in facts(question))
    train: list[Question] = []
    held_out: list[Question] = []
    for question in random.Random(0).sample(questions, len(questions)):
        spare = len(held_out) < count and all(asked[fact] > 1 for fact in facts(question))
        (held_out if spare else train).append(question)
        asked.subtract(facts(question) if spare else ())
    return train, held_out


def facts(question: Question) -> set[tuple[str, str]]:
    """Return the facts that a question needs."""
    return {(hop["entity"], hop["relation"]) for hop in question["hops"]}


def write_tiny(folder: Path, data: Path, seed: int) -> None:
    """Save a Llama of random weights, with a token for each word of the data."""
    texts = [(data / name).read_text(encoding="utf-8") for name in ("train.jsonl", "held_out.jsonl", "gazetteer.json")]
    found = {token for text in [PROTOCOL, *texts] for token in re.findall(r"\w+|[^\w\s]", text)}
    words = sorted(token for token in found if not token.isdigit())  # digits occur in ids
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
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


def export(config: Config, agent: str, state: Path, folder: Path) -> None:
    """Save the weights of an agent's checkpoint as a model directory, which appears only when it is complete."""
    policy = Policy(agent, config.agents[agent], config.compute)
    policy.load_state(state)
    aside = folder.with_name(f".{folder.name}")
    policy.model.save_pretrained(aside)
    load_tokenizer(agent, config.agents[agent]).save_pretrained(aside)
    aside.rename(folder)
