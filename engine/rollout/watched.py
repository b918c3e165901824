"""Play episodes in a process that also trains: it must end with an error if the environment's code never returns."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mgrpo.engine.rollout.episodes import EpisodeRunner, Job, Rollout
from mgrpo.engine.system.heartbeat import Heartbeat
from mgrpo.engine.system.process import end_now

log = logging.getLogger(__name__)


def play(runner: EpisodeRunner, jobs: Sequence[Job]) -> list[Rollout]:
    """Play episodes side by side and return their rollouts in the jobs' order.

    Raises StuckError if too many plain functions of the environment have not returned.
    """
    with watched(runner):
        rollouts = runner.run(jobs)
    runner.check_stuck()
    return rollouts


@contextmanager
def watched(runner: EpisodeRunner) -> Iterator[None]:
    """End the process with status 1 if an async function of the environment does not let go of the event loop."""
    watch = Heartbeat(lambda: _end_if_blocked(runner), runner.timeout / 3)
    watch.start()
    try:
        yield
    finally:
        watch.stop()


def _end_if_blocked(runner: EpisodeRunner) -> None:
    if error := runner.blocked(runner.timeout):
        log.error("%s", error)
        end_now(error, 1)
