"""Know where the files of a run lie, and write them so that the run survives being killed.

A run directory of topology `colocated`, held by one process at a time:

    config.json      the configuration             metrics.jsonl    a row per step, of warm-up and rl alike
    run.json         the run's id                  tasks.json       the order of its tasks (run/identity)
    store.db         the store (engine/store)      tensorboard/     the same numbers, for TensorBoard
    trajectories/    tokens (run/trajectories)     checkpoints/     <stage>-<step>/, each with a manifest of its files
    curves.png       the plot of the report        log.txt, lock    the log; held while the process lives
    loggers/         what each logger was sent, and what it printed (report/loggers)

In the other topologies it holds all of this but metrics.jsonl, checkpoints/ and log.txt, and also:

    agents/<name>/   of the agent's trainer: metrics.jsonl, checkpoints/, lock as above; waiting.txt says what it waits
                     for, if it waits for something unusual
    workers/<name>/  of a rollout worker: metrics.jsonl, lock
    logs/            what each process of a local run prints
    meeting/         where the ranks of a local run's trainers find each other, while it runs
    trajectories/, weights/  as above, and the published weights (run/weights), unless store.files names another place

Files that must be whole (config, checkpoints, rewound metrics) are written aside, forced to disk and then renamed.
A checkpoint or rewind at (stage, step) stands for everything before that step: the step itself comes next.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

from mgrpo.engine.config.schema import Config
from mgrpo.engine.run.checksums import seal, verify
from mgrpo.engine.run.metrics import STAGES, JsonLines, Row, is_evaluation, read_metrics
from mgrpo.engine.system.files import fsync, make_private, replace

_NAME = re.compile(rf"({'|'.join(STAGES)})-(\d+)")  # of a checkpoint
_WORKER = re.compile(r"\w[\w.-]{0,99}")  # the name of a worker, which becomes a part of file names
_TORCH_WRITE_ERRORS = ("PytorchStreamWriter", "inline_container", "iostream")  # how torch.save reports a full disk


class RunPaths:
    """Name the files of a run directory, or of an agent's or worker's directory in it. Opens and creates nothing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config, self.metrics = self.path / "config.json", self.path / "metrics.jsonl"
        self.identity, self.tasks = self.path / "run.json", self.path / "tasks.json"
        self.curves, self.log, self.lock = self.path / "curves.png", self.path / "log.txt", self.path / "lock"
        self.store, self.logs = self.path / "store.db", self.path / "logs"
        self.meeting = self.path / "meeting"
        self.trajectories, self.loggers = self.path / "trajectories", self.path / "loggers"
        self.checkpoints, self.waiting = self.path / "checkpoints", self.path / "waiting.txt"
        self.agents, self.workers = self.path / "agents", self.path / "workers"

    def agent(self, name: str) -> RunPaths:
        """Return the files of an agent's trainer, for the topologies in which it is a separate process."""
        return RunPaths(self.agents / name)

    def worker(self, name: str) -> RunPaths:
        """Return the files of a rollout worker. Raises ValueError for a name that is no name of a file."""
        if not _WORKER.fullmatch(name):
            raise ValueError(
                f"--name: {name!r} given: expected at most 100 letters, digits, '_', '-' and '.', not '-' or '.' first"
            )
        return RunPaths(self.workers / name)

    def worker_metrics(self) -> list[Path]:
        """Return the metrics files of all rollout workers that have begun, by name."""
        return sorted(self.workers.glob("*/metrics.jsonl"))


def root_of(config: Config, kind: Literal["weights", "trajectories"], run_dir: str | Path = "") -> str:
    """Return the folder of the run's published weights or trajectories: a local path or fsspec URL.

    run_dir: where the run directory is now, if it was moved.
    """
    return f"{config.store.files or run_dir or config.run_dir}/{kind}"


