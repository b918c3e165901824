"""Test loggers with the real tools, each in its own process: what they show is what metrics.jsonl holds."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mgrpo.engine.config.schema import Config, dump_config
from mgrpo.engine.report.loggers.base import LoggedRollout, LoggedRun
from mgrpo.engine.report.loggers.feed import numbers_of
from mgrpo.engine.report.loggers.processes import Loggers, check_loggers
from mgrpo.engine.report.loggers.tensorboard import TensorBoard
from mgrpo.engine.report.metrics import read_rows
from mgrpo.engine.run.directory import RunPaths
from mgrpo.engine.run.metrics import JsonLines, Row
from toy import toy_config

Curves = dict[str, list[tuple[int, float]]]  # by key: step and value
TOOLS = ("tensorboard", "wandb", "mlflow", "trackio")


@pytest.fixture(autouse=True)
def own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no tool find a key, or write anywhere else."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_", "HF_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


def config_of(folder: Path, to: Sequence[str], **log: Any) -> Config:
    """Return a colocated run's config, and make its directory."""
    config = toy_config(folder, log={"to": list(to), "project": "tests", "name": "curves", "tags": ["a"], **log})
    Path(config.run_dir).mkdir(exist_ok=True)
    return config


def rows(first: int, last: int, plus: float = 0.0) -> Iterator[Row]:
    """Yield rl steps, with an evaluation before each second one."""
    for step in range(first, last):
        if step % 2 == 0:
            yield {"stage": "rl", "step": step, "eval/held_out_accuracy": step / 8, "eval/questions": 10}
        yield {"stage": "rl", "step": step, "main/reward_mean": step / 4 + plus, "time/step": 1.5, "clerk/lr": None}


def log(config: Config, written: Sequence[Row], resumed: bool = False) -> list[str]:
    """Log a run that writes these rows, and return what its loggers say."""
    said: list[str] = []
    with Loggers(config, Path(config.run_dir), said.append, anew=not resumed) as loggers:
        loggers.begin()
        lines = JsonLines(RunPaths(config.run_dir).metrics)
        for row in written:
            lines.append(row)
        lines.close()
    return said


def curves_of(found: Sequence[Row]) -> Curves:
    """Return the curves that rows of metrics stand for."""
    curves: Curves = defaultdict(list)
    for row in found:
        for key, value in numbers_of(row).items():
            curves[key].append((row["step"], value))
    return dict(curves)


def in_tensorboard(folder: Path) -> Curves:
    board = EventAccumulator(str(folder))
    board.Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def records(file: Path) -> Iterator[bytes]:
    """Yield the records of a W&B file: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a full one, or the last part of one
            yield whole
            whole = b""


def in_wandb(folder: Path) -> tuple[Curves, list[int]]:
    """Return the curves of all offline files of a run over "step", and W&B's own steps."""
    from wandb.proto.wandb_internal_pb2 import Record

    curves: Curves = defaultdict(list)
    steps: list[int] = []
    for file in sorted(folder.glob("offline-run-*/*.wandb")):
        for data in records(file):
            record = Record.FromString(data)
            if not record.HasField("history"):
                continue
            items = {
                item.key or ".".join(item.nested_key): msgspec.json.decode(item.value_json)
                for item in record.history.item
            }
            steps.append(items["_step"])
            stage = "warmup/" if "warmup/step" in items else ""
            for key, value in items.items():
                if not key.startswith("_") and key != f"{stage}step" and isinstance(value, int | float):
                    curves[key].append((items[f"{stage}step"], value))
    return dict(curves), steps


READ_MLFLOW = """
import json, sys
from mlflow.tracking import MlflowClient
client = MlflowClient(sys.argv[1])
runs = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
for run in runs:
    history = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    curves = {key: [(m.step, m.value) for m in found] for key, found in history.items()}
    print(json.dumps([run.info.status, run.info.run_name, run.data.params["algorithm.rollouts"], curves]))
"""
READ_TRACKIO = """
import json
from trackio.sqlite_storage import SQLiteStorage
for name in SQLiteStorage.get_runs("tests"):
    print(json.dumps([name, SQLiteStorage.get_logs("tests", name)]))
"""


def read(program: str, *arguments: str) -> list[Any]:
    """Return the lines of JSON that a program prints."""
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    return [msgspec.json.decode(line) for line in done.stdout.splitlines() if line.startswith("[")]


