"""Simulate a decoupled run by discrete events: workers, stragglers, the gate, weights on their way, trainers.

Workers take queries through the same gate as in the store (`Queries.take`), look into the store as often as `Worker`
does, and record ended rollouts as it does; a trainer claims, expires and publishes like `AgentProcess`. The episodes of
a worker share it (`ProcessorSharing`), so that an event is the end of an episode, not a token.

Unlike a real run, a simulated one has no last step: its steady state is measured. Evaluations, checkpoints and faults
are left out, and so is the time that switch = "turn" waits for running turns to end.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mgrpo.engine.config.schema import Config
from mgrpo.engine.simulate.processor_sharing import ProcessorSharing
from mgrpo.engine.simulate.workload import Workload

# Seconds between looks into the store: copies of those in worker.py and leader.py, whose imports take long.
TRAINER_LOOK, WORKER_LOOK, FLUSH, IDLE = 0.1, 0.25, 0.5, (0.02, 0.2)


@dataclass(frozen=True)
class Outcome:
    """Describe the steady state of a simulated run.

    busy: shares of time, of all workers and of each trainer. workers_full: tokens decoded, as a share of what workers
    with all slots in use would decode. staleness: in rl steps, of the groups trained on. expired: share of an agent's
    groups. cut: share of the episodes that the timeout ended.
    """

    step_seconds: float
    rollouts_per_second: float
    workers_busy: float
    workers_full: float
    trainers_busy: dict[str, float]
    staleness_mean: float
    staleness_worst: int
    expired: float
    cut: float


@dataclass(eq=False)
class Query:
    """A query that was opened."""

    number: int
    left: int  # rollouts that are not recorded yet
    steps: list[int]  # rl steps of the weights that sample it, by agent
    rows: list[float]  # tokens to be trained on, by agent
    overdue: bool = False


@dataclass(eq=False)
class SimEpisode:
    """An episode on a worker."""

    query: Query
    pause: float  # seconds after it has decoded
    rows: list[float]


@dataclass(eq=False)
class SimWorker:
    """A rollout worker at an instant."""

    sharing: ProcessorSharing[SimEpisode]
    steps: list[int]  # rl steps of the weights it has, by agent; -1: none
    change: int = 0  # serial number of the only valid event for its next end of an episode
    running: int = 0  # episodes
    looking: bool = False  # whether a look is scheduled
    recording: bool = False  # whether it records its last episodes, with none running
    looked_at: float = -math.inf
    idle_since: float = 0.0
    ended: list[Query] = field(default_factory=list)  # the query of each rollout that is to be recorded


@dataclass(eq=False)
class SimTrainer:
    """One agent's trainer at an instant."""

    index: int
    gpus: int
    step: int = 0
    trained: int = 0  # groups
    dropped: int = 0  # groups
    waiting: bool = True
    looking: bool = False
    since: float = 0.0  # when it began to wait, or to train
    sealed: list[tuple[int, Query]] = field(default_factory=list)  # a heap by number
    busy: float = 0.0  # seconds


