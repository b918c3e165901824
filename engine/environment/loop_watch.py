"""Notice code of the user that holds up the event loop."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager


class LoopWatch:
    """Know since when one piece of the user's code has run in the event loop's thread without a break.

    A piece ends where the code awaits. Pieces that follow one another do not add up, however many there are before the
    loop gets its turn: each alone must be short. Only `blocked` may be called in other threads.
    """

    def __init__(self) -> None:
        self.since: float | None = None  # None while the loop's thread runs no code of the user
        self.thread = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the loop while it runs coroutines, and so code of the user."""
        self.thread, self.since = threading.get_ident(), time.monotonic()
        try:
            yield
        finally:
            self.since = None

    def restart(self) -> None:
        """Note that another piece of the user's code begins."""
        if self.since is not None:
            self.since = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out a wait of the loop's thread that has a limit of its own."""
        watched, self.since = self.since is not None, None
        try:
            yield
        finally:
            self.since = time.monotonic() if watched else None

    def blocked(self, seconds: float) -> str:
        """Say where a piece of the user's code has held up the loop for longer than that; "" if none has."""
        since, frame = self.since, sys._current_frames().get(self.thread)
        if since is None or frame is None or (lasted := time.monotonic() - since) <= seconds:
            return ""
        where = traceback.extract_stack(frame)[-1]
        return (
            f"environment: {where.name} ({where.filename}, line {where.lineno}) has held up the event loop for "
            f"{lasted:.0f} s: expected async functions that await, or plain ones"
        )
