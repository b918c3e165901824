"""Test the `mgrpo` command: what it prints, its exit codes, and that a user's mistake is told in one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from mgrpo.engine.cli import main
from mgrpo.engine.cli.check.fitting import shown
from mgrpo.engine.run.metrics import read_metrics
from toy import SUMS, make_model, raw_config

SCRIPT = Path(sys.executable).parent / "mgrpo"
COMMANDS = ("train", "agent", "rollout", "eval", "report", "check", "simulate", "bench", "serve", "store")
ENVIRONMENTS = f"""
import sys, zlib
sys.path.insert(0, {str(SUMS.parent)!r})
from environment import Sums

class Dice(Sums):
    '''About every second text is right, so that every other model has another accuracy.'''
    def score(self, episode):
        score, text = super().score(episode), "".join(turn.text for turn in episode.main.turns)
        return type(score)(score.format, float(zlib.crc32(text.encode()) % 2), score.calls)

class LongWinded(Sums):
    def prompt(self, call):
        return "x" * 100

class NoTasks(Sums):
    def tasks(self, split):
        return []

class Quits(Sums):
    def tasks(self, split):
        raise SystemExit(0)
"""


class Result(NamedTuple):
    code: int
    out: str
    err: list[str]  # lines, without the progress bars of loading


Mgrpo = Callable[..., Result]


@pytest.fixture
def mgrpo(monkeypatch, capfd) -> Mgrpo:
    """Return a function that runs the command in this process."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["mgrpo", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main.main()
        out, err = capfd.readouterr()
        lines = [line for line in re.split(r"[\r\n]+", err) if line.strip() and "it/s]" not in line]
        return Result(int(stop.value.code or 0), out, lines)

    return run


