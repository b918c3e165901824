"""Refuse this process connections and new programs for a while, so that no judge is asked that may cost money."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

SENDING = ("socket.connect", "socket.sendto", "socket.sendmsg")
OUTWARD = (*SENDING, "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")
UNSEEN = ("grpc", "pycurl", "uvloop")  # packages that connect without Python's sockets


INSIDE = ContextVar("INSIDE", default=False)  # whether this thread or coroutine is in a block of `offline`


class OfflineError(OSError):
    """Report that a connection or a program was refused."""


class _Guard:
    """Hold whose connections are refused, and whether one was. inside: the blocks that have not ended."""

    def __init__(self) -> None:
        self.inside: set[object] = set()
        self.refused = False

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in OUTWARD or not (self.inside or INSIDE.get()):
            return
        if event in SENDING and not isinstance(args[1], tuple):
            return  # a socket of this machine's own, such as an event loop's
        self.refused = True
        raise OfflineError("mgrpo check refuses connections to judges: pass --score to ask them")


@cache
def _guard() -> _Guard:
    """Return the process' guard, which listens from its first use on: an audit hook cannot be taken away."""
    guard = _Guard()
    sys.addaudithook(guard)
    return guard


@contextmanager
def offline() -> Iterator[None]:
    """Refuse connections to other machines, look-ups of names and new programs, in every thread.

    Code that never leaves the block is refused them for good; all other threads only until `lift`.
    """
    guard, block = _guard(), object()
    guard.inside.add(block)
    before = INSIDE.get()
    INSIDE.set(True)
    try:
        yield
    finally:
        INSIDE.set(before)  # no token: a coroutine that was left behind may end in another context
        guard.inside.discard(block)


def lift() -> None:
    """Allow other threads everything again, also if the code of a block has not returned."""
    _guard().inside.clear()


def take_refused() -> bool:
    """Return whether anything was refused since the last call."""
    guard = _guard()
    refused, guard.refused = guard.refused, False
    return refused


def unseen() -> list[str]:
    """Return the loaded packages whose connections cannot be refused."""
    return [name for name in UNSEEN if name in sys.modules]
