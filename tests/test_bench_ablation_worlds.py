"""The tiny model's lessons: worlds that are true to themselves and to nothing else, and a tokenizer of words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mgrpo.bench.ablation_worlds import DRILLS, GEOGRAPHY, UNSEEN, Worlds, exchanged, fold, names, read_card, write_tiny
from mgrpo.engine.types import Answer, Call, Turn

COUNT = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worlds")
    script = [sys.executable, str(GEOGRAPHY / "prepare.py"), "--out", str(folder), "--only", "tiny"]
    subprocess.run(script, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def worlds(data: Path) -> Any:
    return Worlds(str(data), COUNT)


def test_what_a_question_asks_its_world_answers(worlds: Any):
    tasks = worlds.tasks("train")
    for task in tasks[:: len(tasks) // 500]:
        for hop in task.data["hops"]:
            facts = worlds._book(task).by_name[fold(hop["entity"])].facts
            assert facts[hop["relation"]] == hop["value"]
        assert all(fold(hop["value"]) for hop in task.data["hops"])


def test_no_held_out_fact_is_true_in_any_world_and_hardly_a_training_one(worlds: Any, data: Path):
    records = json.loads((data / "gazetteer.json").read_text(encoding="utf-8"))
    facts = {split: facts_of(r for r in records if r["split"] == split) for split in ("train", "held_out")}
    for number in range(COUNT):
        book = worlds._worlds[number]
        found = facts_of({"name": r.name, "facts": r.facts} for r in book.records)
        assert len(book.records) == sum(r["split"] == "train" for r in records)
        assert not found & facts["held_out"] and len(found & facts["train"]) < 0.1 * len(found)


def facts_of(records: Any) -> set[tuple[str, str, str]]:
    return {(r["name"], relation, value) for r in records for relation, value in r["facts"].items()}


def test_a_sub_agent_is_drilled_on_its_card_and_reports_what_it_was_asked_first(worlds: Any):
    for task in worlds.tasks("train")[:200]:
        hop = task.data["hops"][0]
        call = Call("sub", task, f"{hop['relation']} of {hop['entity']}")
        reports = [text for text in acted(worlds, call) if text.startswith("report: ")]
        card = read_card(call.turns[0].observation)
        asked = [call.request, *(turn.observation for turn in call.turns[1:-1])]
        for request, said in zip(asked, reports, strict=True):
            relation, name = request.removeprefix("Request: ").rstrip().split(" of ", 1)
            assert said == f"report: {card[name][relation]}\n"
        assert len(reports) == DRILLS + 1 and call.answer == hop["value"] and len(set(asked)) > 1


def test_real_questions_have_no_drills(worlds: Any):
    task = worlds.tasks("held_out")[0]
    call = Call("sub", task, f"{task.data['hops'][0]['relation']} of {task.data['hops'][0]['entity']}")
    assert len(acted(worlds, call)) == 2 and call.answer == task.data["hops"][0]["value"]


def acted(environment: Any, call: Call) -> list[str]:
    """What the script says in a call until it ends, each with what it was shown in return."""
    said: list[str] = []
    while call.answer is None:
        said.append(environment.script(call))
        action = environment.parse(call, said[-1])
        call.turns.append(Turn(said[-1], action))
        if isinstance(action, Answer):
            call.answer = action.text
        else:
            results = [(use, environment.tool(call, use)) for use in action]
            call.turns[-1].observation = environment.observation(call, results)
    return said


def test_held_out_questions_are_the_real_ones(worlds: Any, data: Path):
    lines = (data / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [task.data for task in worlds.tasks("held_out")] == [json.loads(line) for line in lines]
    assert worlds._book(worlds.tasks("held_out")[0]) is worlds._books["held_out"]


def test_words_are_exchanged_whole_and_those_of_sentences_not():
    assert names('"What Bay of São Sao in Bayonne The sea"') == ["Bay", "Bayonne"]
    assert exchanged("Bay of Bayonne, bay", {"Bay": "X", "Bayonne": "Bay"}) == "X of Bay, bay"


def test_every_name_can_be_said_in_tokens_and_understood_again(data: Path, tmp_path: Path):
    write_tiny(tmp_path / "tiny", data, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    for record in json.loads((data / "gazetteer.json").read_text(encoding="utf-8")):
        for name in (record["name"], *record["facts"].values()):
            ids = tokenizer.encode(name, add_special_tokens=False)
            assert tokenizer.unk_token_id not in ids and fold(tokenizer.decode(ids)) == fold(name)
    assert tokenizer.tokenize("report: Nairobi\nx") == ["report", ":", "Nairobi", "\n", UNSEEN]