def as_tuples(curves: dict[str, list[list[float]]]) -> Curves:
    return {key: [(int(step), value) for step, value in sorted(points)] for key, points in curves.items()}


def in_trackio() -> tuple[list[str], Curves]:
    """Return the names of trackio's runs, and the curves of the first one."""
    runs = read(READ_TRACKIO)
    curves: Curves = defaultdict(list)
    for entry in runs[0][1]:
        for key, value in entry.items():
            if key != "step" and isinstance(value, int | float):
                curves[key].append((entry["step"], value))
    return [name for name, _ in runs], dict(curves)


def test_a_run_that_goes_on_is_one_run_in_every_tool_with_the_curves_of_its_metrics(tmp_path: Path):
    config = config_of(tmp_path, TOOLS)
    run = Path(config.run_dir)
    warmup = [{"stage": "warmup", "step": step, "main/loss": step / 2} for step in range(2)]
    assert not any("tried again" in text or "missing" in text for text in log(config, [*warmup, *rows(0, 3)]))
    first = curves_of(read_rows(run, config))
    RunPaths(run).metrics.unlink()  # it goes back to step 2, and takes it again
    log(config, [*warmup, *rows(0, 2), *rows(2, 5, plus=1.0)], resumed=True)
    now = curves_of(read_rows(run, config))
    assert now["main/reward_mean"] == [(0, 0.0), (1, 0.25), (2, 1.5), (3, 1.75), (4, 2.0)]
    once = now | {"main/reward_mean": [*first["main/reward_mean"], *now["main/reward_mean"][3:]]}

    assert in_tensorboard(run / "tensorboard") == now
    curves, steps = in_wandb(run / "wandb")
    assert curves == once and steps == list(range(len(read_rows(run, config))))
    assert len({file.name.rpartition("-")[2] for file in (run / "wandb").glob("offline-run-*")}) == 1
    [[status, name, param, curves]] = read(READ_MLFLOW, f"sqlite:///{tmp_path}/mlflow.db")
    assert (status, name, param) == ("FINISHED", "curves", "4") and as_tuples(curves) == once
    names, curves = in_trackio()
    assert len(names) == 1 and names[0].startswith("curves-") and curves == once


# ---- the start of a run


def test_a_run_without_a_key_for_wandb_does_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    config = config_of(tmp_path, ["wandb"])
    refused = pytest.raises(
        ValueError, match=r"log\.to: 'wandb' given: not logged in .*WANDB_API_KEY, or WANDB_MODE=off"
    )
    with refused, Loggers(config, Path(config.run_dir), print):
        pytest.fail("the run begins")
    with refused:
        check_loggers(config)
    assert not list(Path(config.run_dir).glob("loggers/*.json"))


def test_a_space_of_trackio_without_a_token_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/space")
    with pytest.raises(ValueError, match=r"log\.to: 'trackio' given: TRACKIO_SPACE_ID is set, but there is no token"):
        check_loggers(config_of(tmp_path, ["trackio"]))


# ---- loggers that misbehave

