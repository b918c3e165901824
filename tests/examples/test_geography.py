"""Check the geography example: its data, its oracle, its judge and its robustness against hostile texts."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import random
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo import MAIN, Answer, Call, Delegate, Episode, Malformed, Task, ToolCall, ToolError, Turn

FOLDER = Path(__file__).parents[2] / "examples" / "geography"
SPLITS = ("train", "held_out")
ODD = "|\n|:|ask|ask:|ask: ;|ask: a;;b|ask: a;b;c;d;e|answer:\n|search: \u2028|report: \x85 x|ask: \ud800|ANSWER :x"
HOSTILE = st.text(max_size=80) | st.sampled_from([*ODD.split("|"), "search: " + "of " * 4000])


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"geography_{name}", FOLDER / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module here
    spec.loader.exec_module(module)
    return module


geography = load("environment")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("geography")
    subprocess.run(command(out), check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def env(data: Path) -> Any:
    return geography.Geography(str(data))


def command(out: Path) -> list[str]:
    return [sys.executable, str(FOLDER / "prepare.py"), "--out", str(out), "--only", "tiny"]


def rows(data: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def records(data: Path, split: str) -> list[dict[str, Any]]:
    return [r for r in json.loads((data / "gazetteer.json").read_text(encoding="utf-8")) if r["split"] == split]


def act(env: Any, call: Call, text: str, episode: Episode) -> None:
    """Play one turn of a call, with the tools and sub-agent calls that it starts."""
    action = env.parse(call, text)
    call.turns.append(Turn(text, action))
    if isinstance(action, Malformed):
        call.ended = "malformed"
    elif isinstance(action, Answer):
        call.ended, call.answer = "answer", action.text
    else:
        results = [(use, result(env, call, use, episode)) for use in action]
        call.turns[-1].observation = env.observation(call, results)


def result(env: Any, call: Call, use: ToolCall | Delegate, episode: Episode) -> str:
    if isinstance(use, Delegate):
        sub = Call(use.agent, call.task, use.request)
        episode.calls.append(sub)
        return demonstrate(env, sub, episode).answer or ""
    try:
        return str(env.tool(call, use))
    except ToolError as error:
        return str(error)


def demonstrate(env: Any, call: Call, episode: Episode) -> Call:
    while not call.ended and len(call.turns) < 5:
        text = env.script(call)
        assert text.endswith("\n") and text.count("\n") == 1
        act(env, call, text, episode)
    return call


def oracle(env: Any, task: Task) -> Episode:
    episode = Episode(Call(MAIN, task))
    demonstrate(env, episode.main, episode)
    return episode


def some_tasks(env: Any, count: int) -> list[Task]:
    return [task for split in SPLITS for task in random.Random(0).sample(env.tasks(split), count // 2)]


# --- the data


def test_counts_ids_and_hops(data: Path) -> None:
    train, held_out = (rows(data, split) for split in SPLITS)
    assert len(train) + len(held_out) >= 2000 and len(held_out) >= 400
    assert (
        len({q["question"] for q in train + held_out})
        == len(train + held_out)
        == len({q["id"] for q in train + held_out})
    )
    for questions in (train, held_out):
        hops = Counter(len(q["hops"]) for q in questions)
        assert set(hops) == {1, 2, 3} and min(hops.values()) >= 0.2 * len(questions)
        assert any(q["hops"][1]["entity"] != q["hops"][0]["value"] for q in questions if len(q["hops"]) == 2)  # pairs
    assert len({q["answer"] for q in held_out}) >= 100 and max(Counter(q["answer"] for q in held_out).values()) < 40


def test_every_hop_is_a_fact_and_leads_to_the_answer(data: Path) -> None:
    facts = {(r["name"], k): v for split in SPLITS for r in records(data, split) for k, v in r["facts"].items()}
    for q in rows(data, "train") + rows(data, "held_out"):
        hops = q["hops"]
        assert all(facts[h["entity"], h["relation"]] == h["value"] for h in hops)
        assert hops[0]["entity"] in q["question"]
        assert f" {geography.fold(q['answer'])} " not in f" {geography.fold(q['question'])} "
        linked = all(b["entity"] == a["value"] for a, b in pairwise(hops))
        assert linked or all(h["entity"] in q["question"] for h in hops)
        assert q["answer"] == (hops[-1]["value"] if linked else " and ".join(h["value"] for h in hops))


def test_places_have_one_meaning(data: Path) -> None:
    names = [geography.fold(r["name"]) for split in SPLITS for r in records(data, split)]
    assert len(names) == len(set(names)) and all(names)


def mentions(texts: list[str], mine: set[str], others: set[str]) -> set[str]:
    """Return which names of `others` occur in texts as whole words, unless a longer name of `mine` contains them."""
    found = set()
    for text in texts:
        words, at = geography.fold(text).split(), 0
        while at < len(words):
            spans = (" ".join(words[at : at + n]) for n in range(8, 0, -1))
            name = next((span for span in spans if span in mine or span in others), None)
            found |= {name} & others if name else set()
            at += len(name.split()) if name else 1
    return found


@pytest.mark.parametrize(("split", "other"), [SPLITS, SPLITS[::-1]])
def test_held_out_means_held_out(data: Path, env: Any, split: str, other: str) -> None:
    """Check that a split names no place of the other: in questions, answers, hops and, in training, on cards."""
    mine, others = (
        {geography.fold(n) for r in records(data, s) for n in (r["name"], r["facts"].get("capital", "")) if n}
        for s in (split, other)
    )
    assert not mine & others
    for q in rows(data, split):
        texts = [q["question"], q["answer"], *(text for h in q["hops"] for text in (h["entity"], h["value"]))]
        assert not mentions(texts, mine, others), q
        assert not {geography.fold(text) for text in texts} & others
    if split == "train":
        call = Call("sub", env.tasks("train")[0])
        for record in records(data, other):
            shown = geography.read_card(result(env, call, ToolCall("search", record["name"]), Episode(call)))
            values = {geography.fold(text) for name in shown for text in (name, *shown[name].values())}
            assert not values & others


def test_preparing_again_changes_nothing_and_the_tiny_model_is_whole(data: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    subprocess.run(command(data), check=True, capture_output=True)
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before
    assert sorted(os.listdir(data)) == ["gazetteer.json", "held_out.jsonl", "tiny", "train.jsonl"]
    tokenizer = AutoTokenizer.from_pretrained(data / "tiny")
    model = AutoModelForCausalLM.from_pretrained(data / "tiny")
    assert model.config.eos_token_id == tokenizer.eos_token_id and model.config.vocab_size == len(tokenizer) == 1024
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert len(tokenizer.encode("\n")) == 1  # the stop string
    texts = [
        text for q in rows(data, "held_out") for text in (f"Question: {q['question']}\n", f"answer: {q['answer']}\n")
    ]
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in [*texts, "ask: Ærø ; 東京 , x .\n"])


# --- the oracle


@pytest.mark.parametrize("arm", ["co-train", "main-only", "single"])
def test_oracle_answers(data: Path, arm: str) -> None:
    env = geography.Geography(str(data), arm)
    for task in some_tasks(env, 200):
        episode = oracle(env, task)
        score = env.score(episode)
        assert score.format and score.correct == 1.0, (task, episode.main.turns)
        assert len(episode.calls) == (0 if arm == "single" else len(task.data["hops"])) == len(score.calls)
        assert all(each.format and each.expert == 1.0 for each in score.calls)


def test_hops_side_by_side_are_asked_in_one_line(env: Any) -> None:
    task = next(t for t in env.tasks("train") if "in that order" in t.data["question"])
    first, second = task.data["hops"]
    episode = oracle(env, task)
    assert len(episode.main.turns) == 2 and len(episode.calls) == 2
    assert episode.main.turns[0].observation == f"reply: {first['value']}\nreply: {second['value']}\n"


def test_the_right_record_stands_anywhere_on_the_card(env: Any) -> None:
    places: Counter[int] = Counter()
    for task in some_tasks(env, 200):
        for call in oracle(env, task).calls:
            lines = call.turns[0].observation.splitlines()
            assert len(lines) == 3 == len(set(lines))
            name = call.turns[0].text.removeprefix("search: ").strip()
            places[[line.startswith(f"{name}: ") for line in lines].index(True)] += 1
    assert min(places[i] for i in range(3)) > 0.15 * places.total()


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("arm", ["co-train", "single"])
def test_carelessness_spoils_its_share_of_the_calls(data: Path, arm: str, share: float) -> None:
    env, clean = geography.Geography(str(data), arm, share), geography.Geography(str(data), arm)
    spoilt, calls = Counter[str](), Counter[str]()
    for task in env.tasks("train")[:600]:
        episode = oracle(env, task)
        assert [t.text for t in oracle(env, task).main.turns] == [t.text for t in episode.main.turns]
        for call in (episode.main, *episode.calls):
            truth = demonstrate(clean, dataclasses.replace(call, turns=list(call.turns[:-1]), ended=""), Episode(call))
            calls[call.agent] += 1
            spoilt[call.agent] += truth.turns[len(call.turns) - 1].text != call.turns[-1].text
        score = env.score(episode)
        assert score.format and all(each.format for each in score.calls)
        expected = [(0.0,) if call.answer == "unknown" else (0.5, 1.0) for call in episode.calls]
        assert all(each.expert in allowed for each, allowed in zip(score.calls, expected, strict=True))
    for agent in calls:
        assert spoilt[agent] / calls[agent] == pytest.approx(share, abs=0.05), agent


# --- the judge


def sub_call(env: Any, request: str, query: str, report: str | None) -> Call:
    call = Call("sub", env.tasks("held_out")[0], request)
    act(env, call, f"search: {query}\n", Episode(call))
    if report is not None:
        act(env, call, f"report: {report}\n", Episode(call))
    return call


@pytest.mark.parametrize(
    ("request_text", "query", "report", "expected"),
    [
        ("currency of Kenya", "Kenya", "Shilling", 1.0),
        ("Which CURRENCY has  kenya ?", "Kenya", " the shilling. ", 1.0),
        ("capital of Democratic Republic of the Congo", "Republic of Congo", "Kinshasa", 1.0),
        ("capital of Republic of the Congo", "Republic of the Congo", "Brazzaville", 1.0),
        ("capital of Chad", "Chad", "N’Djaména", 1.0),
        ("country of Nairobi", "Nairobi", "Kenya", 1.0),
        ("currency of Kenya", "Kenya", "Nairobi", 0.5),  # supported but wrong: another field
        ("capital of Republic of the Congo", "Republic of the Congo", "Kinshasa", 0.5),  # another record
        ("tell me something", "Kenya", "Shilling", 0.5),  # a request without a right report
        ("Kenya", "Kenya", "Shilling", 0.5),
        ("currency of Nairobi", "Kenya", "Shilling", 0.5),  # a city has no currency
        ("currency of Kenya", "Peru", "Shilling", 0.0),  # right but unsupported
        ("currency of Kenya", "Kenya", "Nairobi Shilling Africa", 0.0),  # the whole card
        ("currency of Kenya", "Kenya", "capital Nairobi, currency Shilling", 0.0),
        ("currency of Kenya", "Kenya", "?!", 0.0),
        ("currency of Kenya", "Kenya", None, 0.0),
        ("currency of Kenya", "Kenya: capital Wonderland, currency X", "Wonderland", 0.0),  # its own words
        ("currency of Kenya", "七七", "nothing found", 0.0),  # a tool's refusal is no finding
    ],
)
def test_expert_score(env: Any, request_text: str, query: str, report: str | None, expected: float) -> None:
    call = sub_call(env, request_text, query, report)
    assert env.expert(call) == expected
    score = env.score(Episode(Call(MAIN, call.task), [call])).calls[0]
    assert score.expert == expected and score.format == (report is not None)


def test_a_training_task_knows_no_held_out_fact(env: Any) -> None:
    call = sub_call(env, "capital of Peru", "Peru", "Lima")
    assert env.expert(call) == 1.0
    assert env.expert(dataclasses.replace(call, task=env.tasks("train")[0])) == 0.5


@pytest.mark.parametrize(
    ("text", "correct"), [("{}", 1.0), ("  THE {}!", 1.0), ("{} {}", 0.0), ("", 0.0), ("not {}", 0.0), ("...", 0.0)]
)
def test_correctness_is_folded_equality(env: Any, text: str, correct: float) -> None:
    for task in some_tasks(env, 20):
        call = Call(MAIN, task, answer=text.format(*[task.data["answer"]] * 2), ended="answer")
        assert env.score(Episode(call)).correct == correct


def test_format_needs_an_answer_and_no_malformed_turn(env: Any) -> None:
    task = env.tasks("train")[0]
    episode = oracle(env, task)
    assert env.score(episode).format
    for turns in ([], episode.main.turns[:-1], [Turn("?", Malformed("?")), *episode.main.turns]):
        assert not env.score(Episode(dataclasses.replace(episode.main, turns=turns))).format


# --- reading and hostile texts


@pytest.mark.parametrize(
    ("agent", "arm", "text", "action"),
    [
        (MAIN, "co-train", "ask: capital of Peru\n", (Delegate("sub", "capital of Peru"),)),
        (MAIN, "co-train", "  Ask : a of b;c  ", (Delegate("sub", "a of b"), Delegate("sub", "c"))),  # cut: no newline
        (MAIN, "co-train", "answer: São Tomé: the city\n", Answer("São Tomé: the city")),
        ("sub", "co-train", "search: N'Djamena\n", (ToolCall("search", "N'Djamena"),)),
        ("sub", "main-only", "report: x ; y\n", Answer("x ; y")),
        (MAIN, "single", "search: a ; b\n", (ToolCall("search", "a"), ToolCall("search", "b"))),
    ],
)
def test_parse(data: Path, agent: str, arm: str, text: str, action: Any) -> None:
    env = geography.Geography(str(data), arm)
    assert env.parse(Call(agent, env.tasks("train")[0]), text) == action


@pytest.mark.parametrize(
    ("agent", "arm", "text"),
    [(MAIN, "co-train", text) for text in ("search: x", "report: x", "x", "", "ask x", "ask:", "ask: a;;b", "ask: a;")]
    + [(MAIN, "co-train", "ask: a;b;c;d;e"), (MAIN, "co-train", "answer: a\nb"), (MAIN, "single", "ask: x")]
    + [("sub", "co-train", text) for text in ("ask: x", "answer: x", "report:  \n", "so search: x")],
)
def test_malformed(data: Path, agent: str, arm: str, text: str) -> None:
    env = geography.Geography(str(data), arm)
    assert isinstance(env.parse(Call(agent, env.tasks("train")[0]), text), Malformed)


@settings(max_examples=150)
@given(agent=st.sampled_from([MAIN, "sub"]), prefix=st.sampled_from(["", "ask: ", "search: "]), text=HOSTILE)
def test_hostile_texts_break_nothing(env: Any, agent: str, prefix: str, text: str) -> None:
    task = env.tasks("held_out")[0]
    call = Call(agent, task, request=text)
    episode = Episode(call if agent == MAIN else Call(MAIN, task))
    act(env, call, prefix + text, episode)
    if agent != MAIN:
        demonstrate(env, call, episode)  # the oracle of the sub-agent must handle any request
        episode.calls.append(call)
    score = env.score(episode)
    assert len(score.calls) == len(episode.calls) and all(0.0 <= each.expert <= 1.0 for each in score.calls)
    assert call.turns[0].observation == "" or call.turns[0].observation.endswith("\n")
    assert env.prompt(call).endswith("\n")


@settings(max_examples=100)
@given(st.text(max_size=200))
def test_search_finds_three_records_of_a_kind_or_refuses(env: Any, query: str) -> None:
    call = Call("sub", env.tasks("held_out")[0])
    try:
        card = geography.read_card(env.tool(call, ToolCall("search", query)))
    except ToolError:
        return
    assert len(card) == 3 and len({"country" in facts for facts in card.values()}) == 1


def test_a_misspelt_name_is_found(env: Any) -> None:
    call = Call("sub", env.tasks("held_out")[0])
    for query, name in [("Zimbabwee", "Zimbabwe"), ("currency of Tanzania", "Tanzania"), ("Sao Paolo", "São Paulo")]:
        assert name in geography.read_card(env.tool(call, ToolCall("search", query)))
    with pytest.raises(ToolError, match="no tool named 'browse'"):
        env.tool(call, ToolCall("browse", "Peru"))


def test_a_users_mistakes_are_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data: .*prepare\.py"):
        geography.Geography(str(tmp_path))
    with pytest.raises(ValueError, match="arm: 'both'"):
        geography.Geography(str(data), "both")
    with pytest.raises(ValueError, match=r"carelessness: 1\.5"):
        geography.Geography(str(data), carelessness=1.5)


# ---- SmolLM2's tokenizer


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.delitem(sys.modules, "environment", raising=False)
    module = load("prepare")
    del sys.modules["environment"]
    return module


def test_digits_and_what_precedes_them_are_split_as_the_file_names(prepare: ModuleType) -> None:
    """SmolLM2 splits digits off first, so that the two line ends before a number are one piece."""
    split = prepare.pre_tokenizer("smollm")
    pieces = [piece for piece, _ in split.pre_tokenize_str("Facts:\n\n1. Paris\n\n22 in 1998")]
    assert pieces == ["Facts", ":", "ĊĊ", "1", ".", "ĠParis", "ĊĊ", "2", "2", "Ġin", "Ġ", "1", "9", "9", "8"]


def test_a_way_to_split_that_is_not_known_is_refused(prepare: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"tokenizer.ggml.pre: 'qwen2' given: expected 'smollm'"):
        prepare.pre_tokenizer("qwen2")


def test_the_name_of_the_split_is_read_from_the_file(prepare: ModuleType, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'mgrpo[geography]'")
    for name, expected in (("smollm", "smollm"), (None, "default")):
        writer = gguf.GGUFWriter(tmp_path / f"{name}.gguf", "llama")
        if name is not None:
            writer.add_tokenizer_pre(name)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        assert prepare.named_pre_tokenizer(tmp_path / f"{name}.gguf") == expected


SMOLLM2 = Path(os.environ.get("MGRPO_TEST_SMOLLM2", FOLDER.parents[1] / "runs" / "geography" / "data" / "smollm2"))


@pytest.mark.skipif(not (SMOLLM2 / "tokenizer.json").is_file(), reason="needs SmolLM2: make train")
def test_a_numbered_list_has_the_ids_that_smollm2_was_trained_on() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    expected = [36455, 42, 1116, 33, 30, 7042, 1116, 34, 34, 30, 7268, 216, 33, 41, 41, 40, 28, 216, 35, 2471]
    assert tokenizer("Facts:\n\n1. Paris\n\n22. Rome 1998, 3 %")["input_ids"] == expected
