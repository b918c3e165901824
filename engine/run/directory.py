"""The run directory: one training run's files, held by one process at a time, and made to survive being killed.

    config.json      as run              metrics.jsonl    a row per step, warm-up and RL alike
    store.db         engine/store/groups.py     tensorboard/     the same rows, for TensorBoard
    trajectories/    engine/trajectories checkpoints/     <stage>-<step>/, each with a manifest.json of its files' sizes
    curves.png       the report's plot   log.txt, lock    the console's text; held while a process lives

What must be whole (config, checkpoints, rewound metrics) is written aside, forced to disk and renamed to its place.
A checkpoint or rewind at (stage, step) stands for everything before that step: the step itself comes next.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa
from safetensors import SafetensorError

from mgrpo.engine.run.tensorboard import STAGES, Boards
from mgrpo.engine.run.trajectories import fsync

_NAME = re.compile(rf"({'|'.join(STAGES)})-(\d+)")  # of a checkpoint
_TORCH_WRITE_ERRORS = ("PytorchStreamWriter", "inline_container", "iostream")  # torch.save reports a full disk so


class RunDirectory:
    """Opens the run directory `path` for this process, creating it; released by `close` or when the process ends.

    With `resume` a run that is there goes on (a new one is begun where there is none). Raises ValueError when another
    process holds it, or when it holds a run and `resume` is not set.
    """

    def __init__(self, path: str | Path, resume: bool = False) -> None:
        self.path = Path(path).absolute()
        self.config, self.metrics = self.path / "config.json", self.path / "metrics.jsonl"
        self.curves, self.log = self.path / "curves.png", self.path / "log.txt"
        self.trajectories, self.tensorboard = self.path / "trajectories", self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.store_url = sa.URL.create("sqlite", database=str(self.path / "store.db")).render_as_string()
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run_dir: expected a directory, {self.path} is a file")
        for folder in (self.trajectories, self.checkpoints):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = locked(self.path / "lock")
        if not resume and self._holds_run():
            self._lock.close()
            raise ValueError(f"run_dir: {self.path} holds a run; pass --resume to go on, or choose another run_dir")
        self._clear_aside()
        self._metrics = JsonLines(self.metrics)
        self._boards = Boards(self.tensorboard)

    def close(self) -> None:
        self._boards.close()
        self._metrics.close()
        self._lock.close()

    def write_config(self, text: str) -> None:
        _replace(self.config, text.encode())

    # ---- metrics

    def log_metrics(self, row: dict[str, Any]) -> None:
        """Appends one row: "stage" (of STAGES), "step" (int) and anything JSON or a scalar array can say.

        NaN and infinities become null. Its numbers go to TensorBoard under their keys, "warmup/" before the warm-up's.
        Raises OSError when there is no room: then the file is as it was, and the row may be logged again.
        """
        assert row.get("stage") in STAGES and isinstance(row.get("step"), int), row
        self._boards.show(_plain(row))  # first: to show a number twice does no harm
        self._metrics.append(row)

    def rewind_metrics(self, step: int, stage: str) -> None:
        """Drops every row from (stage, step) on, here and in TensorBoard: that step is about to run again."""
        cut = (STAGES.index(stage), step)
        kept = [row for row in read_metrics(self.metrics) if (STAGES.index(row["stage"]), row["step"]) < cut]
        _replace(self.metrics, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._metrics.close()
        self._metrics = JsonLines(self.metrics)
        self._boards.rewind(step, stage)

    # ---- checkpoints

    def save_checkpoint(self, name: str, write: Callable[[Path], None], keep: int) -> Path:
        """Writes checkpoint `name` ("rl-00012") whole or not at all; then only it and the keep - 1 before it stay.

        `write` fills the directory it is given. Checkpoints after this one belong to a run that was rewound, and go.
        Raises ValueError for another kind of name or keep < 1; OSError that names the checkpoint when it cannot be
        written, as when the disk is full: then all earlier checkpoints stay.
        """
        _order(name)
        if keep < 1:
            raise ValueError(f"keep: expected at least 1 checkpoint, got {keep}")
        aside, final = self.checkpoints / f".tmp-{name}", self.checkpoints / name
        try:
            aside.mkdir()
            write(aside)
            _seal(aside)
            self._retire(final)
            aside.rename(final)
            fsync(self.checkpoints)
            self._prune(name, keep)
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, RuntimeError) and not any(word in str(error) for word in _TORCH_WRITE_ERRORS):
                raise
            raise self._unwritten(name, aside, error) from error
        finally:
            self._clear_aside()
        return final

    def latest_checkpoint(self) -> Path | None:
        """The furthest checkpoint, by stage and step; None when there is none. Not verified: see `open_checkpoint`."""
        return latest_of(self.checkpoints)

    @staticmethod
    def open_checkpoint(path: Path) -> Path:
        """The path, its files verified against the manifest.

        Raises ValueError that names a file which is missing or of another size, and the size expected.
        """
        for name, expected in _manifest(path).items():
            file = path / name
            size = file.stat().st_size if file.is_file() else None
            if size != expected:
                found = "it is missing" if size is None else f"it has {size}"
                raise ValueError(f"checkpoint {path}: expected {name} to have {expected} bytes, {found}")
        return path

    def _holds_run(self) -> bool:
        return self.config.exists() or self.latest_checkpoint() is not None or _size(self.metrics) > 0

    def _prune(self, name: str, keep: int) -> None:
        saved = sorted(_saved(self.checkpoints), key=lambda path: _order(path.name))
        last = [path.name for path in saved].index(name)
        for path in saved[: max(last + 1 - keep, 0)] + saved[last + 1 :]:
            self._retire(path)

    def _retire(self, path: Path) -> None:
        """Renamed before it is deleted, so that half of a checkpoint is never taken for one."""
        if path.exists():
            path.rename(path.with_name(f".tmp-old-{path.name}"))

    def _clear_aside(self) -> None:
        for path in self.checkpoints.glob(".tmp-*"):  # retired, or of a write that failed or was killed
            shutil.rmtree(path, ignore_errors=True)

    def _unwritten(self, name: str, aside: Path, error: Exception) -> OSError:
        last = self.latest_checkpoint()
        stays = f"; {last.name} ({_size(last)} bytes) stays" if last else ""
        free = shutil.disk_usage(self.path).free
        return OSError(
            getattr(error, "errno", None) or errno.EIO,
            f"checkpoint {name} could not be written: {error} (after {_size(aside)} bytes, {free} free{stays})",
        )


def latest_of(checkpoints: Path) -> Path | None:
    """The furthest of the checkpoints in a folder, by stage and step; None when there is none."""
    return max(_saved(checkpoints), key=lambda path: _order(path.name), default=None)


def _saved(checkpoints: Path) -> list[Path]:
    return [path for path in checkpoints.glob("*-*") if _NAME.fullmatch(path.name)]


class JsonLines:
    """A file of JSON lines, opened for appending; what a killed process left of a last line is cut off."""

    def __init__(self, path: Path) -> None:
        self._file = _open_lines(path)

    def append(self, row: dict[str, Any]) -> dict[str, Any]:
        """Appends the row, whole or not at all, and returns it as it was written: NaN and infinities are null there."""
        plain = {key: _plain(value) for key, value in row.items()}
        _append(self._file, (json.dumps(plain, allow_nan=False) + "\n").encode())
        return plain

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, none where there is no file; a torn last line is no row.

    Raises ValueError that names a line that is not JSON.
    """
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not a row of metrics: {error}") from error
    return rows


