"""Test the run directory: one holder, no half-written file taken for a whole one, clear messages on a full disk."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import make_url

from mgrpo.engine.run import checksums
from mgrpo.engine.run import directory as run_module
from mgrpo.engine.run.directory import RunDirectory
from mgrpo.engine.run.metrics import read_metrics
from mgrpo.engine.store import Store
from mgrpo.engine.store.open import sqlite_url
from mgrpo.engine.system import files


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDirectory]:
    run = RunDirectory(tmp_path / "run", resume=False)
    yield run
    run.close()


def content(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "agents" / "main").mkdir(parents=True)
        (folder / "agents" / "main" / "model.bin").write_text(text)
        (folder / "state.json").write_text("{}")

    return write


def names(run: RunDirectory) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


# ---- the directory and its lock


def test_a_fresh_directory_then_refused_then_resumed(tmp_path):
    path = tmp_path / "deep" / "run?é%20"
    run = RunDirectory(path, resume=False)
    store = Store(sqlite_url(run.store), "run")
    store.close()
    assert (path / "store.db").is_file() and make_url(sqlite_url(run.store)).database == str(path / "store.db")
    assert run.trajectories.is_dir() and run.checkpoints.is_dir() and run.latest_checkpoint() is None
    run.close()
    RunDirectory(path, resume=False).close()  # nothing has begun: not a run yet
    run = RunDirectory(path, resume=False)
    run.write_config("steps = 3 # é\n")
    run.close()
    with pytest.raises(ValueError, match=r"run_dir: .*holds a run; pass --resume"):
        RunDirectory(path, resume=False)
    again = RunDirectory(path, resume=True)
    assert again.config.read_text() == "steps = 3 # é\n"
    again.close()


@pytest.mark.parametrize("holds", ["metrics", "checkpoint"])
def test_metrics_or_a_checkpoint_make_a_run(run, holds):
    if holds == "metrics":
        run.log_metrics({"stage": "rl", "step": 0})
    else:
        run.save_checkpoint("rl-00001", content("x"), keep=1)
    run.close()
    with pytest.raises(ValueError, match="holds a run"):
        RunDirectory(run.path, resume=False)


def test_a_file_is_no_run_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run_dir: expected a directory, .*/file is a file"):
        RunDirectory(tmp_path / "file", resume=False)


HOLD = """
import sys, time
from mgrpo.engine.run.directory import RunDirectory
run = RunDirectory(sys.argv[1], resume=True)
print("held", flush=True)
time.sleep(60)
"""


def test_two_processes_cannot_hold_one_run(tmp_path):
    path = tmp_path / "run"
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        for resume in (False, True):
            with pytest.raises(ValueError, match=f"{path} is in use by process {child.pid}$"):
                RunDirectory(path, resume)
    finally:
        child.kill()
        child.communicate(timeout=30)
    mine = RunDirectory(path, resume=True)  # a killed process holds nothing
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()}$"):
        RunDirectory(path, resume=True)
    mine.close()
    RunDirectory(path, resume=True).close()


# ---- metrics

values = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.floats(), max_size=2)
rows = st.dictionaries(st.text(max_size=5).filter(lambda key: key not in ("stage", "step")), values, max_size=4)


def expected(value: object) -> object:
    if isinstance(value, list):
        return [expected(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(["warmup", "rl"]), st.integers(0, 5), rows), max_size=8), st.data())
def test_rows_come_back_and_rewinding_keeps_exactly_those_before(logged, data):
    stage, step = data.draw(st.sampled_from(["warmup", "rl"])), data.draw(st.integers(0, 6))
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(folder)
        plain = [{"stage": s, "step": n} | row for s, n, row in logged]
        for row in plain:
            run.log_metrics(row)
        wanted = [{key: expected(value) for key, value in row.items()} for row in plain]
        assert read_metrics(run.metrics) == wanted
        order = {"warmup": 0, "rl": 1}
        kept = [row for row in wanted if (order[str(row["stage"])], row["step"]) < (order[stage], step)]
        run.rewind_metrics(step, stage)
        assert read_metrics(run.metrics) == kept
        run.log_metrics({"stage": stage, "step": step, "again": 1})
        assert read_metrics(run.metrics) == [*kept, {"stage": stage, "step": step, "again": 1}]
        run.close()


def test_an_evaluation_that_is_not_made_again_is_kept(run):
    evaluation = {"stage": "rl", "step": 3, "eval/held_out_accuracy": 0.5}
    for row in ({"stage": "rl", "step": 2, "a": 1}, evaluation, {"stage": "rl", "step": 3, "a": 2}):
        run.log_metrics(row)
    run.rewind_metrics(3, "rl", keep_evaluation=True)
    assert read_metrics(run.metrics) == [{"stage": "rl", "step": 2, "a": 1}, evaluation]
    run.rewind_metrics(3, "rl")
    assert read_metrics(run.metrics) == [{"stage": "rl", "step": 2, "a": 1}]


def test_scalar_arrays_become_numbers_and_nan_null(run):
    row = {
        "a": np.float32(0.5),
        "b": torch.tensor(3),
        "c": np.float32("nan"),
        "d": np.array(-np.inf),
        "e": {"f": (1.0,)},
    }
    run.log_metrics({"stage": "rl", "step": 1} | row)
    line = run.metrics.read_text()
    assert line.endswith("\n") and "NaN" not in line and "Infinity" not in line
    assert json.loads(line) == {"stage": "rl", "step": 1, "a": 0.5, "b": 3, "c": None, "d": None, "e": {"f": [1.0]}}


@pytest.mark.parametrize(
    "row", [{"step": 1}, {"stage": "rl"}, {"stage": "eval", "step": 1}, {"stage": "rl", "step": "1"}]
)
def test_a_row_without_stage_and_step_is_our_own_bug(run, row):
    with pytest.raises(AssertionError):
        run.log_metrics(row)
    assert run.metrics.read_bytes() == b""


def test_a_torn_last_line_is_no_row_and_is_not_joined_to_the_next(run):
    run.log_metrics({"stage": "rl", "step": 0, "é": "\n"})
    run.close()
    whole = run.metrics.read_bytes()
    for torn in (b'{"stage": "rl", "st', b'{"stage": "rl", "step": 1}', b"\0\xff"):
        run.metrics.write_bytes(whole + torn)
        assert [row["step"] for row in read_metrics(run.metrics)] == [0]
        again = RunDirectory(run.path, resume=True)
        again.log_metrics({"stage": "rl", "step": 1})
        again.close()
        assert [row["step"] for row in read_metrics(run.metrics)] == [0, 1]


@pytest.mark.parametrize(
    "damaged", [b'{"sta', b"\0\0\0", b"[1]", b'{"stage": "rl"}', b'{"stage": "x", "step": 1}', b"[" * 9999]
)
def test_a_damaged_line_in_the_middle_is_named_and_left_out(run, caplog, damaged):
    whole = [b'{"stage": "rl", "step": 0}\n', b'{"stage": "rl", "step": 1}\n']
    run.metrics.write_bytes(whole[0] + damaged + b"\n" + whole[1])
    assert [row["step"] for row in read_metrics(run.metrics)] == [0, 1]
    assert "metrics.jsonl, line 2 is left out: not a row of metrics" in caplog.text
    run.rewind_metrics(1, "rl")
    assert run.metrics.read_bytes() == whole[0]
    assert read_metrics(run.path / "none.jsonl") == []


def test_no_space_for_a_row_leaves_whole_lines(run):
    run.log_metrics({"stage": "rl", "step": 0})

    class Full:
        name = str(run.metrics)

        def __init__(self, file):
            self.file, self.room = file, 10

        def write(self, data):
            if self.room == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            data, self.room = data[: self.room], 0
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

    rows = run._metrics
    real, rows._file = rows._file, Full(rows._file)
    with pytest.raises(OSError, match=r"No space left.*metrics\.jsonl"):
        run.log_metrics({"stage": "rl", "step": 1})
    rows._file = real
    run.log_metrics({"stage": "rl", "step": 2})
    assert [row["step"] for row in read_metrics(run.metrics)] == [0, 2]


# ---- checkpoints


def test_a_checkpoint_is_whole_verified_and_the_latest(run):
    saved = run.save_checkpoint("rl-00002", content("abc"), keep=3)
    assert saved == run.checkpoints / "rl-00002" == run.latest_checkpoint()
    assert RunDirectory.open_checkpoint(saved) == saved
    manifest = json.loads((saved / "manifest.json").read_text())
    assert manifest["files"] == {"agents/main/model.bin": 3, "state.json": 2}
    assert manifest["sha256"].keys() == manifest["files"].keys()
    assert names(run) == ["rl-00002"]


def test_only_the_last_are_kept_in_the_order_of_stages_and_steps(run):
    for name in ("warmup-00100", "warmup-99999", "rl-00009", "rl-00010", "rl-100000"):
        run.save_checkpoint(name, content(name), keep=3)
        assert run.latest_checkpoint() == run.checkpoints / name
    assert names(run) == ["rl-00009", "rl-00010", "rl-100000"]
    (run.checkpoints / "notes.txt").write_text("the user's")
    run.save_checkpoint("rl-00009", content("anew"), keep=3)  # rewound: the later checkpoints are deleted
    assert names(run) == ["notes.txt", "rl-00009"]
    assert (run.checkpoints / "rl-00009/agents/main/model.bin").read_text() == "anew"


@pytest.mark.parametrize("name", ["", "rl-", "rl-1/../../x", "RL-00001", "eval-00001", "../rl-00001", "rl-00001\n"])
def test_other_names_are_refused(run, name):
    with pytest.raises(ValueError, match="checkpoint: expected a name of warmup or rl"):
        run.save_checkpoint(name, content("x"), keep=1)
    with pytest.raises(ValueError, match="keep: expected at least 1"):
        run.save_checkpoint("rl-00001", content("x"), keep=0)
    assert names(run) == []


def test_changed_contents_are_refused(run):
    saved = run.save_checkpoint("rl-00001", content("abcdef"), keep=1)
    (saved / "agents/main/model.bin").write_text("abcdeg")
    with pytest.raises(ValueError, match=r"rl-00001: agents/main/model\.bin is damaged: expected SHA-256 [0-9a-f]{64}"):
        RunDirectory.open_checkpoint(saved)


def test_damage_is_named_with_both_sizes(run):
    saved = run.save_checkpoint("rl-00001", content("abcdef"), keep=1)
    model = saved / "agents/main/model.bin"
    model.write_text("abc")
    with pytest.raises(ValueError, match=r"rl-00001: expected agents/main/model\.bin to have 6 bytes, it has 3"):
        RunDirectory.open_checkpoint(saved)
    model.unlink()
    with pytest.raises(ValueError, match=r"model\.bin to have 6 bytes, it is missing"):
        RunDirectory.open_checkpoint(saved)
    model.write_text("abcdef")
    RunDirectory.open_checkpoint(saved)
    for text in ("", '{"files"', "{}", "[]", '{"files": 3}', '{"files": {"x": "1"}}'):
        (saved / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=rf"rl-00001: manifest\.json is damaged \({len(text)} bytes\)"):
            RunDirectory.open_checkpoint(saved)
    (saved / "manifest.json").unlink()
    for path in (saved, saved / "state.json", saved / "nothing"):
        with pytest.raises(ValueError, match=r"manifest\.json is missing"):
            RunDirectory.open_checkpoint(path)


def test_everything_is_on_the_disk_before_the_rename(run, monkeypatch):
    events: list[str] = []
    fsync, rename = run_module.fsync, Path.rename

    def spy_fsync(path: Path) -> None:
        events.append(path.name)
        fsync(path)

    def spy_rename(path: Path, to: Path) -> Path:
        events.append("rename")
        return rename(path, to)

    monkeypatch.setattr(run_module, "fsync", spy_fsync)
    monkeypatch.setattr(checksums, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "rename", spy_rename)
    run.save_checkpoint("rl-00001", content("x"), keep=1)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert re.fullmatch(r"\.tmp-[0-9a-f]{8}-rl-00001", min(before))
    assert sorted(before)[1:] == ["agents", "main", "manifest.json", "model.bin", "state.json"]
    assert after == ["checkpoints"]


def failing(error: BaseException) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.bin").write_text("half")
        raise error

    return write


@pytest.mark.parametrize("kept", [True, False])
def test_no_space_names_the_checkpoint_and_keeps_the_last_good_one(run, kept):
    if kept:
        run.save_checkpoint("rl-00001", content("good"), keep=1)
    with pytest.raises(
        OSError, match=r"checkpoint rl-00002 could not be written.*No space left.*4 bytes.*free"
    ) as raised:
        run.save_checkpoint("rl-00002", failing(OSError(errno.ENOSPC, "No space left on device")), keep=1)
    assert raised.value.errno == errno.ENOSPC and ("rl-00001" in str(raised.value)) == kept
    assert names(run) == ["rl-00001"] * kept
    run.save_checkpoint("rl-00002", content("room again"), keep=1)
    assert names(run) == ["rl-00002"]


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), KeyError("x"), KeyboardInterrupt()])
def test_other_errors_pass_through_and_leave_nothing(run, error):
    run.save_checkpoint("rl-00001", content("good"), keep=1)
    with pytest.raises(type(error)) as raised:
        run.save_checkpoint("rl-00001", failing(error), keep=1)  # the same name: the old one stays
    assert raised.value is error and names(run) == ["rl-00001"]
    assert (run.checkpoints / "rl-00001/agents/main/model.bin").read_text() == "good"


FULL = """
import resource, sys
from cases import checkpoint_writers
from mgrpo.engine.run.directory import RunDirectory
run = RunDirectory(sys.argv[1], resume=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # Python ignores SIGXFSZ: a write fails with EFBIG
for writer in (checkpoint_writers.write_torch, checkpoint_writers.write_safetensors, checkpoint_writers.write_plain):
    try:
        run.save_checkpoint("rl-00002", writer, keep=1)
    except OSError as error:
        print(writer.__name__, error)
"""


def test_a_full_disk_for_real_however_the_writer_says_it(run):
    """Errors of torch and safetensors for a full disk are translated."""
    run.save_checkpoint("rl-00001", content("good"), keep=1)
    run.close()
    command = [sys.executable, "-c", FULL, str(run.path)]
    child = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    lines = child.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["write_torch", "write_safetensors", "write_plain"]
    assert all("checkpoint rl-00002 could not be written" in line and "rl-00001 (" in line for line in lines)
    assert names(run) == ["rl-00001"]
    RunDirectory.open_checkpoint(run.checkpoints / "rl-00001")


ROWS = """
import resource, sys
from mgrpo.engine.run.directory import RunDirectory
run = RunDirectory(sys.argv[1], resume=True)
row = lambda step: {"stage": "rl", "step": step, "main/reward": float(step), "text": "x" * 5000}
room = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
run.log_metrics(row(0))
for step in range(1, 9):
    for size in (0, run.metrics.stat().st_size + 600 * step):
        room(size)
        try:
            run.log_metrics(row(step))
        except OSError as error:
            print(step, error)
    room(resource.RLIM_INFINITY)
    run.log_metrics(row(step))
"""


def test_rows_are_logged_again_when_there_is_room_and_stand_there_once(run):
    """The file is torn at many places."""
    run.close()
    child = subprocess.run([sys.executable, "-c", ROWS, str(run.path)], check=True, capture_output=True, text=True)
    failed = [line.split()[0] for line in child.stdout.splitlines() if "cannot append metrics" in line]
    assert failed == [str(step) for step in range(1, 9) for _ in range(2)]
    assert [row["step"] for row in read_metrics(run.metrics)] == list(range(9))


def test_what_a_file_system_says_only_when_it_is_forced_is_no_row(run, monkeypatch):
    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run.log_metrics({"stage": "rl", "step": 0})
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "fsync", full)
        run.log_metrics({"stage": "rl", "step": 1})
    run.log_metrics({"stage": "rl", "step": 1})
    assert [row["step"] for row in read_metrics(run.metrics)] == [0, 1]


def test_a_config_that_cannot_be_written_leaves_the_old(run, monkeypatch):
    run.write_config("old")

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.*config\.json"):
        run.write_config("new")
    assert run.config.read_text() == "old" and not list(run.path.glob(".tmp-*"))


ENDLESS = """
import sys
from mgrpo.engine.run.directory import RunDirectory
run = RunDirectory(sys.argv[1], resume=True)
def write(folder):
    (folder / "sub").mkdir()
    for n in range(20):
        (folder / "sub" / str(n)).write_bytes(b"x" * 50_000)
for step in range(100000):
    run.save_checkpoint(f"rl-{step:05d}", write, keep=2)
    print(step, flush=True)
"""


@pytest.mark.parametrize("announced", [1, 3, 6])
def test_kill_9_leaves_a_good_latest_checkpoint(tmp_path, announced):
    child = subprocess.Popen([sys.executable, "-c", ENDLESS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    lines = [child.stdout.readline() for _ in range(announced)]
    child.send_signal(signal.SIGKILL)
    lines += [line for line in child.stdout if line.endswith("\n")]
    assert child.wait(30) == -signal.SIGKILL
    child.stdout.close()
    run = RunDirectory(tmp_path, resume=True)
    latest = run.latest_checkpoint()
    assert latest is not None and int(latest.name[3:]) >= int(lines[-1])
    for name in names(run):  # no .tmp- is left, and everything else is whole
        assert len(list(run.open_checkpoint(run.checkpoints / name).rglob("*"))) == 22
    run.close()


# ---- a process that another one has succeeded


class Succeeded(RuntimeError):
    """Another process acts here by now."""


def test_nothing_is_replaced_or_deleted_without_leave(tmp_path: Path):
    with closing(RunDirectory(tmp_path)) as run:
        for step in (1, 2, 3):
            run.save_checkpoint(f"rl-{step:05d}", content(f"{step}"), keep=2)
        before = names(run)

        def refused() -> None:
            raise Succeeded

        for name in ("rl-00002", "rl-00003", "rl-00009"):
            with pytest.raises(Succeeded):
                run.save_checkpoint(name, content("stale"), 1, refused)
            assert names(run) == before
        asked = []
        run.save_checkpoint("rl-00004", content("4"), 2, lambda: asked.append(names(run)))
        assert [len(found) for found in asked] == [3, 3]  # before the rename and before the pruning
        assert "rl-00004" not in asked[0] and "rl-00004" in asked[1]


def test_a_shared_directory_keeps_what_another_process_writes(tmp_path: Path):
    unfinished = tmp_path / "checkpoints" / ".tmp-abcd-rl-00001"
    unfinished.mkdir(parents=True)
    with closing(RunDirectory(tmp_path, resume=True, shared=True)) as run:
        run.save_checkpoint("rl-00001", content("x"), keep=1)
        assert unfinished.is_dir()
        run.clear_aside()
        assert not unfinished.exists() and names(run) == ["rl-00001"]


def test_a_damaged_checkpoint_says_how_to_go_back(tmp_path: Path):
    with closing(RunDirectory(tmp_path)) as run:
        run.save_checkpoint("warmup-00002", content("0"), keep=3)
        run.save_checkpoint("rl-00001", content("1"), keep=3)
        for name, before in (("rl-00001", "warmup-00002"), ("warmup-00002", None)):
            path = run.checkpoints / name
            (path / "state.json").write_bytes(b"torn")
            with pytest.raises(ValueError, match=name) as damaged:
                run.open_checkpoint(path)
            how = f"; delete it to go back to {before}: what came after is trained again"
            assert str(damaged.value).endswith(how) == (before is not None)
