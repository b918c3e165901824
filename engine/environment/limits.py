"""Limit the time of the user's code, also of coroutines that catch their cancellation and go on."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

CLEANUP = 5.0  # seconds that cancelled coroutines have to clean up before they are left behind

CURRENT: ContextVar[TimeLimit | None] = ContextVar("CURRENT", default=None)  # tools of an episode inherit its limit


class TimeLimit:
    """Cancel the code of an `async with` block after `seconds`; it then raises TimeoutError.

    Coroutines of the user that catch the cancellation and go on are left behind CLEANUP seconds later (`driven`).

    of_code: count only the time in which some code of the user runs (`counting`), not that of sampling. during: names
    of the user's functions that ran when the time was over.
    """

    def __init__(self, seconds: float, of_code: bool = False) -> None:
        self.left, self.of_code = seconds, of_code
        self._overdue = False
        self.during: list[str] = []
        self._running: list[str] = []  # the user's functions that run now
        self._cancelled = 0
        self._began = 0.0
        self._alarm: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> TimeLimit:
        task = asyncio.current_task()
        assert task is not None
        self.loop, self.task, self.before = asyncio.get_running_loop(), task, task.cancelling()
        self.outer, self.token = CURRENT.get(), CURRENT.set(self)
        if not self.of_code:
            self._start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        CURRENT.reset(self.token)
        self._stop()
        for _ in range(self._cancelled):
            self.task.uncancel()
        if self._cancelled and kind is asyncio.CancelledError and self.task.cancelling() <= self.before:
            raise TimeoutError from error

    @contextmanager
    def counting(self, name: str) -> Iterator[None]:
        """Count the time in which the block runs. name: of the user's function that it runs."""
        self._running.append(name)
        if self.of_code and len(self._running) == 1 and not self._cancelled:
            self._start()
        try:
            yield
        finally:
            self._running.remove(name)
            if self.of_code and not self._running and not self._cancelled:
                self._stop()

    @property
    def overdue(self) -> bool:
        """Whether coroutines that are cancelled now are left behind."""
        return self._overdue or (self.outer is not None and self.outer.overdue)

    def give_up(self) -> None:
        """Leave behind all coroutines that are cancelled from now on."""
        self._overdue = True

    @property
    def remaining(self) -> float:
        """The seconds left."""
        return self.left - (self.loop.time() - self._began if self._alarm else 0.0)

    def _start(self) -> None:
        self._began = self.loop.time()
        self._alarm = self.loop.call_later(max(self.left, 0.0), self._cancel)

    def _stop(self) -> None:
        if self._alarm is not None:
            self.left = self.remaining
            self._alarm.cancel()
            self._alarm = None

    def _cancel(self) -> None:
        self._overdue |= self._cancelled > 0
        self.during = self.during or sorted(set(self._running))
        self._cancelled += 1
        self.task.cancel()
        self._alarm = self.loop.call_later(CLEANUP, self._cancel)


@types.coroutine
def driven(work: Coroutine[Any, Any, Any], resumes: Callable[[], None] = lambda: None) -> Generator[Any, Any, Any]:
    """Await a coroutine of the user, but leave it behind when it is cancelled after the current limit's CLEANUP.

    resumes: called each time before the coroutine goes on.
    """
    resume, given, limit = work.send, None, CURRENT.get()
    while True:
        resumes()
        try:
            waited = resume(given)
        except StopIteration as end:
            return end.value
        try:
            given, resume = (yield waited), work.send
        except BaseException as error:  # thrown in by the loop, for the coroutine to see
            if limit is not None and limit.overdue:
                _leave(work)
                raise
            given, resume = error, work.throw


def _leave(work: Coroutine[Any, Any, Any]) -> None:
    with suppress(BaseException):  # the user's code may even refuse to be closed
        work.close()
