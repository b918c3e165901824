"""Test what the dry run finds in an environment: each fault by the method, what it returned and what was expected."""

from __future__ import annotations

import asyncio
import http.server
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from mgrpo import Answer, CallScore, Delegate, Environment, Malformed, Score, Task, ToolCall
from mgrpo.engine.cli.check import describe, offline
from mgrpo.engine.cli.check.rehearsal import Findings, Rehearsal
from mgrpo.engine.cli.check.words import read_source, texts_of
from mgrpo.engine.config.schema import Config
from mgrpo.engine.model.causal_lm import load_tokenizer
from toy import make_model, toy_config

PATIENCE = 2.0
never = threading.Event()


class Well(Environment):
    """Have nothing wrong: the main agent asks a clerk, who looks up a number."""

    def tasks(self, split):
        return [Task(f"{split}-{i}", {"n": i}) for i in range(3)]

    def prompt(self, call):
        return f"{call.request or call.task.data['n']}\n"

    def parse(self, call, text):
        verb, _, rest = text.strip().partition(" ")
        if verb == "ask" and call.agent == "main":
            return (Delegate("clerk", rest),)
        if verb == "look":
            return (ToolCall("book", rest),)
        return Answer(rest) if verb == "say" else Malformed("no verb")

    def tool(self, call, use):
        return "7" if use.name == "book" else super().tool(call, use)

    def score(self, episode):
        return Score(True, 1.0, tuple(CallScore(True, 0.5) for _ in episode.calls))


class Scripted(Well):
    def script(self, call):
        if call.turns:
            return "say 7\n"
        return "ask n\n" if call.agent == "main" else "look n\n"


