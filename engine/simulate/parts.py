"""What a simulated run is at an instant: queries, episodes, workers and trainers; and when an idle worker looks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from mgrpo.engine.simulate.processor_sharing import Sharing

# Seconds between looks into the store, as in worker.py and leader.py, whose imports take long.
TRAINER_LOOK, WORKER_LOOK, FLUSH, IDLE = 0.1, 0.25, 0.5, (0.02, 0.2)


@dataclass(eq=False)
class Query:
    number: int
    left: int  # rollouts that are not recorded
    steps: list[int]  # of the weights that sample it, by agent
    rows: list[float]  # tokens to be trained on, by agent
    overdue: bool = False


@dataclass(eq=False)
class SimEpisode:
    query: Query
    pause: float  # seconds after it has decoded
    rows: list[float]


@dataclass(eq=False)
class SimWorker:
    sharing: Sharing[SimEpisode]
    steps: list[int]  # of the weights it has, by agent; -1: none
    change: int = 0  # which of the events about its next end is the valid one
    running: int = 0
    looking: bool = False  # a look is on its way
    recording: bool = False  # its last episodes
    looked_at: float = -math.inf
    idle_since: float = 0.0
    ended: list[Query] = field(default_factory=list)  # a rollout's, to be recorded


@dataclass(eq=False)
class SimTrainer:
    index: int
    gpus: int
    step: int = 0
    trained: int = 0
    dropped: int = 0
    waiting: bool = True
    looking: bool = False
    since: float = 0.0  # when it began to wait, or to train
    sealed: list[tuple[int, Query]] = field(default_factory=list)  # heap by number
    busy: float = 0.0


def next_look(idle_since: float, now: float) -> float:
    """When an idle worker looks next: its pauses double from the first of IDLE to the second."""
    first, longest = IDLE
    time, pause = idle_since, first
    while time < now and pause < longest:
        time, pause = time + pause, min(2 * pause, longest)
    return time if time >= now else time + math.ceil((now - time) / longest) * longest
