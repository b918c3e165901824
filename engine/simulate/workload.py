"""Describe what a simulated run is made of: its episodes, and the time that its workers and trainers need for them.

A workload is measured from a run (`fit.py`), or given in a TOML file:

    [worker]
    step_seconds = 0.012    # one token of each of n running episodes takes step_seconds + n * row_seconds, so that an
    row_seconds = 0.0001    # episode alone decodes at 1 / (step + row) tokens a second, and a worker at most 1 / row
    load_seconds = 6.0      # to load one agent's new weights
    record_seconds = 0.1    # to write and record its last episodes, before it looks for others
    gpus = 1                # GPUs of one worker

    [pause]                 # seconds of an episode in which it does not decode: tools, the judge
    mean = 3.0
    sigma = 1.0             # log-normal: standard deviation of the logarithm; 0: always the mean

    [agents.main]
    calls = { mean = 1 }                     # per episode; rounded at random so that the mean stays
    actions = { mean = 600, sigma = 0.7 }    # sampled tokens of a call
    context = 1500                           # other tokens of a call, on which the trainer computes as well
    rate = 9000                              # tokens that one GPU trains per second
    overhead = 4.0                           # seconds of a step that depend on neither tokens nor GPUs
    publish = 8.0                            # seconds to publish the weights
    efficiency = 0.95                        # twice the GPUs have 2 * 0.95 times the rate

Unlike in a real run, the calls of an episode decode one after another, the tokens of all agents cost a worker the same,
prompts cost it nothing, and an episode's whole pause is at its end.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from mgrpo.engine.config.schema import Config, Count, Frozen, NonNegative, Positive

DRAWN = 100_000  # episodes that stand for a given distribution

Share = Annotated[float, Meta(ge=0, le=1)]


class Skewed(Frozen, frozen=True):
    """A log-normal distribution, by its mean and the standard deviation of its logarithm (0: always the mean)."""

    mean: NonNegative
    sigma: NonNegative = 0.0

    def draw(self, random: np.random.Generator, count: int) -> np.ndarray:
        """Draw `count` values, as float64."""
        return self.mean * np.exp(self.sigma * random.standard_normal(count) - self.sigma**2 / 2)


class WorkerCost(Frozen, frozen=True):
    """Hold the costs of a rollout worker: the keys of [worker] above."""

    step_seconds: NonNegative
    row_seconds: NonNegative
    load_seconds: NonNegative = 0.0
    record_seconds: NonNegative = 0.0
    gpus: Count = 1

    def __post_init__(self) -> None:
        if self.step_seconds + self.row_seconds <= 0:
            raise ValueError("worker.step_seconds, worker.row_seconds: 0 given for both: expected at least one above 0")


class TrainerCost(Frozen, frozen=True, kw_only=True):
    """Hold the costs of one agent's trainer: the keys of [agents.NAME] above, and two more.

    kept: trained tokens per token of its groups. zero_std: the share of its groups whose advantages are all zero.
    """

    rate: Positive
    overhead: NonNegative = 0.0
    publish: NonNegative = 0.0
    efficiency: Annotated[float, Meta(gt=0.5, le=1)] = 0.95
    kept: NonNegative = 1.0
    zero_std: Share = 0.0

    def seconds(self, tokens: float, gpus: int, max_tokens: int) -> float:
        """Return the seconds of a step without publishing.

        A micro-batch is not divided, so that GPUs beyond the number of micro-batches wait.
        """
        batches = max(1, -(-int(tokens) // max_tokens))
        rounds = -(-batches // gpus)
        return self.overhead + tokens / self.rate * (rounds / batches) / self.efficiency ** math.log2(
            min(gpus, batches)
        )


@dataclass(frozen=True)
class EpisodeCost:
    """A table of episodes to draw from, sorted by query. Legend: N episodes, A agents.

    actions_N: sampled tokens of all agents. pause_N: seconds. rows_AN: each agent's tokens that its trainer may train
    on. edges: the index at which each query's episodes begin, and N.
    """

    actions_N: np.ndarray
    pause_N: np.ndarray
    rows_AN: np.ndarray
    edges: list[int]

    def draw(self, random: np.random.Generator, count: int) -> tuple[list[float], list[float], list[list[float]]]:
        """Draw `count` episodes of one query with replacement, so that they are of the same difficulty.

        Returns (actions, pauses, rows by agent).
        """
        query = int(random.integers(len(self.edges) - 1))
        chosen = random.integers(self.edges[query], self.edges[query + 1], count)
        return self.actions_N[chosen].tolist(), self.pause_N[chosen].tolist(), self.rows_AN[:, chosen].tolist()

    def even(self) -> EpisodeCost:
        """Return the table without stragglers, in which every episode is the mean one."""
        actions, pause = (np.full_like(of, of.mean()) for of in (self.actions_N, self.pause_N))
        return replace(self, actions_N=actions, pause_N=pause)


@dataclass(frozen=True)
class Workload:
    """Hold everything that a simulation needs apart from the run's config."""

    episodes: EpisodeCost
    worker: WorkerCost
    trainers: Mapping[str, TrainerCost]

    def __post_init__(self) -> None:
        assert len(self.episodes.rows_AN) == len(self.trainers)


class _Agent(TrainerCost, frozen=True, kw_only=True):
    actions: Skewed
    calls: Skewed = Skewed(mean=1)
    context: NonNegative = 0.0


class _Given(Frozen, frozen=True):
    worker: WorkerCost
    agents: dict[str, _Agent]
    pause: Skewed = Skewed(mean=0)


def read_workload(path: Path, config: Config) -> Workload:
    """Read the workload of a TOML file as above. Raises ValueError that names the key."""
    try:
        given = msgspec.convert(tomllib.loads(path.read_text()), _Given)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise ValueError(f"{path}: {error}") from error
    if set(given.agents) != set(config.agents):
        raise ValueError(f"{path}: agents: {sorted(given.agents)} given: expected {sorted(config.agents)}")
    agents = [given.agents[name] for name in config.agents]
    trainers = {name: _part(TrainerCost, given.agents[name]) for name in config.agents}
    return Workload(_drawn(agents, given.pause, np.random.default_rng(config.seed)), given.worker, trainers)


def _part(kind: type[TrainerCost], whole: TrainerCost) -> TrainerCost:
    return kind(**{name: getattr(whole, name) for name in kind.__struct_fields__})


def _drawn(agents: list[_Agent], pause: Skewed, random: np.random.Generator) -> EpisodeCost:
    """Draw the table of episodes of a given distribution, in which queries do not differ."""
    parts = [_calls(agent, random) for agent in agents]
    actions_N = np.sum([actions_N for actions_N, _ in parts], axis=0)
    rows_AN = np.stack([rows_N for _, rows_N in parts])
    return EpisodeCost(actions_N, pause.draw(random, DRAWN), rows_AN, [0, DRAWN])


def _calls(agent: _Agent, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw each episode's number of tokens that the agent samples, and of those that it trains on."""
    calls_N = np.floor(agent.calls.draw(random, DRAWN) + random.random(DRAWN)).astype(np.int64)
    episode_C: Any = np.repeat(np.arange(DRAWN), calls_N)
    actions_N = np.bincount(episode_C, agent.actions.draw(random, len(episode_C)), DRAWN)
    return actions_N, actions_N + agent.context * calls_N