@pytest.fixture(autouse=True)
def no_package_connects_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever other tests have imported."""
    monkeypatch.setattr(offline, "UNSEEN", ())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check")
    make_model(folder / "model")
    return folder


def rehearse(folder: Path, environment: Environment, asks: bool = False, **changes: Any) -> Rehearsal:
    config = toy_config(folder, **changes)
    tokenizers = {name: load_tokenizer(name, agent) for name, agent in config.agents.items()}
    rehearsal = Rehearsal(config, environment, tokenizers, asks, PATIENCE)
    rehearsal.run(environment.tasks("train"), environment.tasks("held_out"))
    return rehearsal


def faults(folder: Path, environment: Environment, **changes: Any) -> str:
    return "\n".join(rehearse(folder, environment, **changes).findings.faults)


@pytest.mark.parametrize("kind", [Well, Scripted])
def test_nothing_is_found_in_a_healthy_environment_whose_every_method_was_called(folder: Path, kind: type[Environment]):
    rehearsal = rehearse(folder, kind())
    assert rehearsal.findings == Findings() and not rehearsal.unscored
    methods = {"prompt", "parse", "tool", "observation", "score"}
    assert rehearsal.watch.called == methods | ({"script"} if kind is Scripted else set())
    assert rehearsal.watch.tools >= {("main", "book"), ("clerk", "book")}


def test_no_judge_is_asked_beside_a_package_that_connects_unseen(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(offline, "UNSEEN", ("pytest", "nowhere"))
    rehearsal = rehearse(folder, Well())
    assert rehearsal.unscored == "pytest may connect unseen" and "score" not in rehearsal.watch.called
    assert not rehearse(folder, Well(), asks=True).unscored


def method(name: str, value: Any, base: type[Environment] = Scripted) -> Environment:
    """Return an environment of which one method returns a value, or is a function."""
    given = value if callable(value) else lambda self, *args: value
    given.__qualname__ = f"Odd.{name}"
    made = type("Odd", (base,), {name: given, "__module__": __name__})()
    assert isinstance(made, Environment)
    return made


def raising(self: Environment, *args: Any) -> Any:
    raise KeyError("gone")


def leaving(self: Environment, *args: Any) -> Any:
    sys.exit(0)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("prompt", 5, "Odd.prompt: int returned: expected str"),
        ("prompt", "", "prompt: '' returned, expected some text"),
        ("parse", None, "parse: None returned: expected Answer, Malformed, or a tuple of ToolCall and Delegate"),
        ("parse", (), "parse: () returned: expected Answer"),
        ("parse", "look", "parse: 'look' returned: expected Answer"),
        ("tool", None, "Odd.tool: NoneType returned: expected str"),
        ("tool", {"a": 1}, "Odd.tool: dict returned: expected str"),
        ("observation", b"x", "Odd.observation: bytes returned: expected str"),
        ("script", 3, "Odd.script: int returned: expected str"),
        ("score", None, "score: NoneType returned: expected a Score"),
        ("score", "good", "score: str returned: expected a Score"),
        (
            "score",
            Score(True, float("nan"), (CallScore(True, 1.0),)),
            "score: correct is nan: expected a finite number",
        ),
        ("score", Score(True, None, (CallScore(True, 1.0),)), "score: correct is None: expected a finite"),  # type: ignore[arg-type]
        ("score", Score(True, 1.0), "score: calls has 0 scores: expected one for each of 1 calls"),
        *((name, raising, f"Odd.{name}: KeyError: 'gone'") for name in ("prompt", "parse", "tool", "score", "script")),
        *((name, leaving, f"Odd.{name}: SystemExit: 0") for name in ("prompt", "parse", "tool", "score", "script")),
    ],
)
def test_a_wrong_result_is_told_by_its_method(folder: Path, name: str, value: Any, told: str):
    found = faults(folder, method(name, value))
    assert told in found, found
    if value is raising:
        assert f"({__file__}, line {raising.__code__.co_firstlineno + 1})" in found


@pytest.mark.parametrize("name", ["prompt", "parse", "tool", "observation", "score", "script"])
@pytest.mark.parametrize("kind", ["plain", "async"])
def test_a_method_that_never_returns_is_told_by_its_name(folder: Path, name: str, kind: str):
    async def hang(self: Environment, *args: Any) -> Any:
        await asyncio.Event().wait()

    began = time.monotonic()
    found = faults(folder, method(name, hang if kind == "async" else lambda self, *args: never.wait()))
    assert f"Odd.{name}: no result within {PATIENCE:g} s" in found
    assert time.monotonic() - began < 30


def test_an_agent_and_a_tool_that_do_not_exist_are_told(folder: Path):
    def parse(self: Environment, call: Any, text: str) -> Any:
        verb = text.split()[:1]
        if verb == ["ask"]:
            return (Delegate("librarian", "x"),)
        return (ToolCall("shelf", "x"),) if verb == ["look"] else Answer("")

    for base in (Scripted, Well):
        found = faults(folder, method("parse", parse, base))
        assert (
            "parse: Delegate('librarian', …) returned: expected one of the sub-agents ['clerk'], or a section" in found
        )

    class Toolless(Well):
        tool = Environment.tool

    assert "ToolCall('book', …) returned, and Toolless.tool knows no such tool" in faults(folder, Toolless())


def test_a_name_that_the_text_made_up_is_no_fault(folder: Path):
    def parse(self: Environment, call: Any, text: str) -> Any:
        word = text.strip().partition(" ")[0]
        if call.agent == "main" and word:
            return (Delegate(word, "x"), ToolCall(word, "x"))
        return Malformed("")

    assert not faults(folder, method("parse", parse, Well))


def test_prompts_without_room_are_told_with_the_key(folder: Path):
    def some(self: Environment, call: Any) -> str:
        return "x" * (100 if call.task.id == "train-1" else 2)

    found = rehearse(folder, method("prompt", some)).findings
    assert not found.faults and len(found.notes) == 1
    assert "agents.main.max_context: 64 given: the prompt of task 'train-1' has 100 tokens" in next(iter(found.notes))
    assert "(1 of 6 tasks" in next(iter(found.notes))
    all_of_them = faults(folder, method("prompt", "x" * 80))
    assert "agents.main.max_context: 64 given" in all_of_them and "(6 of 6 tasks" in all_of_them
    clerks = faults(folder, method("prompt", lambda self, call: "x" * 70 if call.agent == "clerk" else "x"))
    assert "agents.clerk.max_context: 64 given: a prompt of clerk has 70 tokens" in clerks


def test_a_script_that_does_not_suit_the_agent_is_noted(folder: Path):
    long = rehearse(folder, method("script", "say " + "7" * 30 + "\n")).findings
    assert "agents.main.max_new_tokens: 12 given: a turn of the script has 35 tokens" in "\n".join(long.notes)
    endless = rehearse(folder, method("script", "say 7")).findings
    assert "script: 'say 7' ends no turn: expected one of agents.main.stop = ['\\n']" in "\n".join(endless.notes)


def test_made_up_texts_call_each_tool_of_an_agent_once(folder: Path):
    calls: list[tuple[str, str]] = []

    def tool(self: Environment, call: Any, use: Any) -> str:
        calls.append((call.agent, use.name))
        return "7"

    assert not faults(folder, method("tool", tool, Well))
    assert sorted(calls) == [("clerk", "book"), ("main", "book")]


# ---- judges


@pytest.fixture
def judge() -> Any:
    """Serve a judge on this machine, and count how often it is asked."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"1.0")

        def log_message(self, *args: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", asked
        server.shutdown()


def ask(url: str) -> float:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5) as answer:
        return float(answer.read())


