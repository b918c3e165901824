"""Check the HotpotQA example: its files, tools, scores, demonstrations, and a whole run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgrpo import Answer, Call, Delegate, Episode, Malformed, Task, ToolCall, Turn, load_config
from mgrpo.engine.report.display import make_display
from mgrpo.engine.training import colocated
from toy import make_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "hotpotqa"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hotpotqa_example", EXAMPLE / "environment.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hotpotqa = load()


def official(number: int, **changes: Any) -> dict[str, Any]:
    """Return a question in the format of HotpotQA's own files."""
    context = [
        [f"Ada {number}", [f"Ada {number} was born in Rome.", " She painted."]],
        ["Rome", ["Rome is the capital of Italy."]],
    ]
    context += [[f"Distractor {i}", [f"Number {i} is of no use."]] for i in range(8)]
    facts = [[f"Ada {number}", 0], ["Rome", 0]]
    question = f"Of which country is the city where Ada {number} was born the capital?"
    row = {"_id": f"q{number}", "question": question, "answer": "Italy", "context": context, "supporting_facts": facts}
    return row | changes


def as_lines(row: dict[str, Any]) -> dict[str, Any]:
    docs = [{"title": title, "sentences": sentences} for title, sentences in row["context"]]
    titles = [title for title, _ in row["supporting_facts"]]
    asked = {key: row[key] for key in ("question", "answer")}
    return {"task_id": row["_id"], **asked, "docs": docs, "support_titles": titles}


def write(path: Path, rows: list[dict[str, Any]], lines: bool = False) -> str:
    path.write_text("\n".join(json.dumps(as_lines(row)) for row in rows) if lines else json.dumps(rows))
    return str(path)


@pytest.fixture
def environment(tmp_path: Path):
    return hotpotqa.HotpotQA(write(tmp_path / "train.json", [official(i) for i in range(20)]))


def task_of(environment: Any) -> Task:
    return environment.tasks("train")[0]


def played(environment: Any, call: Call) -> Call:
    """Play a call's demonstration to its end."""
    while call.answer is None:
        text = environment.script(call)
        action = environment.parse(call, text)
        assert not isinstance(action, Malformed), (text, action)
        turn = Turn(text, action)
        if isinstance(action, Answer):
            call.answer, call.ended = action.text, "answer"
        else:
            results = [(a, environment.tool(call, a) if isinstance(a, ToolCall) else "found") for a in action]
            turn.observation = environment.observation(call, results)
        call.turns.append(turn)
    return call


# ---- files


def test_both_forms_of_a_file_hold_the_same_questions(tmp_path: Path):
    rows = [official(i) for i in range(3)]
    ours, lines = (
        hotpotqa.read_questions(write(tmp_path / name, rows, lines))
        for name, lines in (("a.json", False), ("b.jsonl", True))
    )
    assert [row["paragraphs"] for row in ours] == [row["paragraphs"] for row in lines]
    assert ours[0]["support"] == {"Ada 0": ["Ada 0 was born in Rome."], "Rome": ["Rome is the capital of Italy."]}
    assert lines[0]["support"]["Ada 0"] == [
        "Ada 0 was born in Rome.",
        "She painted.",
    ]  # all: no sentence is named


def test_a_fact_that_is_not_in_the_paragraphs_is_passed_over(tmp_path: Path):
    row = official(0, supporting_facts=[["Rome", 0], ["Rome", 7], ["Nowhere", 0]])
    (question,) = hotpotqa.read_questions(write(tmp_path / "a.json", [row]))
    assert question["support"] == {"Rome": ["Rome is the capital of Italy."]}


def test_what_is_no_file_of_questions_is_refused_by_name(tmp_path: Path):
    with pytest.raises(ValueError, match=r"nothing\.json is no file"):
        hotpotqa.read_questions(tmp_path / "nothing.json")
    for text, said in (
        ("{", "no JSON"),
        ("[]", "is empty"),
        ('[{"context": []}]', "question 1: KeyError"),
        ("[3]", "question 1: TypeError"),
        ('{"docs": []}', "question 1: KeyError 'task_id'|question 1: KeyError 'support_titles'"),
    ):
        (tmp_path / "bad").write_text(text)
        with pytest.raises(ValueError, match=said):
            hotpotqa.read_questions(tmp_path / "bad")


