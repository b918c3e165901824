"""Give a run an identity: an id that is drawn once and kept in its directory, and the order of its tasks.

The store holds the id too, so that two runs are never taken for one because their directories have the same name. The
order of the task ids lets every process ask the same task in the same query, even if it lists them in another order.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from pathlib import Path
from typing import TypeVar

import msgspec

from mgrpo.engine.run.directory import RunPaths
from mgrpo.engine.system.files import fsync, make_private, open_private
from mgrpo.engine.system.process import pause

Content = TypeVar("Content", bound=msgspec.Struct)
_WITHOUT_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)  # what such a file system answers
CLAIMED = 5.0  # seconds that an empty file may wait for its content


class Identity(msgspec.Struct, frozen=True):
    """Hold a run's id: 16 hex digits."""

    id: str


class TaskOrder(msgspec.Struct, frozen=True):
    """Hold the ids of the tasks to train on, in the order in which the run counts them."""

    ids: list[str]


def read_identity(run_dir: str | Path) -> str | None:
    """Return the id of the run in a directory, or None if none was drawn. Raises ValueError if it is damaged."""
    path = RunPaths(run_dir).identity
    return _read(path, Identity).id if path.is_file() else None


def draw_identity(run_dir: str | Path) -> str:
    """Return the id of the run in a directory, after drawing it if there is none. Processes that do so agree on one."""
    path = RunPaths(run_dir).identity
    if not path.is_file():
        write_once(path, Identity(secrets.token_hex(8)))
    return _read(path, Identity).id


def keep_identity(run_dir: str | Path, known: str) -> None:
    """Give a directory without an id the one that its store knows it by."""
    write_once(RunPaths(run_dir).identity, Identity(known))


def task_order(run_dir: str | Path, ids: list[str]) -> list[str]:
    """Return the order of the task ids that the first process of the run wrote down; the first gets back its own."""
    path = RunPaths(run_dir).tasks
    if not path.is_file():
        write_once(path, TaskOrder(ids))
    return _read(path, TaskOrder).ids


def write_once(path: Path, content: msgspec.Struct) -> None:
    """Write a JSON file, whole and durably, unless there is one: of several writers, the first wins."""
    make_private(path.parent)
    aside = path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name}")
    try:
        with open(aside, "xb", opener=open_private) as file:
            file.write(msgspec.json.encode(content))
        fsync(aside)
        _link(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    fsync(path.parent)


def _link(aside: Path, path: Path) -> None:
    try:
        os.link(aside, path)
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in _WITHOUT_LINKS:
            raise
        _rename(aside, path)


def _rename(aside: Path, path: Path) -> None:
    """Do as a link would: an empty file claims the name, which only one writer can make, and is then replaced."""
    try:
        os.close(open_private(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    try:
        aside.rename(path)
    except OSError:
        path.unlink()
        raise


def _read(path: Path, kind: type[Content]) -> Content:
    """Read what `write_once` wrote, or is about to write: an empty file is a claim."""
    until = time.monotonic() + CLAIMED
    while not (data := path.read_bytes()) and time.monotonic() < until:
        pause(0.01)
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} is damaged: {error}: expected what the run wrote when it began") from error