@pytest.fixture(scope="module", autouse=True)
def settings_of_this_process() -> Iterator[None]:
    """Restore what a run sets for its whole process."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    make_model(folder / "model")
    (folder / "odd.py").write_text(ENVIRONMENTS)
    return folder


def flat(raw: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(raw, dict):
        return {key: raw}
    return {k: v for name, inner in raw.items() for k, v in flat(inner, f"{key}.{name}".lstrip(".")).items()}


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    raw = raw_config(
        folder,
        environment={"use": f"{folder / 'odd.py'}:Dice"},
        steps=2,
        warmup={"steps": 14, "episodes": 8, "lr": 2e-2},
        eval={"questions": 20, "every": 1},
        checkpoint={"every": 1, "keep": 3},
    )
    path = folder / "train.toml"
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in flat(raw).items()))
    return path


@pytest.fixture(scope="module")
def trained(file: Path, folder: Path) -> str:
    """Return what `mgrpo train` prints in its own process."""
    done = subprocess.run([SCRIPT, "train", file], capture_output=True, text=True, check=False, env=one_thread())
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def one_thread() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def told(result: Result, message: str) -> None:
    """Check that the command failed and that one line on stderr says why."""
    assert result.code == 1
    assert len(result.err) == 1, result.err
    assert re.fullmatch(f"error: {message}", result.err[0]), result.err[0]


# ---- train


def test_train_prints_a_line_per_row_and_a_summary(trained: str, folder: Path):
    lines = trained.splitlines()
    assert "warmup: steps 1 to 14" in lines
    warmup = [line.split(" | ")[0] for line in lines if line.startswith("warmup ")]
    assert warmup == [f"warmup {step}/14" for step in range(1, 15)]
    rl = [line.split(" | ")[0] for line in lines if line.startswith("rl ")]  # an evaluation, a step, an evaluation, …
    assert rl == ["rl 0/2", "rl 1/2", "rl 1/2", "rl 2/2", "rl 2/2"]
    assert f"{folder / 'run'}: 14 of 14 warm-up steps, 2 of 2 rl steps of 3 queries x 4 rollouts" in lines
    assert re.search(r"^held-out accuracy after 2 rl steps: .* % \(95 % interval .*, 20 questions\)$", trained, re.M)
    assert "rollouts: 24 scored, 0 unscored, 0 failed" in lines


def test_train_again_without_resume_is_refused(mgrpo: Mgrpo, trained: str, file: Path, folder: Path):
    message = f"run_dir: {folder / 'run'} holds a run; pass --resume to go on, or choose another run_dir"
    told(mgrpo("train", file), re.escape(message))


def test_train_with_resume_goes_on_with_more_steps(mgrpo: Mgrpo, trained: str, file: Path, folder: Path):
    shutil.copytree(folder / "run", folder / "longer")
    result = mgrpo("train", file, "--resume", "--set", f"run_dir={folder / 'longer'}", "--set", "steps=3")
    assert (result.code, result.err) == (0, [])
    assert "resumed from rl-00002" in result.out
    assert "3 of 3 rl steps" in result.out
    assert max(path.name for path in (folder / "longer" / "checkpoints").iterdir()) == "rl-00003"


# ---- eval


def test_eval_gives_the_accuracy_that_the_run_gave(mgrpo: Mgrpo, trained: str, file: Path, folder: Path):
    rows = [row for row in read_metrics(folder / "run" / "metrics.jsonl") if "eval/held_out_accuracy" in row]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert len({row["eval/held_out_accuracy"] for row in rows}) > 1  # otherwise equal ones would prove little
    for row in rows:
        checkpoint = folder / "run" / "checkpoints" / f"rl-{row['step']:05d}"
        result = mgrpo("eval", file, "--checkpoint", checkpoint)
        share, low, high = (100 * row[f"eval/{key}"] for key in ("held_out_accuracy", "low", "high"))
        assert (result.code, result.err) == (0, [])
        lines = result.out.splitlines()
        assert lines[0] == f"main: rl-{row['step']:05d} of {folder / 'run'}"
        assert lines[-1].split(maxsplit=3) == ["held_out", "20", "0", f"{share:.1f} % ({low:.1f} to {high:.1f})"]


def test_eval_changes_nothing_in_the_run(mgrpo: Mgrpo, trained: str, file: Path, folder: Path):
    def state() -> dict[str, tuple[int, int]]:
        files = [path for path in (folder / "run").rglob("*") if path.is_file()]
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}

    before = state()
    mgrpo("eval", file, "--checkpoint", folder / "run" / "checkpoints" / "rl-00002")
    assert state() == before


def test_eval_of_what_is_no_checkpoint_of_these_agents_is_refused(mgrpo: Mgrpo, trained: str, file: Path, folder: Path):
    told(
        mgrpo("eval", file, "--checkpoint", folder / "no"), "--checkpoint: .*/no is not a directory: expected a run, .*"
    )
    told(mgrpo("eval", file, "--checkpoint", folder / "model"), "checkpoint .*: expected a whole checkpoint, .*")
    checkpoint = folder / "run" / "checkpoints" / "rl-00002"
    wider = make_model(folder / "wider", intermediate_size=64)
    result = mgrpo("eval", file, "--checkpoint", checkpoint, "--set", f"agents.main.model={wider}")
    told(result, rf"{checkpoint}/main: weight '.*' has shape \(.*48.*\), expected \(.*64.*\): made by another model")
    twin = ["--set", f"agents.twin.model={folder / 'model'}", "--set", "agents.twin.max_context=64"]
    result = mgrpo("eval", file, "--checkpoint", checkpoint, *twin)
    told(result, re.escape(f"{checkpoint}: agents ['clerk', 'main'] found, expected ['clerk', 'main', 'twin']"))


# ---- report


def test_report_shows_episodes_a_summary_and_draws_the_figure(mgrpo: Mgrpo, trained: str, folder: Path):
    (folder / "run" / "curves.png").unlink()
    result = mgrpo("report", folder / "run", "--episodes", "2")
    assert (result.code, result.err) == (0, [])
    assert "2 of 2 rl steps of 3 queries x 4 rollouts" in result.out
    assert f"figure: {folder / 'run' / 'curves.png'}" in result.out
    assert (folder / "run" / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_report_of_no_run_or_no_query_is_refused(mgrpo: Mgrpo, trained: str, folder: Path):
    told(mgrpo("report", folder), f"RUN: {folder} given: expected a run directory, .*")
    told(mgrpo("report", folder / "run", "--episodes", "0"), "episodes: 0 given, expected at least 1")
    told(mgrpo("report", folder / "run", "--query", "99"), "query: 99 .*")


# ---- check


def test_check_says_what_would_run_and_loads_no_weights(mgrpo: Mgrpo, file: Path, folder: Path):
    bare = Path(shutil.copytree(folder / "model", folder / "bare"))
    (bare / "model.safetensors").unlink()
    result = mgrpo("check", file, "--set", f"agents.main.model={bare}", "--set", f"agents.clerk.model={bare}")
    assert (result.code, result.err) == (0, [])
    assert "80 to train on, 20 held out" in result.out
    assert "14 warm-up steps of 8 episodes, 2 rl steps of 3 queries x 4 rollouts" in result.out
    assert re.search(rf"^main +trained: {bare}$", result.out, re.MULTILINE)


def test_check_counts_memory(mgrpo: Mgrpo, file: Path, folder: Path):
    """The figures are computed by hand, for a model of 2^20 weights and 2^15 tokens of cache."""
    big = make_model(folder / "big", vocab_size=16384, hidden_size=512, intermediate_size=8, num_hidden_layers=1)
    result = mgrpo("check", file, "--set", f"agents.clerk.model={big}", "--set", "compute.concurrency=512")
    weights = 16384 * 512 + 2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 8 + 3 * 512
    cache = 512 * 64 * 2 * 2 * 128 * 4  # calls, tokens, keys and values, groups, head size, bytes
    assert (
        f": {shown(weights * 4)} weights, {shown(weights * 8)} moments, {shown(weights * 4)} gradients, " in result.out
    )
    assert f"at most {shown(cache)} key-value cache" in result.out


# ---- mistakes


def test_check_tells_the_processes_of_each_topology_and_what_each_holds(mgrpo: Mgrpo, file: Path):
    def checked(*overrides: str) -> list[str]:
        result = mgrpo("check", file, *(part for override in overrides for part in ("--set", override)))
        assert result.code == 0, result.err
        return result.out.splitlines()

    lines = checked("topology=local", "agents.main.ranks=2", "sampling.workers=3", "sampling.max_staleness=2")
    assert lines[0] == (
        "topology   local: trainer of main (2 ranks), trainer of clerk, 3 x rollout worker, a launcher; cpu; "
        "sampling at most 2 steps ahead"
    )
    size = r"\d+\.\d+ [GM]iB"
    trainers = f"trainer of main {size}, trainer of main {size}, trainer of clerk {size}"
    workers = ", ".join(f"worker {i} {size}" for i in range(3))
    assert re.fullmatch(f"memory +cpu: about {size} of {size} at the peak: {trainers}, {workers}", lines[-1])
    lines = checked("topology=cluster")
    assert lines[0].endswith(
        "trainer of clerk (as many ranks as torchrun starts), any number of rollout workers; on-policy"
    )
    assert [line.split(":")[0].split(maxsplit=1)[1] for line in lines[-3:]] == [
        "cpu of a rank of main",
        "cpu of a rank of clerk",
        "cpu of a rollout worker",
    ]


@pytest.mark.parametrize("command", ["train", "check"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("agents.main.rl=1", "config: agents.main.rl: 1 given: no such key, expected one of model, .*"),
        ("algorithm.rollouts=1", "config: algorithm.rollouts: 1 given: Expected `int` >= 2"),
        ("nonsense", "--set: 'nonsense' given, expected KEY=VALUE such as .*"),
        ("agents.clerk.model=/no", "agents.clerk.model: /no given: expected a directory with a config.json in it, .*"),
        ("agents.main.max_context=257", "agents.main.max_context: 257 given: expected at most the model's 256"),
        ("environment.use=/no.py:Env", "environment.use: /no.py is not a file: expected a Python file"),
        ("environment.use=no_such_module:Env", "environment.use: 'no_such_module' given: .*"),
        ("environment.use=Env", "environment.use: 'Env' given: expected file.py:Class or package.module:Class"),
        ("environment.use=FOLDER/odd.py:Hard", "environment.use: 'Hard' in .* is not defined: expected a subclass .*"),
        ("environment.use=FOLDER/odd.py:NoTasks", r"environment: NoTasks.tasks\('train'\) is empty, expected tasks"),
        ("environment.options.size=3", r"environment.options: {'size': 3} given: Dice\(\) takes no arguments"),
        ("compute.device=gpu", "config: compute.device: 'gpu' given: expected .*"),
        ("compute.device=cuda:77", "config: compute.device: 'cuda:77' given: expected .*"),
    ],
)
def test_a_mistake_is_told_in_one_line(mgrpo: Mgrpo, file: Path, folder: Path, command, override, message):
    flags = ["--set", override.replace("FOLDER", str(folder))]
    told(mgrpo(command, file, "--set", f"run_dir={folder / 'mistaken'}", *flags), message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "environment.use=FOLDER/odd.py:LongWinded",
            "agents.main.max_context: 64 given: the prompt .* has 100 .*",
        ),
        (
            "compute.max_tokens=20",
            "config: compute.max_tokens: 20 given: expected at least 63, since agents.main.max_context = 64 lets .*",
        ),
        ("environment.use=FOLDER/odd.py:Quits", r".*odd\.py, line \d+: sys\.exit\(0\) called in tasks: .*"),
    ],
)
def test_what_a_run_meets_on_its_way_is_told_in_one_line(mgrpo: Mgrpo, file, folder, override, message, tmp_path):
    flags = ["--set", override.replace("FOLDER", str(folder))]
    told(mgrpo("train", file, "--set", f"run_dir={tmp_path / 'run'}", *flags), message)


def broken(folder: Path, file: str, content: bytes) -> Path:
    """Return a copy of the model with one file overwritten."""
    shutil.copytree(folder.parent / "model", folder)
    (folder / file).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("part", "content", "message"),
    [
        ("model.safetensors", b"not weights at all", "agents.main.model: .* has no readable weights: .*"),
        ("model.safetensors", b"", "agents.main.model: .* has no readable weights: .*"),
        ("config.json", b"{", "agents.main.model: .*config.json is not valid JSON: .*"),
        (
            "config.json",
            b"{}",
            "agents.main.model: .*config.json has no vocab_size: expected .*",
        ),
        ("tokenizer.json", b"{", "agents.main.model: .* has no readable tokenizer: .*"),
    ],
)
def test_a_broken_model_is_told_in_one_line(mgrpo: Mgrpo, file: Path, folder: Path, part, content, message):
    model = broken(folder / f"broken-{len(os.listdir(folder))}", part, content)
    told(mgrpo("train", file, "--set", f"agents.main.model={model}", "--set", f"run_dir={model}-run"), message)


def test_a_mistake_leaves_no_run_behind_that_would_have_to_be_resumed(mgrpo: Mgrpo, file: Path, folder: Path):
    where = ["--set", f"run_dir={folder / 'second'}", "--set", "warmup.steps=0", "--set", "steps=0"]
    assert mgrpo("train", file, *where, "--set", "agents.main.model=/no").code == 1
    assert mgrpo("train", file, *where).code == 0


# ---- the command itself


def test_help_names_every_command_and_needs_no_torch():
    program = "import sys; sys.argv = ['mgrpo', '--help']; from mgrpo.engine.cli.main import main\ntry: main()\n"
    program += "finally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert all(re.search(rf"\b{command}\b", done.stdout) for command in COMMANDS)
    assert done.stdout.strip().splitlines()[-1] == "False"


def test_a_command_that_there_is_not_exits_2(mgrpo: Mgrpo):
    assert mgrpo("tran").code == 2
    assert mgrpo("train").code == 2
    assert mgrpo("train", "file.toml", "--resum").code == 2


def test_a_benchmark_that_there_is_not_is_refused_by_name(mgrpo: Mgrpo):
    result = mgrpo("bench", "kernel")
    assert result.code == 2
    told = re.sub(r"[│\s]+", " ", " ".join(result.err))  # without the frame around it
    assert "'kernel' is not" in told and all(f"'{name}'" in told for name in ("kernels", "packing", "step", "store"))


def test_the_installed_command_tells_a_mistake_in_one_line(file: Path):
    done = subprocess.run([SCRIPT, "check", file, "--set", "step=3"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: config: step: 3 given: no such key, expected one of run_dir, .*\n", done.stderr)


def test_the_version_is_that_of_the_package(mgrpo: Mgrpo):
    result = mgrpo("--version")
    assert (result.code, result.out) == (0, f"mgrpo {metadata.version('mgrpo')}\n")
