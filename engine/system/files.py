"""Write files so that they survive a killed process, a full disk or a crash of the machine."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PRIVATE = 0o600  # mode of files that this user alone may read


def make_private(folder: Path) -> None:
    """Make a folder, and those above it that are missing, which this user alone may enter. One that is there stays."""
    for each in (*reversed(folder.parents), folder):
        if not each.is_dir():
            each.mkdir(mode=0o700, exist_ok=True)


def open_private(path: str | Path, flags: int) -> int:
    """Serve as an `opener` of files that this user alone may read, if they are new."""
    return os.open(path, flags, PRIVATE)


def fsync(path: str | Path) -> None:
    """Force the bytes of a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(file: Any, data: memoryview | bytes) -> None:
    """Write all of `data` to an unbuffered file, which may take only a part at a time, as when the disk fills up."""
    while data:
        data = data[file.write(data) :]


def append(file: io.FileIO, data: bytes) -> None:
    """Append `data` to a file and force it to the disk. If that fails (OSError), the file keeps its previous length."""
    size = os.fstat(file.fileno()).st_size
    try:
        write_all(file, data)
        os.fsync(file)  # a network file system may report only now that it has no room
    except OSError:
        file.truncate(size)
        raise


@contextmanager
def replacing(path: Path, *, writer: str = "", durable: bool = True) -> Iterator[Path]:
    """Yield a path beside `path` to write to, which replaces `path` at the end; after an error `path` is as it was.

    Readers, and a process that is killed here, find the old file or the new one. writer: distinguishes processes that
    may replace the same file at the same time. durable: also force the file and its name to the disk.
    """
    aside = path.with_name(f".tmp-{writer}{path.name}")
    try:
        yield aside
        if durable:
            fsync(aside)
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)
    if durable:
        fsync(path.parent)


def replace(path: Path, data: bytes) -> None:
    """Replace a file by one that holds `data`, durably, and that this user alone may read.

    Raises OSError naming the file, which is then as it was.
    """
    try:
        with replacing(path) as aside:
            aside.touch(mode=PRIVATE)
            aside.write_bytes(data)
    except OSError as error:
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error
