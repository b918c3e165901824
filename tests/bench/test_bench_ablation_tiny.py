"""Test the ablation's tiny model: its held-out questions, and its tokenizer of words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mgrpo.bench.ablation.run import GEOGRAPHY
from mgrpo.bench.ablation.tiny import HELD_OUT, UNSEEN, facts, hold_out, write_questions, write_tiny
from mgrpo.engine.system.imports import load_name


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("geography")
    script = [sys.executable, str(GEOGRAPHY / "prepare.py"), "--out", str(folder), "--only", "tiny"]
    subprocess.run(script, check=True, capture_output=True)
    write_questions(folder / "questions", folder)
    return folder / "questions"


def question(number: int, entities: list[int]) -> dict[str, Any]:
    return {"id": str(number), "hops": [{"entity": str(entity), "relation": "capital"} for entity in entities]}


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), max_size=40), st.integers(0, 20))
def test_what_is_held_out_can_be_answered_from_what_is_not(entities, count):
    questions = [question(i, hops) for i, hops in enumerate(entities)]
    train, held_out = hold_out(questions, count)
    assert sorted((q["id"] for q in train + held_out), key=int) == [q["id"] for q in questions]
    assert len(held_out) <= count
    taught = {fact for q in train for fact in facts(q)}
    assert all(facts(q) <= taught for q in held_out)
    if len(held_out) < count:  # then no more can be held out
        common = [fact for q in train for fact in facts(q)]
        assert all(any(common.count(fact) == 1 for fact in facts(q)) for q in train)


def test_the_environment_takes_the_questions(data: Path):
    environment = load_name(f"{GEOGRAPHY / 'environment.py'}:Geography", "geography", "Class")(str(data))
    tasks = {split: environment.tasks(split) for split in ("train", "held_out")}
    assert len(tasks["held_out"]) == HELD_OUT and len(tasks["train"]) > 3 * HELD_OUT
    texts = {split: {task.data["question"] for task in each} for split, each in tasks.items()}
    assert not texts["train"] & texts["held_out"]
    # The environment searches the same data as in training.
    assert all(task.data["split"] == "train" for task in tasks["held_out"])


def test_every_name_can_be_said_in_tokens_and_understood_again(data: Path, tmp_path: Path):
    fold = load_name(f"{GEOGRAPHY / 'environment.py'}:fold", "geography", "function")
    write_tiny(tmp_path / "tiny", data, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    for record in json.loads((data / "gazetteer.json").read_text(encoding="utf-8")):
        for name in (record["name"], *record["facts"].values()):
            ids = tokenizer.encode(name, add_special_tokens=False)
            assert tokenizer.unk_token_id not in ids and fold(tokenizer.decode(ids)) == fold(name)
    assert tokenizer.tokenize("report: Nairobi\nx") == ["report", ":", "Nairobi", "\n", UNSEEN]
