"""Decide how long a run goes on while no rollout gets a score, for example because its judge is out of reach."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from mgrpo.engine.store import Group
from mgrpo.engine.system import retry
from mgrpo.engine.system.process import FinalError
from mgrpo.engine.system.words import counted

FIRST_TRIES = 3  # steps sampled without any score before a run that never had one ends: its environment is at fault


class Unscored:
    """Count the steps in a row of which no rollout was scored: such a step is none, and is sampled anew.

    ever: whether a step of this run had a score before. If none had, the run ends after FIRST_TRIES tries, otherwise
    after as many at least, and `retry.PATIENCE` seconds: one try may take longer than that.
    """

    def __init__(self, ever: bool) -> None:
        self.ever = ever
        self._begin()

    def _begin(self) -> None:
        self.tries, self.since = 0, 0.0
        self._pauses: Iterator[float] = retry.doubling(*retry.PAUSES)

    def scored(self) -> None:
        """Note that a rollout was scored."""
        self.ever = True
        self._begin()

    def missed(self, what: str) -> float:
        """Note that a step had no score; return the seconds to wait before the next try.

        what: which step and why, for the error. Raises ValueError at the end, FinalError if no step ever had a score.
        """
        self.since = self.since or time.monotonic()
        self.tries += 1
        late = time.monotonic() - self.since > retry.PATIENCE
        if self.tries >= FIRST_TRIES and (late or not self.ever):
            tries = counted(self.tries, "try", "tries")
            kind = ValueError if self.ever else FinalError
            raise kind(f"{what}: given up after {tries}: expected an environment that scores")
        return next(self._pauses)


def has_score(group: Group) -> bool:
    """Return whether any rollout of a group was scored."""
    return any(rollout.status == "scored" for rollout in group.rollouts)


def first_error(groups: Iterable[Group]) -> str:
    """Return why the first rollout with an error was not scored."""
    errors = (rollout.error for group in groups for rollout in group.rollouts if rollout.error)
    return next(errors, "no rollout has an error")
