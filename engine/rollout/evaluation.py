"""Say what an evaluation asks, and sum up what its episodes got.

An evaluation has one or several *sets* of tasks, by the names that the environment's `tasks` knows, and plays some
*samples* of each task. An episode that failed or was not scored counts as wrong.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mgrpo.engine.config.schema import Config, EvalConfig
from mgrpo.engine.environment.base import Environment
from mgrpo.engine.rollout.curriculum import EVAL_QUERIES, digest_of, load_tasks
from mgrpo.engine.rollout.episodes import Job, Rollout
from mgrpo.engine.run.scores import ACCURACY
from mgrpo.engine.system.statistics import bootstrap, mean_interval, pass_at_k, wilson
from mgrpo.engine.types import Task

APART = 34  # bits of a query's number within a set, so that each set draws other random numbers


class Evaluation:
    """Hold what an evaluation asks. jobs: the episodes of all sets; tasks: those of each set, in the order asked.

    A task's samples draw the same random numbers in every evaluation of a run, whatever the weights and the other sets,
    so that two evaluations can be compared task by task.
    """

    def __init__(self, sets: Mapping[str, Sequence[Task]], settings: EvalConfig, seed: int) -> None:
        self.settings = settings
        self.tasks = {name: _chosen(tasks, settings.questions, seed) for name, tasks in sets.items()}
        self.jobs = [job for name, tasks in self.tasks.items() for job in self._jobs(name, tasks)]

    @classmethod
    def of(cls, config: Config, environment: Environment) -> Evaluation:
        """Return the evaluation of a config. Raises ValueError if a set is empty or is another one under two names."""
        return cls(load_sets(environment, config.eval.sets), config.eval, config.seed)

    def _jobs(self, name: str, tasks: Sequence[Task]) -> list[Job]:
        first, greedy = _first_query(name), self.settings.temperature == 0
        temperature = None if greedy else self.settings.temperature
        return [
            Job(first + i, sample, task, greedy=greedy, evaluated=True, temperature=temperature)
            for i, task in enumerate(tasks)
            for sample in range(self.settings.samples)
        ]

    def outcomes(self, rollouts: Iterable[Rollout]) -> dict[str, SetOutcome]:
        """Return what each set's episodes got; there may be fewer than were asked for."""
        found = {_first_query(name): SetOutcome([task.id for task in tasks]) for name, tasks in self.tasks.items()}
        for rollout in rollouts:
            first = max(query for query in found if query <= rollout.job.query)
            found[first].add(rollout.job.query - first, rollout)
        return dict(zip(self.tasks, found.values(), strict=True))

    def row(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Return the metrics of an evaluation, as docs/metrics.md lists them."""
        outcomes, settings = self.outcomes(rollouts), self.settings
        first = outcomes[settings.sets[0]]
        row = first.accuracy(settings.samples)
        if len(outcomes) == 1 and settings.samples == 1 and settings.sets == ("held_out",):
            return row | ({"eval/temperature": settings.temperature} if settings.temperature else {})
        row |= {"eval/samples": settings.samples, "eval/temperature": settings.temperature}
        for name, outcome in outcomes.items():
            row |= {f"eval/{name}/{key}": value for key, value in outcome.metrics(settings.samples).items()}
        return row


@dataclass
class SetOutcome:
    """Hold what the episodes of one set got: of each task its samples' correctness, by the number of the sample.

    tasks: their ids. failed: episodes without a score; calls: sub-agent calls of each episode.
    """

    tasks: Sequence[str]
    failed: int = 0
    calls: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.correct: list[dict[int, float]] = [{} for _ in self.tasks]

    def add(self, place: int, rollout: Rollout) -> None:
        """Add an episode of the task at that place."""
        self.correct[place][rollout.job.rollout] = 0.0 if rollout.score is None else float(rollout.score.correct)
        self.failed += rollout.status != "scored"
        self.calls.append(len(rollout.episode.calls))

    @property
    def asked(self) -> list[list[float]]:
        """The correctness of each task's samples, without tasks that have none."""
        return [[samples[number] for number in sorted(samples)] for samples in self.correct if samples]

    @property
    def binary(self) -> bool:
        """Whether all scores are 0 or 1, so that pass@k has a meaning."""
        return all(value in (0, 1) for samples in self.asked for value in samples)

    def by_task(self) -> list[float | None]:
        """Return the mean of each task's samples, None for a task without any."""
        return [float(np.mean(list(samples.values()))) if samples else None for samples in self.correct]

    def average(self, seed: int = 0) -> IntervalEstimate:
        """Return avg@n, the mean over tasks of the mean over samples.

        Right or wrong answers, one for each task, have Wilson's interval. Raises ValueError if no task has a sample.
        """
        means = [mean for mean in self.by_task() if mean is not None]
        if means and self.binary and all(len(samples) == 1 for samples in self.asked):
            return IntervalEstimate(float(np.mean(means)), *wilson(sum(means), len(means)))
        return IntervalEstimate.of(means, seed)

    def passed(self, k: int, seed: int = 0) -> IntervalEstimate:
        """Return pass@k over the tasks with k samples or more. Raises ValueError if none has, or scores are not 0 or 1.

        Source: Chen et al. 2021, arXiv 2107.03374, Eq. 1.
        """
        if not self.binary:
            raise ValueError(
                f"pass@{k}: scores other than 0 and 1 found: expected right or wrong; they have a mean only"
            )
        most = max(map(len, self.asked), default=0)
        if not 1 <= k <= most:
            raise ValueError(f"pass@k: k = {k} given: expected 1 to {most}, the number of samples of a task")
        several = [samples for samples in self.asked if len(samples) >= k]
        return IntervalEstimate.of([pass_at_k(len(samples), round(sum(samples)), k) for samples in several], seed)

    def accuracy(self, samples: int) -> dict[str, float]:
        """Return the metrics that every evaluation has, for the first set."""
        if samples == 1:  # a task counts once, and Wilson's interval is that of right or wrong answers
            right, number = sum(value for one in self.asked for value in one), len(self.asked)
            share, (low, high) = right / number, wilson(right, number)
        else:
            share, low, high = self.average().values
        return {
            ACCURACY: share,
            "eval/low": low,
            "eval/high": high,
            "eval/questions": len(self.asked),
            "eval/failed": self.failed,
            "eval/calls_mean": float(np.mean(self.calls)),
        }

    def metrics(self, samples: int) -> dict[str, float]:
        """Return the metrics of one set among several, or of several samples."""
        share, low, high = self.average().values
        found = {f"avg@{samples}": share, "low": low, "high": high, "questions": len(self.asked), "failed": self.failed}
        if self.binary:
            found |= {f"pass@{k}": self.passed(k).value for k in powers(samples) if k > 1}
        return found


@dataclass(frozen=True)
class IntervalEstimate:
    """Hold a mean over tasks and its 95 % interval, NaN where there is none."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float], seed: int = 0) -> IntervalEstimate:
        """Return the mean of one value per task. Raises ValueError if there is none."""
        if not values:
            raise ValueError("evaluation: no task has been asked: expected at least one episode that ended")
        inside = all(0 <= value <= 1 for value in values)
        return cls(float(np.mean(values)), *(mean_interval if inside else bootstrap)(values, seed))

    @property
    def values(self) -> tuple[float, float, float]:
        """The mean and the ends of its interval."""
        return self.value, self.low, self.high


def load_sets(environment: Environment, names: Sequence[str]) -> dict[str, Sequence[Task]]:
    """Return the tasks of each set. Raises ValueError if one is empty, or if two have the same tasks.

    An environment that takes every name but "train" for "held_out" would otherwise seem to have any set.
    """
    sets, known = {name: load_tasks(environment, name) for name in names}, dict[str, str]()
    for name, tasks in sets.items():
        if (other := known.setdefault(digest_of(tasks), name)) != name:
            raise ValueError(
                f"eval.sets: {name!r} and {other!r} given: {type(environment).__name__}.tasks returns the same tasks "
                "for both: expected an environment that knows these names"
            )
    return sets


def powers(samples: int) -> list[int]:
    """Return the k of pass@k that are shown: the powers of 2 up to the number of samples, and that number."""
    return sorted({2**i for i in range(int(math.log2(samples)) + 1)} | {samples})


def _chosen(tasks: Sequence[Task], most: int, seed: int) -> list[Task]:
    """Return the first `most` tasks of a seeded shuffle."""
    order = np.random.default_rng([seed, EVAL_QUERIES]).permutation(len(tasks))[:most]
    return [tasks[index] for index in order]


def _first_query(name: str) -> int:
    """Return the number of a set's first query, by its name, so that it is the same beside other sets."""
    return EVAL_QUERIES + (0 if name == "held_out" else (1 + zlib.crc32(name.encode())) << APART)
