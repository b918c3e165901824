"""Keep the secrets of a run out of environments, where the kernel shows them to every tool of the same user.

A user gives a secret in an environment variable, or in a file that others cannot read. The process takes it out of its
environment, also out of the memory that /proc/PID/environ shows, in which a variable stays after it was deleted.
Processes that it starts get the secrets that they need by a pipe, whose number stands in the environment.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

NAMES = ("MGRPO_STORE_PASSWORD", "MGRPO_SERVER_TOKEN", "HF_TOKEN")
PIPE = "MGRPO_SECRETS"  # the read end of a pipe with the secrets, as JSON

_taken: dict[str, str] = {}


def take() -> None:
    """Take the secrets out of the environment and out of the pipe that the launcher has passed. Call this first."""
    for name in NAMES:
        if name in os.environ:
            _taken[name] = os.environ[name]
            _wipe(name)
            del os.environ[name]
    if (end := os.environ.pop(PIPE, None)) is not None:
        with os.fdopen(int(end), "rb") as pipe:
            _taken.update(json.load(pipe))


def get(name: str) -> str | None:
    """Return a secret, or None if there is none. One that was set in the environment since `take` comes first."""
    return os.environ.get(name, _taken.get(name))


def keep(name: str, value: str) -> str:
    """Remember a secret for `get`, unless there is one of that name, and return what `get` returns."""
    return get(name) or _taken.setdefault(name, value)


@contextmanager
def passed(names: Sequence[str] = NAMES) -> Iterator[tuple[dict[str, str], tuple[int, ...]]]:
    """Yield the variables and the open file with which a new process gets these secrets. The file is closed at the end.

    The environment of the new process must otherwise have no variable of NAMES.
    """
    known = {name: secret for name in names if (secret := get(name)) is not None}
    if not known:
        yield {}, ()
        return
    read, write = os.pipe()
    with os.fdopen(write, "wb") as pipe:  # a pipe holds 64 KiB, so that this does not wait for a reader
        pipe.write(json.dumps(known).encode())
    try:
        yield {PIPE: str(read)}, (read,)
    finally:
        os.close(read)


def _wipe(name: str) -> None:
    """Overwrite the value of a variable where it lies."""
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_void_p
    if place := libc.getenv(name.encode()):
        ctypes.memset(place, 0, len(os.environb[name.encode()]))