def locked(path: Path) -> io.FileIO:
    """Holds the directory that the file is in until the file is closed. Raises ValueError when another process does."""
    file = io.FileIO(path, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().decode().strip() or "unknown"
        file.close()
        raise ValueError(f"run_dir: {path.parent} is in use by process {holder}") from None
    with suppress(OSError):  # on a full disk the name is missing, and the lock is held all the same
        file.truncate(0)
        file.write(f"{os.getpid()}\n".encode())
    return file


def _open_lines(path: Path) -> io.FileIO:
    """For appending lines; what a killed process left of a last line is cut off, lest the next be joined to it."""
    file = io.FileIO(path, "a+")
    file.seek(0)
    text = file.readall()
    file.truncate(text.rfind(b"\n") + 1)
    return file


def _append(file: io.FileIO, line: bytes) -> None:
    size = os.fstat(file.fileno()).st_size
    try:
        while line:
            line = line[file.write(line) :]
        os.fsync(file)  # a network's file system may say only now that it has no room
    except OSError as error:
        file.truncate(size)
        raise OSError(error.errno, f"cannot append metrics: {error.strerror}", str(file.name)) from error


def _plain(value: Any) -> Any:
    """As JSON can say it: numpy's and torch's scalars as numbers, what is not finite as null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _order(name: str) -> tuple[int, int]:
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"checkpoint: expected a name of {' or '.join(STAGES)}, '-' and a step, got {name!r}")
    return STAGES.index(match[1]), int(match[2])


def _manifest(path: Path) -> dict[str, int]:
    """Of every file of a checkpoint its size in bytes, by its path within."""
    file = path / "manifest.json"
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, dict[str, int]])["files"]
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"checkpoint {path}: expected a whole checkpoint, manifest.json is missing") from None
    except (msgspec.DecodeError, KeyError) as error:
        raise ValueError(
            f"checkpoint {path}: manifest.json is damaged ({file.stat().st_size} bytes): {error}"
        ) from error


def _seal(path: Path) -> None:
    """Adds the manifest and forces every file and directory to the disk."""
    manifest = path / "manifest.json"
    assert not manifest.exists()
    files = {str(file.relative_to(path)): file.stat().st_size for file in sorted(path.rglob("*")) if file.is_file()}
    manifest.write_text(json.dumps({"files": files}, indent=1))
    for entry in [*path.rglob("*"), path]:
        fsync(entry)


def _replace(path: Path, data: bytes) -> None:
    """The file's whole content at once: a killed process leaves the old or the new."""
    aside = path.with_name(f".tmp-{path.name}")
    try:
        aside.write_bytes(data)
        fsync(aside)
        aside.rename(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error
    fsync(path.parent)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())
