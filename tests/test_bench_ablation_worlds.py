"""The tiny model's lessons: worlds that are true to themselves and to nothing else, and a tokenizer of words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mgrpo.bench.ablation_worlds import (
    DRILLS,
    GEOGRAPHY,
    UNSEEN,
    Worlds,
    exchanged,
    fold,
    names,
    read_card,
    world,
    write_tiny,
)
from mgrpo.engine.types import Answer, Call, Delegate, Episode, ToolCall, Turn

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


def test_what_the_scripts_do_in_a_world_is_right_there_and_the_answer_is_no_real_one(worlds: Any):
    tasks, same = worlds.tasks("train")[:: len(worlds.tasks("train")) // 100], 0
    for task in tasks:
        main = Call("main", task)
        episode = Episode(main)
        acted(worlds, main, episode)
        score = worlds.score(episode)
        assert score.correct == 1 and score.format and all(call.format and call.expert == 1 for call in score.calls)
        same += fold(main.answer or "") == fold(task.data["answer"])
    assert same < len(tasks) / 10  # lower-case words stay as they are


def test_each_episode_has_its_world_and_each_world_its_words(worlds: Any):
    first, second = worlds.tasks("train")[0], worlds.tasks("train")[len(worlds.tasks("train")) // COUNT]
    assert first.data == second.data and first.id != second.id
    assert worlds.prompt(Call("main", first)) != worlds.prompt(Call("main", second))
    there, back = world(worlds._names, first.id)
    assert sorted(there) == sorted(there.values()) == sorted(worlds._names)
    assert all(back[there[word]] == word for word in worlds._names)


def test_a_search_in_a_world_shows_training_records_in_its_words(worlds: Any, data: Path):
    records = json.loads((data / "gazetteer.json").read_text(encoding="utf-8"))
    train = {record["name"] for record in records if record["split"] == "train"}
    held_out = facts_of(record for record in records if record["split"] == "held_out")
    for task in worlds.tasks("train")[::50]:
        there, back = world(worlds._names, task.id)
        for asked in (task.data["hops"][0]["entity"], "Nai robi"):
            shown = worlds.tool(Call("sub", task), ToolCall("search", exchanged(asked, there)))
            found = facts_of({"name": name, "facts": facts} for name, facts in read_card(shown).items())
            assert len(found) >= 3 and {exchanged(name, back) for name, _, _ in found} <= train
            assert not found & held_out


def facts_of(records: Any) -> set[tuple[str, str, str]]:
    return {(r["name"], relation, value) for r in records for relation, value in r["facts"].items()}


def test_a_sub_agent_is_drilled_on_its_card_and_reports_what_it_was_asked_first(worlds: Any):
    for task in worlds.tasks("train")[:200]:
        hop = task.data["hops"][0]
        there = world(worlds._names, task.id)[0]
        call = Call("sub", task, f"{hop['relation']} of {exchanged(hop['entity'], there)}")
        reports = [text for text in acted(worlds, call, Episode(call)) if text.startswith("report: ")]
        card = read_card(call.turns[0].observation)
        asked = [call.request, *(turn.observation for turn in call.turns[1:-1])]
        for request, said in zip(asked, reports, strict=True):
            relation, name = request.removeprefix("Request: ").rstrip().split(" of ", 1)
            assert said == f"report: {card[name][relation]}\n"
        assert len(reports) == DRILLS + 1 and call.answer == exchanged(hop["value"], there) and len(set(asked)) > 1


def test_real_questions_have_no_drills(worlds: Any):
    task = worlds.tasks("held_out")[0]
    call = Call("sub", task, f"{task.data['hops'][0]['relation']} of {task.data['hops'][0]['entity']}")
    assert len(acted(worlds, call, Episode(call))) == 2 and call.answer == task.data["hops"][0]["value"]


def acted(environment: Any, call: Call, episode: Episode) -> list[str]:
    """What the script says in a call until it ends, with whatever it sets off."""
    said: list[str] = []
    while call.answer is None:
        said.append(environment.script(call))
        action = environment.parse(call, said[-1])
        call.turns.append(Turn(said[-1], action))
        if isinstance(action, Answer):
            call.answer = action.text
        else:
            results = [(use, used(environment, call, use, episode)) for use in action]
            call.turns[-1].observation = environment.observation(call, results)
    return said


def used(environment: Any, call: Call, use: ToolCall | Delegate, episode: Episode) -> str:
    if isinstance(use, ToolCall):
        return environment.tool(call, use)
    episode.calls.append(Call(use.agent, call.task, use.request))
    acted(environment, episode.calls[-1], episode)
    return episode.calls[-1].answer


def test_held_out_questions_are_the_real_ones(worlds: Any, data: Path):
    lines = (data / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [task.data for task in worlds.tasks("held_out")] == [json.loads(line) for line in lines]
    task = worlds.tasks("held_out")[0]
    assert worlds.prompt(Call("main", task)) == f"Question: {task.data['question']}\n"


def test_words_are_exchanged_whole_and_those_of_sentences_not():
    assert names('"What Bay of São Sao in Bayonne The sea"') == ("Bay", "Bayonne")
    assert exchanged("Bay of Bayonne, bay", {"Bay": "X", "Bayonne": "Bay"}) == "X of Bay, bay"


def test_every_name_can_be_said_in_tokens_and_understood_again(data: Path, tmp_path: Path):
    write_tiny(tmp_path / "tiny", data, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    for record in json.loads((data / "gazetteer.json").read_text(encoding="utf-8")):
        for name in (record["name"], *record["facts"].values()):
            ids = tokenizer.encode(name, add_special_tokens=False)
            assert tokenizer.unk_token_id not in ids and fold(tokenizer.decode(ids)) == fold(name)
    assert tokenizer.tokenize("report: Nairobi\nx") == ["report", ":", "Nairobi", "\n", UNSEEN]
