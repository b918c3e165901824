"""Retry calls that may fail for a while: a store that cannot be reached, a full disk, a file that is not there yet."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from mgrpo.engine.system import process

PATIENCE = 600.0  # seconds until a failing call is given up
PAUSES = (0.5, 15.0)  # seconds between two tries: the first pause, and the longest that doubling leads to

log = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")


def doubling(first: float, last: float) -> Iterator[float]:
    """Yield `first`, its double, and so on up to `last`, which is repeated without end."""
    while True:
        yield first
        first = min(2 * first, last)


@dataclass(frozen=True)
class Retry:
    """Call functions, again while they raise one of `errors`, with doubling pauses, for at most PATIENCE seconds.

    wait: sleeps for a number of seconds, and may raise to stop trying, as `process.pause` does when the process is to
    stop. agree: given whether the time is up here, returns whether to give up, so that several ranks can do the same.
    quiet: log no warning before a new try. final: those of the errors that waiting does not mend.
    """

    errors: tuple[type[Exception], ...] = (OSError,)
    wait: Callable[[float], object] = process.pause
    agree: Callable[[bool], bool] = bool
    quiet: bool = False
    final: tuple[type[Exception], ...] = ()

    def __call__(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Return what `work` returns. Raises its last error when the time is up, and at once any other error."""
        give_up = time.monotonic() + PATIENCE
        for pause in doubling(*PAUSES):
            try:
                return work(*args, **kwargs)
            except self.errors as error:
                if isinstance(error, self.final) or self.agree(time.monotonic() + pause > give_up):
                    raise
                if not self.quiet:
                    log.warning("%s; trying again in %.1f s", error, pause)
            self.wait(pause)
        raise AssertionError


patiently = Retry()  # for what fails with OSError: store, disk and files