OWN = """
import os, sys, time
from mgrpo import Logger

class Blocks(Logger):
    def numbers(self, step, values):
        time.sleep(1000)

class Raises(Logger):
    def numbers(self, step, values):
        raise RuntimeError("no server")

class Exits(Logger):
    def numbers(self, step, values):
        sys.exit("I have enough")

class Dies(Logger):
    def numbers(self, step, values):
        os._exit(7)

class Refuses(Logger):
    def check(self):
        raise ValueError("no key in MY_KEY")

class Kills(Logger):
    def __init__(self):
        os._exit(0)

class Prints(Logger):
    def begin(self, run):
        print("hello from", run.name)
        return "on paper"
    def numbers(self, step, values):
        print(step, sorted(values))
    def finish(self, status):
        print(status)
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "own_loggers.py"
    file.write_text(OWN)
    return file


def test_a_logger_that_blocks_raises_exits_or_dies_ends_no_run(tmp_path: Path, own: Path):
    names = ("Blocks", "Raises", "Exits", "Dies", "Prints")
    config = config_of(tmp_path, [f"{own}:{name}" for name in names], patience=12.0)
    began = time.monotonic()
    said = "\n".join(log(config, list(rows(0, 3))))
    assert time.monotonic() - began < 300
    assert "logger Blocks did not end in 12 s and is ended; `mgrpo log" in said
    assert "logger Raises: RuntimeError: no server; the run goes on" in said
    assert "logger Exits: SystemExit: I have enough; the run goes on" in said
    for name in ("Raises", "Exits"):
        assert f"logger {name}: 5 rows are not logged yet" in said and said.count(f"logger {name}: ") == 2
    assert "logger Dies ended with status 7, the run goes on" in said
    assert "logger Prints: on paper" in said
    printed = (RunPaths(config.run_dir).loggers / "Prints.txt").read_text().splitlines()
    assert printed[0] == "hello from curves" and printed[-1] == "finished" and len(printed) == 7


def test_a_logger_that_cannot_begin_is_refused_before_the_run_does(tmp_path: Path, own: Path):
    for name, why in (
        ("Refuses", "no key in MY_KEY"),
        ("Kills", "its process ended with status 0"),
        ("Gone", "not defined"),
    ):
        config = config_of(tmp_path, [f"{own}:{name}"])
        with pytest.raises(ValueError, match=rf"log\.to: .*:{name}' given: .*{why}"):
            check_loggers(config)


def test_a_logger_outlives_a_launcher_that_was_killed_and_logs_what_is_left(tmp_path: Path, own: Path):
    config = config_of(tmp_path, [f"{own}:Prints"])
    (tmp_path / "config.json").write_text(dump_config(config))
    launcher = """
import os, sys, signal
from pathlib import Path
from mgrpo.engine.config.schema import read_dump
from mgrpo.engine.report.loggers.processes import Loggers
from mgrpo.engine.run.metrics import JsonLines
config = read_dump(Path(sys.argv[1]).read_text())
with Loggers(config, Path(config.run_dir), print) as loggers:
    loggers.begin()
    JsonLines(Path(config.run_dir) / "metrics.jsonl").append({"stage": "rl", "step": 0, "a": 1})
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", launcher, str(tmp_path / "config.json")], check=False, timeout=120)
    printed = RunPaths(config.run_dir).loggers / "Prints.txt"
    for _ in range(600):
        if printed.read_text().endswith("failed\n"):
            break
        time.sleep(0.1)
    assert printed.read_text().splitlines()[1:] == ["0 ['a']", "failed"]


# ---- TensorBoard


def board(folder: Path) -> TensorBoard:
    begun = TensorBoard()
    begun.begin(LoggedRun(id="a", project="p", name="n", tags=[], folder=folder, config={}))
    return begun


def test_a_new_file_of_tensorboard_counts_instead_of_those_before_also_with_a_clock_that_went_back(
    tmp_path: Path, monkeypatch
):
    now = time.time
    seconds = []
    for value, ahead in enumerate((86400.0, 86400.0, 0.0, -86400.0)):
        monkeypatch.setattr(time, "time", lambda ahead=ahead: now() + ahead)
        begun = board(tmp_path)
        begun.numbers(0, {"main/reward_mean": float(value)})
        begun.finish("finished")
        files = sorted((tmp_path / "tensorboard").iterdir())
        assert len(files) == min(value + 1, 2)
        seconds.append(int(files[-1].name.split(".")[3]))
        assert in_tensorboard(tmp_path / "tensorboard") == {"main/reward_mean": [(0, float(value))]}
    assert seconds == sorted(set(seconds))


def test_a_tensorboard_that_runs_forgets_what_it_had_read(tmp_path: Path):
    first = board(tmp_path)
    for step in range(4):
        first.numbers(step, {"main/reward_mean": 1.0})
    watching = EventAccumulator(str(tmp_path / "tensorboard"))
    watching.Reload()
    second = board(tmp_path)
    second.numbers(0, {"main/reward_mean": 2.0})
    watching.Reload()
    assert [(event.step, event.value) for event in watching.Scalars("main/reward_mean")] == [(0, 2.0)]
    first.finish("failed")
    second.finish("finished")


def test_tensorboard_shows_episodes_as_texts(tmp_path: Path):
    begun = board(tmp_path)
    begun.rollouts(
        3, [LoggedRollout(query=1, rollout=number, status="scored", reward=1.0, text="a\n<b>") for number in (0, 1)]
    )
    begun.finish("finished")
    shown = EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    [event] = shown.Tensors("rollouts")
    assert event.step == 3 and list(event.tensor_proto.string_val) == [b"    a\n    <b>"] * 2
