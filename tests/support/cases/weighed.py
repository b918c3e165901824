"""Trajectories with an advantage and a weight, one object each, and the naive way to drop and merge them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from mgrpo.engine.batch.micro_batches import Batch, pack_calls
from mgrpo.engine.types import Trajectory

# Few values, so that trajectories repeat. All sums of the numbers are exact in float64, and the numbers in float32.
tokens = st.integers(0, 1)
logprobs = st.sampled_from([-0.5, -2.0])
weights = st.sampled_from([0.25, 0.5, 1.0, 3.0])
advantages = st.sampled_from([-2.0, -0.5, 0.0, 0.5, 1.0])


@dataclass(frozen=True)
class Weighed:
    """Hold a trajectory, its advantage and the loss weight of each of its action tokens."""

    trajectory: Trajectory
    advantage: float
    weight: float


def trajectory(rows: Iterable[tuple[int, bool, float]], version: int = 0) -> Trajectory:
    """Return a trajectory of (token, sampled, logprob) rows; the log-prob of what was not sampled is 0."""
    rows = list(rows)
    sampled = np.array([s for _, s, _ in rows], np.bool_)
    logprobs_L = np.where(sampled, [p for _, _, p in rows], 0).astype(np.float32)
    return Trajectory(np.array([t for t, _, _ in rows], np.int32), sampled, logprobs_L, version)


def plain(*tokens: int, sampled: str | None = None, logprob: float = -1.0) -> Trajectory:
    """Return a trajectory of these tokens, sampled where the string has an x: by default all but the first."""
    flags = sampled or "." + "x" * (len(tokens) - 1)
    return trajectory((t, flag == "x", logprob) for t, flag in zip(tokens, flags, strict=True))


trajectories = st.lists(st.tuples(tokens, st.booleans(), logprobs), min_size=1, max_size=5).map(trajectory)


def weighed_of(
    weight: st.SearchStrategy[float], advantage: st.SearchStrategy[float] = advantages
) -> st.SearchStrategy[list[Weighed]]:
    return st.lists(st.builds(Weighed, trajectories, advantage, weight), max_size=30)


def columns_of(weighed: Sequence[Weighed]) -> tuple[list[Trajectory], np.ndarray, np.ndarray]:
    """Return the trajectories, their advantages and their weights, (N,) each."""
    rows = [(w.trajectory, w.advantage, w.weight) for w in weighed]
    return [t for t, _, _ in rows], np.array([a for _, a, _ in rows]), np.array([w for _, _, w in rows])


def packed(weighed: Sequence[Weighed], max_tokens: int, **options: Any) -> list[Batch]:
    return pack_calls(*columns_of(weighed), max_tokens, **options)


def naive_drop(weighed: Sequence[Weighed], *, keep_zero_advantage: bool) -> list[Weighed]:
    """Leave out what has no gradient. The first token of a trajectory is never predicted."""
    return [
        w
        for w in weighed
        if w.weight != 0 and (keep_zero_advantage or w.advantage != 0) and any(w.trajectory.sampled[1:])
    ]


def naive_merge(weighed: Sequence[Weighed], *, by_sampler_logprobs: bool, by_advantage: bool = False) -> list[Weighed]:
    """Make identical trajectories one, one after the other: weights summed, advantages averaged by weight."""
    merged: dict[Any, Weighed] = {}
    for w in weighed:
        t = w.trajectory
        key = (tuple(t.tokens), tuple(t.sampled), tuple(t.logprobs) if by_sampler_logprobs else ())
        key += (w.advantage if by_advantage else (w.advantage > 0) - (w.advantage < 0),)
        first = merged.get(key)
        if first is None:
            merged[key] = w
        else:
            weight = first.weight + w.weight
            advantage = (first.weight * first.advantage + w.weight * w.advantage) / weight
            merged[key] = replace(first, weight=weight, advantage=advantage)
    return list(merged.values())


def batches(count: int = 6, seed: int = 0, max_tokens: int = 16, scale: float = 1.0) -> list[Batch]:
    """Return micro-batches of random trajectories with advantages of either sign."""
    rng = np.random.default_rng(seed)
    weighed = []
    for number in range(count):
        sampled = np.arange(12) >= 3
        tokens = rng.integers(1, 257, 12).astype(np.int32)
        trajectory = Trajectory(tokens, sampled, np.full(12, -5, np.float32), 0)
        weighed.append(Weighed(trajectory, scale * (-1) ** number * (1 + number), 0.1))
    return packed(weighed, max_tokens)