class RunDirectory(RunPaths):
    """Open the run directory `path` for this process; released by `close` or when the process ends.

    A new directory is for this user alone: nothing that user code writes, or an option holds, is shown to others.

    With `resume`, go on with the run that is there, or begin a new one if there is none. Raises ValueError if another
    process holds the directory, or if it holds a run and `resume` is not set.

    shared: processes of other machines may reach the directory too, which its lock may not: what they left unfinished
    stays until `clear_aside` is called.
    """

    def __init__(self, path: str | Path, resume: bool = False, *, shared: bool = False) -> None:
        super().__init__(Path(path).absolute())
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run_dir: expected a directory, {self.path} is a file")
        for folder in (self.trajectories, self.checkpoints):
            make_private(folder)
        self._lock = locked(self.lock)
        if not resume and self._holds_run():
            self._lock.close()
            raise ValueError(f"run_dir: {self.path} holds a run; pass --resume to go on, or choose another run_dir")
        self._aside = f".tmp-{secrets.token_hex(4)}-"  # of this process alone
        if not shared:
            self.clear_aside()
        self._metrics = JsonLines(self.metrics)

    def close(self) -> None:
        """Close the files, and release the directory to other processes."""
        self._metrics.close()
        self._lock.close()

    def write_config(self, text: str) -> None:
        """Write config.json as a whole. Raises OSError if it cannot be written; the old one then stays."""
        replace(self.config, text.encode())

    # ---- metrics

    def log_metrics(self, row: Row) -> None:
        """Append one row: "stage" (of STAGES), "step" (int) and anything that JSON or a scalar array can express.

        NaN and infinities become null. Raises OSError if the disk is full: then the file is as it was, and the row may
        be logged again.
        """
        assert row.get("stage") in STAGES and isinstance(row.get("step"), int), row
        self._metrics.append(row)

    def rewind_metrics(self, step: int, stage: str, keep_evaluation: bool = False) -> None:
        """Drop all rows from (stage, step) on, because that step is about to run again.

        keep_evaluation: keep the evaluation at (stage, step), which comes before the step, as it is not made again.
        """
        cut, kept = (STAGES.index(stage), step), []
        for row in read_metrics(self.metrics):
            place = (STAGES.index(row["stage"]), row["step"])
            if place < cut or (keep_evaluation and place == cut and is_evaluation(row)):
                kept.append(row)
        replace(self.metrics, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._metrics.close()
        self._metrics = JsonLines(self.metrics)

    # ---- checkpoints

    def save_checkpoint(
        self,
        name: str,
        write: Callable[[Path], None],
        keep: int,
        allowed: Callable[[], None] = lambda: None,
        spared: Collection[str] = (),
    ) -> Path:
        """Write checkpoint `name` ("rl-00012") whole or not at all; keep only it, the keep - 1 before it and `spared`.

        write: fills the directory that it is given. allowed: called before anything that is there is replaced or
        deleted; it raises if another process acts here by now. Checkpoints after this one are of a rewound run, and
        are deleted. Raises ValueError for another kind of name or keep < 1; OSError naming the checkpoint if it cannot
        be written, as when the disk is full: then all earlier checkpoints stay.
        """
        _order(name)
        if keep < 1:
            raise ValueError(f"keep: expected at least 1 checkpoint, got {keep}")
        aside, final = self.checkpoints / f"{self._aside}{name}", self.checkpoints / name
        try:
            aside.mkdir()
            write(aside)
            seal(aside)
            allowed()
            self._retire(final)
            aside.rename(final)
            fsync(self.checkpoints)
            allowed()
            self._prune(name, keep, spared)
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, RuntimeError) and not any(word in str(error) for word in _TORCH_WRITE_ERRORS):
                raise
            raise self._unwritten(name, aside, error) from error
        finally:
            self.clear_aside(self._aside)
        return final

    def latest_checkpoint(self) -> Path | None:
        """Return the latest checkpoint by stage and step, not yet verified (see `open_checkpoint`), or None."""
        return latest_of(self.checkpoints)

    @staticmethod
    def open_checkpoint(path: Path) -> Path:
        """Verify the files of a checkpoint against its manifest, and return its path.

        Raises ValueError naming a file that is missing, or has another size or other contents than were saved. The
        contents of a checkpoint of version 0.1.0 are not known, only the sizes. The error says how to go back to the
        checkpoint before, if there is one.
        """
        try:
            verify(path)
        except ValueError as error:
            before = latest_of(path.parent, before=path.name) if _NAME.fullmatch(path.name) else None
            how = f"; delete it to go back to {before.name}: what came after is trained again" if before else ""
            raise ValueError(f"{error}{how}") from error
        return path

    def _holds_run(self) -> bool:
        return self.config.exists() or self.latest_checkpoint() is not None or _size(self.metrics) > 0

    def _prune(self, name: str, keep: int, spared: Collection[str]) -> None:
        saved = checkpoints_in(self.checkpoints)
        last = [path.name for path in saved].index(name)
        for path in saved[: max(last + 1 - keep, 0)] + saved[last + 1 :]:
            if path.name not in spared:
                self._retire(path)

    def _retire(self, path: Path) -> None:
        """Rename a checkpoint, to be deleted later, so that a part of it is never taken for a whole one."""
        if path.exists():
            path.rename(path.with_name(f"{self._aside}old-{path.name}"))

    def clear_aside(self, prefix: str = ".tmp-") -> None:
        """Delete what was retired, or left by a write that failed or was killed."""
        for path in self.checkpoints.glob(f"{prefix}*"):
            shutil.rmtree(path, ignore_errors=True)

    def _unwritten(self, name: str, aside: Path, error: Exception) -> OSError:
        last = self.latest_checkpoint()
        stays = f"; {last.name} ({_size(last)} bytes) stays" if last else ""
        free = shutil.disk_usage(self.path).free
        return OSError(
            getattr(error, "errno", None) or errno.EIO,
            f"checkpoint {name} could not be written: {error} (after {_size(aside)} bytes, {free} free{stays})",
        )


def checkpoints_in(checkpoints: Path) -> list[Path]:
    """Return the checkpoints in a folder, by stage and step. A folder that is not there has none."""
    return sorted(_saved(checkpoints), key=lambda path: _order(path.name))


def stage_and_step(checkpoint: Path) -> tuple[str, int]:
    """Return the stage and the step that come next after a checkpoint, by its name."""
    stage, step = _order(checkpoint.name)
    return STAGES[stage], step


def latest_of(checkpoints: Path, before: str = "") -> Path | None:
    """Return the latest of the checkpoints in a folder, by stage and step, or None. before: only of those before it."""
    found = [path for path in checkpoints_in(checkpoints) if not before or _order(path.name) < _order(before)]
    return found[-1] if found else None


def _saved(checkpoints: Path) -> list[Path]:
    return [path for path in checkpoints.glob("*-*") if _NAME.fullmatch(path.name)]


def locked(path: Path) -> io.FileIO:
    """Hold the directory of a lock file until the file is closed. Raises ValueError if another process holds it."""
    file = io.FileIO(path, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().decode().strip() or "unknown"
        file.close()
        raise ValueError(f"run_dir: {path.parent} is in use by process {holder}") from None
    with suppress(OSError):  # if the disk is full, the process id is missing, but the lock is held anyway
        file.truncate(0)
        file.write(f"{os.getpid()}\n".encode())
    return file


def _order(name: str) -> tuple[int, int]:
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"checkpoint: expected a name of {' or '.join(STAGES)}, '-' and a step, got {name!r}")
    return STAGES.index(match[1]), int(match[2])


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())