class Simulation:
    """Simulate `steps` rl steps. gpus: those of each agent's trainer. The same arguments give the same outcome."""

    def __init__(self, config: Config, workload: Workload, workers: int, gpus: Mapping[str, int], steps: int) -> None:
        assert workers >= 1 and steps >= 1
        self.config, self.workload, self.steps = config, workload, steps
        self.size, self.batch = config.algorithm.rollouts, config.queries_per_step
        self.worker, self.episodes, self.agents = workload.worker, workload.episodes, list(config.agents)
        self.learns = [config.agents[name].train for name in self.agents]
        self.random = np.random.default_rng(config.seed)
        self.now, self.serial = 0.0, 0
        self.events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        rates = workload.worker.step_seconds, workload.worker.row_seconds
        self.workers = [SimWorker(ProcessorSharing(*rates), [-1] * len(self.agents)) for _ in range(workers)]
        self.trainers = [SimTrainer(i, gpus[name]) for i, name in enumerate(self.agents)]
        self.opened = self.recorded = self.cut = 0
        self.done = 0  # rl steps of the slowest trainer
        self.staleness: list[int] = []
        self.warm = min(config.sampling.max_staleness + 1, steps - 1)  # steps in which the pipeline fills
        self.begin: dict[str, float] = {}

    def run(self) -> Outcome:
        """Simulate, and return what the steady state was like."""
        self._wake()
        while self.done < self.steps:
            self.now, _, what, arguments = heapq.heappop(self.events)
            what(*arguments)
            if not self.begin and self.done >= self.warm:
                self.begin, self.staleness = self._totals(), []
        return self._outcome(self._totals())

    def _at(self, time: float, what: Callable[..., None], *arguments: Any) -> None:
        self.serial += 1
        heapq.heappush(self.events, (time, self.serial, what, arguments))

    # ---- workers look into the store

    def _wake(self) -> None:
        """Let every worker look into the store if it can use new weights, or room to run ahead."""
        drains = self.config.sampling.switch == "episode"
        for worker in self.workers:
            if not (worker.running and drains and self._outdated(worker)):
                self._look_later(worker)

    def _look_later(self, worker: SimWorker) -> None:
        if worker.looking or worker.recording or worker.sharing.stopped:
            return
        worker.looking = True
        if worker.running:
            return self._at(max(self.now, worker.looked_at + WORKER_LOOK), self._look, worker)
        self._at(next_look(worker.idle_since, self.now), self._look, worker)

    def _look(self, worker: SimWorker) -> None:
        worker.looking, worker.looked_at = False, self.now
        if worker.recording or worker.sharing.stopped:
            return
        outdated = self._outdated(worker)
        if not outdated:
            return self._take(worker)
        if worker.running and self.config.sampling.switch == "episode":
            return  # it looks again when its episodes have ended
        worker.sharing.settle(self.now)
        worker.sharing.stopped = True
        self._next_end(worker)
        steps = [trainer.step for trainer in self.trainers]
        self._at(self.now + len(outdated) * self.worker.load_seconds, self._loaded, worker, steps)

    def _outdated(self, worker: SimWorker) -> list[int]:
        """Return the agents whose weights the worker must load; those of frozen agents are loaded once."""
        return [t.index for t in self.trainers if (worker.steps[t.index] < (t.step if self.learns[t.index] else 0))]

    def _loaded(self, worker: SimWorker, steps: list[int]) -> None:
        worker.sharing.settle(self.now)
        worker.sharing.stopped, worker.steps = False, steps
        self._next_end(worker)
        self._look(worker)

    def _room(self) -> int:
        """Return how many queries the gate lets workers open: `Queries.take` in a run without end."""
        slowest = min(trainer.trained + trainer.dropped for trainer in self.trainers)
        return slowest + (self.config.sampling.max_staleness + 1) * self.batch - self.opened

    def _take(self, worker: SimWorker) -> None:
        free = -(-(self.config.compute.concurrency - worker.running) // self.size)
        count = min(free, -(-self.batch // len(self.workers)), self._room())
        if count < 1:
            return
        for t in self.trainers:
            if not self.learns[t.index]:  # the same weights under a new number
                worker.steps[t.index] = t.step
        worker.sharing.settle(self.now)
        for _ in range(count):
            self._begin(worker)
        self._next_end(worker)
        self._look_later(worker)

    def _begin(self, worker: SimWorker) -> None:
        query = Query(self.opened, self.size, list(worker.steps), [0.0] * len(self.agents))
        self.opened += 1
        worker.running += self.size
        actions, pauses, rows_A = self.episodes.draw(self.random, self.size)
        for tokens, pause, *rows in zip(actions, pauses, *rows_A, strict=True):
            worker.sharing.add(tokens, SimEpisode(query, pause, rows))
        self._at(self.now + self.config.sampling.timeout, self._overdue, worker, query)

    # ---- episodes

    def _next_end(self, worker: SimWorker) -> None:
        worker.change += 1
        left = worker.sharing.left()
        if left is not None:
            self._at(self.now + left, self._decoded, worker, worker.change)

    def _decoded(self, worker: SimWorker, change: int) -> None:
        if change != worker.change:
            return
        worker.sharing.settle(self.now)
        for episode in worker.sharing.pop_next():
            if episode.pause > 0:
                self._at(self.now + episode.pause, self._end, worker, episode)
            else:
                self._end(worker, episode)
        self._next_end(worker)

    def _end(self, worker: SimWorker, episode: SimEpisode) -> None:
        query = episode.query
        if not query.overdue:
            query.rows = [a + b for a, b in zip(query.rows, episode.rows, strict=True)]
            self._leave(worker, query)

    def _overdue(self, worker: SimWorker, query: Query) -> None:
        """Fail the episodes that have not ended by the timeout."""
        left = query.left - sum(ended is query for ended in worker.ended)
        if not left:
            return
        query.overdue = True
        worker.sharing.settle(self.now)
        worker.sharing.remove(lambda episode: episode.query is query)
        self._next_end(worker)
        self.cut += left
        for _ in range(left):
            self._leave(worker, query)

    def _leave(self, worker: SimWorker, query: Query) -> None:
        worker.running -= 1
        worker.ended.append(query)
        if not worker.running:
            worker.recording = True
            return self._at(self.now + self.worker.record_seconds, self._drained, worker)
        if len(worker.ended) == 1:
            self._at(self.now + FLUSH, self._record, worker, worker.ended)
        if self._room() > 0 and not self._outdated(worker):
            self._look_later(worker)

    def _drained(self, worker: SimWorker) -> None:
        worker.recording, worker.idle_since = False, self.now
        self._record(worker, worker.ended)
        self._look(worker)

    def _record(self, worker: SimWorker, ended: list[Query]) -> None:
        if worker.recording or worker.ended is not ended:
            return  # the worker has drained: they are being recorded, or were
        worker.ended = []
        self.recorded += len(ended)
        for query in ended:
            query.left -= 1
            if query.left == 0:
                self._seal(query)

    # ---- trainers

    def _seal(self, query: Query) -> None:
        for trainer in self.trainers:
            share = self.workload.trainers[self.agents[trainer.index]].zero_std
            if self.config.sampling.refill_zero_std and self.random.random() < share:
                self._drop(trainer, 1)
            else:
                heapq.heappush(trainer.sealed, (query.number, query))
                self._claim_later(trainer)

    def _claim_later(self, trainer: SimTrainer) -> None:
        if trainer.waiting and not trainer.looking:
            trainer.looking = True
            looks = math.ceil((self.now - trainer.since) / TRAINER_LOOK - 1e-9)
            self._at(max(self.now, trainer.since + looks * TRAINER_LOOK), self._claim, trainer)

    def _claim(self, trainer: SimTrainer) -> None:
        trainer.looking = False
        self._expire(trainer)
        if len(trainer.sealed) < self.batch:
            return
        queries = [heapq.heappop(trainer.sealed)[1] for _ in range(self.batch)]
        self.staleness += [trainer.step - query.steps[trainer.index] for query in queries]
        needs = self.workload.trainers[self.agents[trainer.index]]
        tokens = needs.kept * sum(query.rows[trainer.index] for query in queries)
        seconds = needs.seconds(tokens, trainer.gpus, self.config.compute.max_tokens) + needs.publish
        trainer.waiting, trainer.since = False, self.now
        learns = self.learns[trainer.index]
        self._at(self.now + (seconds if learns else needs.overhead), self._publish, trainer)

    def _expire(self, trainer: SimTrainer) -> None:
        oldest = trainer.step - self.config.sampling.max_staleness
        fresh = [item for item in trainer.sealed if item[1].steps[trainer.index] >= oldest]
        stale, trainer.sealed = len(trainer.sealed) - len(fresh), fresh
        if stale:
            heapq.heapify(fresh)
            self._drop(trainer, stale)

    def _drop(self, trainer: SimTrainer, count: int) -> None:
        """Drop groups; other queries may be opened in their place."""
        trainer.dropped += count
        self._wake()

    def _publish(self, trainer: SimTrainer) -> None:
        trainer.busy += self.now - trainer.since
        trainer.waiting, trainer.since = True, self.now
        trainer.step += 1
        self.done = min(other.step for other in self.trainers)
        trainer.trained += self.batch
        self._wake()
        self._claim_later(trainer)

    # ---- totals

    def _totals(self) -> dict[str, float]:
        for worker in self.workers:
            worker.sharing.settle(self.now)
        busy = [t.busy + (0 if t.waiting else self.now - t.since) for t in self.trainers]
        return {f"busy {name}": seconds for name, seconds in zip(self.agents, busy, strict=True)} | {
            "time": self.now,
            "step": self.done,
            "recorded": self.recorded,
            "cut": self.cut,
            "busy": sum(worker.sharing.busy for worker in self.workers),
            "tokens": sum(worker.sharing.tokens for worker in self.workers),
            "dropped": sum(trainer.dropped for trainer in self.trainers),
            "trained": sum(trainer.trained for trainer in self.trainers),
        }

    def _outcome(self, end: dict[str, float]) -> Outcome:
        of = {key: end[key] - self.begin[key] for key in end}
        slots, seconds = self.config.compute.concurrency, of["time"]
        most = len(self.workers) * seconds * slots / self.workers[0].sharing.token_seconds(slots)
        return Outcome(
            step_seconds=seconds / of["step"],
            rollouts_per_second=of["recorded"] / seconds,
            workers_busy=of["busy"] / (len(self.workers) * seconds),
            workers_full=of["tokens"] / most,
            trainers_busy={name: of[f"busy {name}"] / seconds for name in self.agents},
            staleness_mean=float(np.mean(self.staleness)),
            staleness_worst=max(self.staleness),
            expired=of["dropped"] / max(of["dropped"] + of["trained"], 1),
            cut=of["cut"] / max(of["recorded"], 1),
        )


def next_look(idle_since: float, now: float) -> float:
    """Return when an idle worker looks next: its pauses double from the first of IDLE to the second."""
    first, longest = IDLE
    time, pause = idle_since, first
    while time < now and pause < longest:
        time, pause = time + pause, min(2 * pause, longest)
    return time if time >= now else time + math.ceil((now - time) / longest) * longest
