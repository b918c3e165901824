"""Count what a rollout worker does, for its rows of metrics."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from mgrpo.engine.environment.threads import UserThreads
from mgrpo.engine.rollout.weight_loader import WeightLoader
from mgrpo.engine.run.metrics import Row
from mgrpo.engine.store import CallRecord


class WorkerMetrics:
    """Count what a worker did since its last row of metrics.

    busy: returns the seconds that the samplers have worked on rollouts since the worker began. threads: those of the
    environment's code.
    """

    def __init__(self, loader: WeightLoader, busy: Callable[[], float], threads: UserThreads) -> None:
        self.loader, self.busy, self.threads, self.recorded = loader, busy, threads, 0
        self._begin()

    def _begin(self) -> None:
        self.began, self.waited, self.busy_before = time.monotonic(), 0.0, self.busy()
        self.counts: Counter[str] = Counter()
        self.actions, self.recorded_since = 0, 0
        self.staleness: list[int] = []

    def add(self, counts: Mapping[str, float], calls: Sequence[CallRecord]) -> None:
        """Add recorded rollouts: how many of each status, and their calls."""
        self.counts.update(counts)
        self.recorded += int(sum(counts.values()))
        self.recorded_since += int(sum(counts.values()))
        self.actions += sum(call.actions for call in calls)
        self.staleness += [self.loader.published[call.agent].step - call.step for call in calls]

    def row(self) -> Row:
        """Return the metrics since the last row, and start counting anew.

        staleness: how many published steps old the weights behind a call were when it was recorded. The counts of
        servers are totals since the worker began.
        """
        seconds = time.monotonic() - self.began
        row: Row = {
            "stage": "rl",
            "step": self.loader.step,
            **self.counts,
            "perf/rollouts_per_second": self.recorded_since / seconds,
            "perf/tokens_per_second": self.actions / seconds,
            "time/rollout": self.busy() - self.busy_before,
            "time/waiting": self.waited,
            "time/weights": self.loader.take_seconds(),
            "staleness_mean": sum(self.staleness) / max(len(self.staleness), 1),
            "staleness_worst": max(self.staleness, default=0),
            "calls_stuck": len(self.threads.stuck),
            **{f"{agent}/version": publication.version for agent, publication in self.loader.loaded.items()},
        }
        for agent, sampler in self.loader.served.items():
            row |= {f"{agent}/{key}": value for key, value in sampler.counts().items()}
        self._begin()
        return row
