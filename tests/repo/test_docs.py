"""The documentation is right: its Python runs, and the program accepts the commands and files that it shows.

The Python blocks of a page run in order in one namespace, in an empty directory. `make docs` checks links and names.
"""

from __future__ import annotations

import math
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer
from typer.core import TyperGroup

from mgrpo.engine.cli.main import app
from mgrpo.engine.config.schema import Config, load_config, parse_config
from mgrpo.engine.environment.base import Environment
from mgrpo.engine.report.display import make_display
from mgrpo.engine.rollout.demonstrations import Demonstrations
from mgrpo.engine.rollout.episodes import Job
from mgrpo.engine.run.metrics import read_metrics
from mgrpo.engine.training import colocated, launcher
from mgrpo.kernels import Objective, RuleRows
from toy import make_model, raw_config

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
README = ROOT / "README.md"
LANGUAGES = {"python", "bash", "toml", "text"}
FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LEAST: dict[str, Any] = {"run_dir": "x", "environment": {"use": "x.py:X"}, "agents": {"main": {"model": "x"}}}
COMMAND: Any = typer.main.get_command(app)
UsageError: Any = typer.BadParameter.__base__  # from the click that typer uses
CHATTY = '''
from mgrpo import Answer, CallScore, Delegate, Environment, Score, Task

class Chatty(Environment):
    """Treat the first text of the untrained main agent as a request to its clerk."""

    def tasks(self, split):
        return [Task(f"{split} {i}", {}) for i in range(3)]

    def prompt(self, call):
        return f"{call.agent} {call.task.id}\\n"

    def parse(self, call, text):
        return Answer(text) if call.turns or call.agent != "main" else (Delegate("clerk", text),)

    def score(self, episode):
        calls = tuple(CallScore(True, 0.5) for _ in episode.calls)
        return Score(True, float(len(episode.main.answer or "") % 2), calls)

    def script(self, call):
        return "so\\n"
'''


class Block(NamedTuple):
    """Hold a fenced block of a page."""

    page: str
    language: str
    text: str


def blocks_of(path: Path) -> list[Block]:
    return [Block(path.name, *found) for found in FENCE.findall(path.read_text())]


WITH_PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks_of(page))]
BLOCKS = [block for page in [*PAGES, README] for block in blocks_of(page)]


def blocks(language: str) -> list[Any]:
    chosen = [block for block in BLOCKS if block.language == language]
    return [pytest.param(block.text, id=f"{block.page}-{i}") for i, block in enumerate(chosen)]


def test_there_is_documentation_and_each_block_says_what_it_is() -> None:
    assert {"python", "bash", "toml"} <= {block.language for block in BLOCKS}
    assert {block.language for block in BLOCKS} <= LANGUAGES
    for page in PAGES:
        assert len(FENCE.findall(page.read_text())) * 2 == page.read_text().count("```"), f"{page}: a fence is open"


# ---- Python


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {"__name__": "docs"}
    for number, block in enumerate(b for b in blocks_of(page) if b.language == "python"):
        if "import trl" in block.text or "from trl" in block.text:
            pytest.importorskip("trl", reason="needs trl: pip install 'mgrpo[dev]'")
        exec(compile(block.text, f"{page.name}, block {number}", "exec"), given)
    for name, value in given.items():
        if isinstance(value, type) and issubclass(value, Environment) and value.__module__ == "docs":
            assert played(value, given) == "scored", name


def played(cls: Any, given: dict[str, Any]) -> str:
    """Return how an episode ends in which every agent always says 1."""

    class Scripted(cls):
        def script(self, call: Any) -> str:
            return "1\n"

    environment = Scripted()
    job = Job(0, 0, environment.tasks("train")[0])
    return Demonstrations(given["config"], environment, {"main": given["tokenizer"]}).run([job])[0].status


def test_the_environment_shown_is_the_one_in_examples() -> None:
    shown = blocks_of(ROOT / "docs/environment.md")[0]
    assert shown.text == (ROOT / "examples/sums/environment.py").read_text()


