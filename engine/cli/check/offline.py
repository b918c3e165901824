"""Refuse this process connections and new programs for a while, so that no judge is asked that may cost money."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

SENDING = ("socket.connect", "socket.sendto", "socket.sendmsg")
OUTWARD = (*SENDING, "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")
UNSEEN = ("grpc", "pycurl", "uvloop")  # packages that connect without Python's sockets


class OfflineError(OSError):
    """Report that a connection or a program was refused."""


class _Guard:
    """Hold whether connections are refused, and whether one was."""

    def __init__(self) -> None:
        self.up = 0
        self.refused = False

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.up or event not in OUTWARD:
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
    """Refuse connections to other machines, look-ups of names and new programs, in every thread."""
    guard = _guard()
    guard.up += 1
    try:
        yield
    finally:
        guard.up -= 1


def take_refused() -> bool:
    """Return whether anything was refused since the last call."""
    guard = _guard()
    refused, guard.refused = guard.refused, False
    return refused


def unseen() -> list[str]:
    """Return the loaded packages whose connections cannot be refused."""
    return [name for name in UNSEEN if name in sys.modules]