@pytest.mark.parametrize("kind", ["plain", "async", "program"])
def test_a_judge_that_may_cost_money_is_asked_only_when_told(folder: Path, judge: Any, kind: str):
    url, asked = judge

    def plain(self: Environment, episode: Any) -> Score:
        if kind == "program":
            subprocess.run([sys.executable, "-c", f"import urllib.request as r; r.urlopen({url!r})"], check=True)
        return Score(True, ask(url), tuple(CallScore(True, 1.0) for _ in episode.calls))

    async def waiting(self: Environment, episode: Any) -> Score:
        return plain(self, episode)

    environment = method("score", waiting if kind == "async" else plain)
    quiet = rehearse(folder, environment)
    assert not asked and not quiet.findings.faults
    assert quiet.unscored == "it needs the network" and not quiet.scored
    loud = rehearse(folder, method("score", waiting if kind == "async" else plain), asks=True)
    assert asked and loud.scored and not loud.unscored and not loud.findings.faults


def test_outside_of_judges_connections_are_left_alone(judge: Any):
    url, _ = judge
    with offline.offline(), pytest.raises(OSError, match="refuses connections"):
        ask(url)
    assert offline.take_refused() and not offline.take_refused()
    assert ask(url) == 1.0


def test_a_judge_that_never_returns_stays_offline_and_nobody_else_does(folder: Path):
    refused: list[OSError] = []
    go, ended = threading.Event(), threading.Event()

    def score(self: Any, episode: Any) -> Score:
        go.wait(60)
        try:
            subprocess.run([sys.executable, "-c", ""], check=True)
        except OSError as error:
            refused.append(error)
        ended.set()
        return Score(True, 1.0)

    found = rehearse(folder, method("score", score))
    assert "score: no result within 2 s" in "".join(found.findings.faults)
    subprocess.run([sys.executable, "-c", ""], check=True)
    go.set()
    assert ended.wait(30) and refused


# ---- what needs no episode


def config_of(folder: Path, kind: str, **changes: Any) -> Config:
    (folder / "environments.py").write_text(
        "from mgrpo import Environment, Task, Answer, Score\n"
        "class Base(Environment):\n"
        "    def tasks(self, split): return [Task(split + 'a', {}), Task(split + 'b', {})]\n"
        "    def prompt(self, call): return 'x'\n"
        "    def parse(self, call, text): return Answer(text)\n"
        "    def score(self, episode): return Score(True, 1.0)\n"
        "class Twice(Base):\n"
        "    def tasks(self, split): return [Task('a', {}), Task('b', {}), Task('a', {})]\n"
        "class Words(Base):\n"
        "    def tasks(self, split): return ['a', 'b']\n"
        "class Rows(Base):\n"
        "    def tasks(self, split): return [{'id': 'a'}]\n"
        "class Slow(Base):\n"
        "    def tasks(self, split):\n"
        "        import time; time.sleep(60)\n"
        "class Broken(Base):\n"
        "    def tasks(self, split): return open('/nowhere/tasks')\n"
    )
    return toy_config(folder, environment={"use": f"{folder}/environments.py:{kind}"}, **changes)


def test_tasks_of_another_kind_and_ids_that_come_twice_are_told(folder: Path):
    _, found = describe.describe(config_of(folder, "Twice"))
    assert "environment: Twice.tasks('train')[2] has the id 'a' of task 0: expected each id once" in found.faults
    assert "2 tasks, such as 'a', are in 'train' and in 'held_out'" in "".join(found.notes)
    for kind, told in (("Words", "expected a Task"), ("Rows", "expected a Task"), ("Broken", "FileNotFoundError")):
        with pytest.raises(ValueError, match=rf"{kind}\.tasks\('train'\).*{told}"):
            describe.describe(config_of(folder, kind))
    with pytest.raises(ValueError, match=r"Slow\.tasks\('train'\): no result within 1 s"):
        describe.describe(config_of(folder, "Slow"), patience=0.1)


def test_a_warm_up_without_a_script_is_told(folder: Path):
    _, found = describe.describe(config_of(folder, "Base", warmup={"steps": 3}))
    assert "warmup.steps: 3 given: Base has no script(): expected one" in "".join(found.faults)
    _, found = describe.describe(config_of(folder, "Base", warmup={"steps": 0}))
    assert not found.faults


def test_all_faults_are_told_at_once_after_the_description(folder: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ValueError, match=r"(?s)^3 faults found:\n  .*tasks.*\n  .*tasks.*\n  .*warmup\.steps"):
        describe.report(config_of(folder, "Twice"), asks=False, device_memory=None, patience=5.0)
    assert "topology   colocated" in capsys.readouterr().out


def test_words_of_a_source_become_texts(folder: Path):
    source = read_source(Well())
    assert {"ask", "look", "say", "book"} <= set(source.words)
    assert "clerk" in source.agents and "book" in source.tools
    assert "ask x" in texts_of(source.words) and '{"name": "book", "arguments": {"x": "x"}}' in texts_of(source.words)