# ---- commands


def lines_of(text: str) -> Iterator[list[str]]:
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def check_command(words: list[str]) -> None:
    """Let the command check its arguments, without running it. Raises UsageError."""
    command, name = COMMAND, "mgrpo"
    while isinstance(command, TyperGroup):
        name, command, words = command.resolve_command(command.context_class(command, info_name=name), words)
        assert command is not None and name is not None
    command.make_context(name, list(words))


def our_commands(text: str) -> list[list[str]]:
    """Return the arguments of each mgrpo command in some lines of a shell, also of those behind a launcher."""
    found = []
    for words in lines_of(text):
        if words[0] == "mgrpo":
            found.append(words[1:])
        elif "mgrpo.engine" in words:
            found.append(words[words.index("mgrpo.engine") + 1 :])
    return found


@pytest.mark.parametrize("text", blocks("bash"))
def test_the_commands_shown_are_taken(text: str) -> None:
    checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr
    for words in our_commands(text):
        check_command(words)
        for key in (words[i + 1] for i, word in enumerate(words) if word == "--set"):
            assert_key(key.partition("=")[0])
    targets = re.findall(r"^[a-z-]+(?=:)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in lines_of(text):
        assert words[0] in {"mgrpo", "make", "pip", "python", "torchrun", "vllm", "cd"}, words
        assert words[0] != "make" or words[1] in targets, words
        for name in (word for word in words if word.startswith("mgrpo.")):
            assert find_spec(name), name
        for name in (word for word in words if word.startswith("examples/")):
            assert (ROOT / name).is_file(), name
        assert words[0] != "pip" or set(extras_in(words[-1])) <= set(extras()), words


def assert_key(key: str) -> None:
    """Check that the config has a dotted key, by giving it a wrong value: an unknown key has its own message."""
    raw = deepcopy(LEAST) | {"agents": {"main": {"model": "x"}, "sub": {"model": "x"}}}
    inner: dict[str, Any] = raw
    *parents, last = key.split(".")
    for parent in parents:
        inner = inner.setdefault(parent, {})
    inner[last] = object()
    with pytest.raises((ValueError, TypeError)) as refused:
        parse_config(raw)
    assert "no such key" not in str(refused.value)


def extras() -> list[str]:
    return list(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def extras_in(requirement: str) -> list[str]:
    found = re.search(r"\[(.*)\]", requirement)
    return found[1].split(",") if found else []


@pytest.mark.parametrize("text", blocks("bash"))
def test_a_wrong_option_would_be_found(text: str) -> None:
    for words in our_commands(text):
        with pytest.raises(UsageError):
            check_command([words[0], "--no-such-option", *words[1:]])


def test_every_command_is_shown() -> None:
    shown = {words[0] for text in BLOCKS if text.language == "bash" for words in our_commands(text.text)}
    assert set(COMMAND.commands) <= shown


# ---- files


@pytest.mark.parametrize("text", blocks("toml"))
def test_the_files_shown_are_taken(text: str, tmp_path: Path) -> None:
    given = tomllib.loads(text)
    whole = "run_dir" in given
    (tmp_path / "x.toml").write_text(text)
    config = load_config(tmp_path / "x.toml") if whole else parse_config(LEAST | given)
    if whole and (use := given["environment"]["use"].partition(":"))[0].startswith("examples/"):
        assert f"class {use[2]}(" in (ROOT / use[0]).read_text()
    assert isinstance(config, Config)


@pytest.mark.parametrize("page", [*PAGES, README], ids=lambda page: page.name)
def test_the_files_spoken_of_are_there(page: Path) -> None:
    for name in re.findall(r"`((?:engine|kernels|examples|bench|tests|docs|tools)/[\w./-]+)`", page.read_text()):
        assert (ROOT / name).exists(), name


# ---- what the page on embedding shows


def embedding(word: str) -> str:
    """Return the Python block of the page on embedding that contains a word."""
    texts = [block.text for block in blocks_of(ROOT / "docs/embed.md") if block.language == "python"]
    (found,) = (text for text in texts if word in text)
    return found


def test_the_objective_shown_is_cispo() -> None:
    given: dict[str, Any] = {}
    exec(embedding("def cispo").partition("\n\n\npolicy.step")[0], given)
    logprobs, old = torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([-2.0, -1.0])
    advantages, ones = torch.tensor([3.0, 5.0]), torch.ones(2)
    rows = RuleRows(logprobs, ones, advantages, ones, old, None, None, None, 0)
    given["cispo"](rows, Objective(clip_high=0.5)).sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([-1.5 * 3, -5 * math.exp(-1)]))


def test_the_adapter_shown_is_a_trainer() -> None:
    trl = pytest.importorskip("trl", reason="needs trl: pip install 'mgrpo[dev]'")
    given: dict[str, Any] = {}
    exec(embedding("GRPOTrainer"), given)
    assert issubclass(given["Trainer"], trl.GRPOTrainer) and given["Trainer"].__mro__[1].__name__ == "FusedGRPO"


# ---- the glossary of metrics


def glossary() -> dict[str, set[str]]:
    """Return the keys of the glossary by heading."""
    found: dict[str, set[str]] = {}
    for part in (ROOT / "docs/metrics.md").read_text().split("\n## ")[1:]:
        title, _, text = part.partition("\n")
        found[title] = set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glossary")
    make_model(folder / "model")
    (folder / "chatty.py").write_text(CHATTY)
    return folder


def run(folder: Path, name: str, **changes: Any) -> Path:
    """Run both stages so that each agent is called, with every term of the objective, and return the run directory."""
    algorithm = {"rollouts": 4, "aligned_calls": 2, "kl_coef": 0.1, "entropy_coef": 0.01, "sampler_cap": 2.0}
    few = {"steps": 1, "queries_per_step": 2, "eval": {"questions": 2}, "warmup": {"steps": 1, "episodes": 2}}
    raw = raw_config(folder, run_dir=str(folder / name), algorithm=algorithm, **few, **changes)
    config = parse_config(raw | {"environment": {"use": f"{folder / 'chatty.py'}:Chatty"}})
    topology = launcher if config.topology == "local" else colocated
    topology.train(config, False, make_display(list(config.agents)))
    return Path(config.run_dir)


def keys_in(paths: Iterator[Path] | list[Path]) -> set[str]:
    found = {key for path in paths for row in read_metrics(path) for key in row}
    return {re.sub(r"^\w+/version$", "<agent>/version", key) for key in found}


def test_a_run_writes_the_keys_of_the_glossary_and_no_others(folder: Path) -> None:
    words = glossary()
    whole = words["Every row"] | words["A step"] | words["An evaluation"]
    agents = {f"{name}/{key}" for name in ("main", "clerk") for key in words["An agent"]}
    agents -= {"main/expert", "main/calls_mean", "clerk/correct", "main/router_aux", "clerk/router_aux"}
    assert keys_in([run(folder, "colocated") / "metrics.jsonl"]) == whole | agents


def test_a_decoupled_run_writes_the_keys_of_the_glossary_and_no_others(folder: Path) -> None:
    words = glossary()
    path = run(folder, "local", topology="local")
    counted = {key for key in words["A step"] if key.startswith("rollouts/")}
    scores = {"rollouts/scored", "rollouts/unscored"}  # of the rl stage, which the workers sample
    beside = words["Every row"] | counted - scores | {"time/step", "perf/peak_memory_gib"}
    own = words["An agent"] - {"router_aux"} | words["An agent with its own processes"] | beside
    assert keys_in(path.glob("agents/*/metrics.jsonl")) == own
    worker = words["Every row"] | counted - {"rollouts/played"} | words["A worker"] | words["An evaluation"]
    assert keys_in(path.glob("workers/*/metrics.jsonl")) == worker
