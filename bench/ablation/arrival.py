"""Group a sub-agent's samples by arrival instead of by query, as the public code of M-GRPO's authors does.

In that code a sub-agent's samples wait in one queue, and each group takes the next fixed number of them. Here the
samples are sorted by the time at which their rollouts ended, and cut into groups with equal numbers of aligned copies.
There are as many groups as queries with samples.
"""

from __future__ import annotations

import numpy as np

from mgrpo.engine import advantages
from mgrpo.engine.batch.advantages import Origin
from mgrpo.engine.types import MAIN


def by_arrival(rewards: np.ndarray, offsets: np.ndarray, weights: np.ndarray, origin: Origin) -> np.ndarray:
    """Estimate advantages for `algorithm.advantage`: rewards, weights (N,), offsets (Q + 1,) -> (N,) float64.

    The main agent's groups stay those of the queries.
    """
    if origin.agent == MAIN:
        return advantages(rewards, offsets, weights).values
    order = np.argsort(origin.seconds, kind="stable")  # calls of one rollout stay together
    found = np.empty(len(rewards))
    found[order] = advantages(
        rewards[order], cuts(weights[order], int((np.diff(offsets) > 0).sum())), weights[order]
    ).values
    return found


def cuts(weights: np.ndarray, groups: int) -> np.ndarray:
    """Return bounds (G + 1,) of groups of equal weight: each begins where the weight before it reaches its share."""
    before = np.cumsum(weights) - weights
    share = weights.sum() / max(groups, 1)
    return np.append(np.searchsorted(before, share * np.arange(groups) - 1e-9 * share), len(weights))