def test_no_question_is_both_trained_on_and_held_out(tmp_path: Path):
    train = write(tmp_path / "train.json", [official(i) for i in range(40)])
    split = hotpotqa.HotpotQA(train)
    ids = {part: {task.id for task in split.tasks(part)} for part in ("train", "held_out")}
    assert not ids["train"] & ids["held_out"] and len(ids["train"] | ids["held_out"]) == 40
    assert 0 < len(ids["held_out"]) < 20
    other = write(tmp_path / "dev.json", [official(i) for i in range(100, 103)])
    assert len(hotpotqa.HotpotQA(train, other).tasks("train")) == 40
    with pytest.raises(ValueError, match=r"'q3' is in .*train\.json and in .*both\.json"):
        hotpotqa.HotpotQA(train, write(tmp_path / "both.json", [official(3)]))
    with pytest.raises(ValueError, match="evaluate_by: 'bleu', expected"):
        hotpotqa.HotpotQA(train, evaluate_by="bleu")


# ---- actions and tools


@pytest.mark.parametrize(
    ("agent", "text", "action"),
    [
        ("main", "ask: who sings; where born\n", (Delegate("sub", "who sings"), Delegate("sub", "where born"))),
        ("main", "Answer: The Cranberries\n", Answer("The Cranberries")),
        ("sub", "search: Ada: the painter\n", (ToolCall("search", "Ada: the painter"),)),
        ("sub", "read: Ada 1; Rome\n", (ToolCall("read", "Ada 1; Rome"),)),
        ("sub", "report: Rome\n", Answer("Rome")),
    ],
)
def test_what_a_line_means(environment: Any, agent: str, text: str, action: Any):
    assert environment.parse(Call(agent, task_of(environment)), text) == action


@pytest.mark.parametrize(
    ("agent", "text"),
    [
        ("main", "search: Rome"),
        ("sub", "ask: Rome"),
        ("main", "answer:"),
        ("main", "ask: a;;b"),
        ("main", "Rome"),
        ("main", "ask: a;b;c;d"),
    ],
)
def test_what_is_no_action(environment: Any, agent: str, text: str):
    assert isinstance(environment.parse(Call(agent, task_of(environment)), text), Malformed)


@given(st.text())
def test_any_text_is_an_action_or_malformed(text: str):
    task = Task("q", {"question": "?", "answer": "", "paragraphs": {}, "support": {}, "split": "train"})
    environment = hotpotqa.HotpotQA.__new__(hotpotqa.HotpotQA)
    for agent in ("main", "sub"):
        assert isinstance(environment.parse(Call(agent, task), text), Answer | Malformed | tuple)


def test_a_search_lists_the_nearest_paragraphs_and_a_read_shows_one(environment: Any):
    task = task_of(environment)
    call = Call("sub", task, "x")
    listed = environment.tool(call, ToolCall("search", "capital of Italy")).splitlines()
    assert listed[0] == "Rome: Rome is the capital of Italy." and len(listed) == 3
    assert environment.tool(call, ToolCall("read", "rome")) == "Rome is the capital of Italy."
    with pytest.raises(hotpotqa.ToolError, match="no paragraph"):
        environment.tool(call, ToolCall("read", "Atlantis"))
    assert len(environment.tool(call, ToolCall("search", "…")).splitlines()) == 3  # no title is similar: any three


@given(st.dictionaries(st.text(), st.lists(st.text(), max_size=3), min_size=1, max_size=6), st.text())
def test_a_search_lists_titles_of_the_question_whatever_is_asked(paragraphs: dict[str, list[str]], query: str):
    listed = hotpotqa.search(paragraphs, query)
    assert len(listed) == min(3, len(paragraphs)) and set(listed) <= paragraphs.keys()


