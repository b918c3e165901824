"""Sub-agents' samples grouped as they arrive, whatever their query: what the public code of M-GRPO's authors does.

There a sub-agent's samples wait in one queue, and a group is the next so many of it. Here they are sorted by when their
rollouts ended, and cut into as many groups as queries have any, of as many aligned copies each.
"""

from __future__ import annotations

import numpy as np

from mgrpo.engine import advantages
from mgrpo.engine.batch.advantages import Origin
from mgrpo.engine.types import MAIN


def by_arrival(rewards: np.ndarray, offsets: np.ndarray, weights: np.ndarray, origin: Origin) -> np.ndarray:
    """An estimator for `algorithm.advantage`: rewards, weights (N,), offsets (Q + 1,) -> advantages (N,), float64.

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
    """Bounds (G + 1,) of groups of like weight: one begins with the first sample that the weight before it allows."""
    before = np.cumsum(weights) - weights
    share = weights.sum() / max(groups, 1)
    return np.append(np.searchsorted(before, share * np.arange(groups) - 1e-9 * share), len(weights))