# ---- scores


@pytest.mark.parametrize(
    ("answer", "truth", "em", "f1"),
    [
        ("The Cranberries!", "cranberries", 1, 1),
        ("Dolores O'Riordan", "Dolores Mary O'Riordan", 0, 0.8),
        ("yes", "yes", 1, 1),
        ("yes it is", "yes", 0, 0),
        ("no", "yes", 0, 0),
        ("", "Rome", 0, 0),
        ("Rome Rome", "Rome", 0, 2 / 3),
    ],
)
def test_answers_are_judged_as_the_official_evaluation_does(answer: str, truth: str, em: float, f1: float):
    assert hotpotqa.exact_match(answer, truth) == em
    assert hotpotqa.f1(answer, truth) == pytest.approx(f1)


def test_training_earns_f1_and_held_out_answers_must_match(tmp_path: Path):
    train = write(tmp_path / "train.json", [official(i, answer="Republic of Italy") for i in range(20)])
    for evaluate_by, expected in (("em", 0.0), ("f1", 0.5)):
        environment = hotpotqa.HotpotQA(train, evaluate_by=evaluate_by)
        for split, correct in (("train", 0.5), ("held_out", expected)):
            main = Call("main", environment.tasks(split)[0], answer="Italy", ended="answer")
            main.turns.append(Turn("answer: Italy\n", Answer("Italy")))
            score = environment.score(Episode(main))
            assert score.format and score.correct == correct


def test_the_expert_score_wants_a_supporting_paragraph_read_and_its_fact_reported(environment: Any):
    task = task_of(environment)
    number = task.id.removeprefix("q")

    def expert(*titles: str, report: str | None) -> float:
        uses = [Turn("", (ToolCall("read", title),)) for title in titles]
        return environment.expert(Call("sub", task, "x", uses, answer=report))

    assert expert("Rome", report="Rome is the capital of Italy.") == 1.0
    assert 0.5 < expert("rome", report="Italy's capital") < 1.0
    assert expert("Rome", report="nothing useful") == 0.5
    assert expert("Distractor 1", report="Rome is the capital of Italy.") == 0.0  # it was not read
    assert expert(report=f"Ada {number} was born in Rome.") == 0.0
    assert expert("Rome", report=None) == 0.0


# ---- demonstrations


def test_demonstrations_end_well_formed_and_right(environment: Any):
    for task in environment.tasks("train"):
        main = played(environment, Call("main", task))
        requests = [a.request for turn in main.turns if isinstance(turn.action, tuple) for a in turn.action]
        calls = [played(environment, Call("sub", task, request)) for request in requests]
        score = environment.score(Episode(main, calls))
        assert score.format and score.correct == 1.0
        assert [call.expert for call in score.calls] == [1.0, 1.0]


def test_demonstrations_survive_any_request(environment: Any):
    for request in ("", ";", "Distractor 3", "\n"):
        assert played(environment, Call("sub", task_of(environment), request)).answer


def test_the_example_trains(tmp_path: Path):
    """Run the example's file with a tiny model and few steps."""
    model = make_model(tmp_path / "model", max_position_embeddings=2048)
    train = write(tmp_path / "train.json", [official(i) for i in range(20)])
    changes = ["steps=2", "queries_per_step=2", "algorithm.rollouts=2", "warmup.steps=1", "warmup.episodes=2"]
    changes += ["eval.questions=2", "compute.dtype=float32", "compute.device=cpu", "agents.main.max_context=600"]
    changes += [f"agents.{name}.model={model}" for name in ("main", "sub")]
    changes += [f"run_dir={tmp_path}/run", f"environment.options.train={train}", 'environment.options.held_out=""']
    file = EXAMPLE / "train.toml"
    colocated.train(load_config(file, changes), resume=False, display=make_display(["main", "sub"]))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["stage"] == "rl" and "time/step" in row] == [0, 1]
