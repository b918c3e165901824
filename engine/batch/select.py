"""Choose the trajectories that a step has to compute, exactly: drop those without a gradient, merge identical ones.

Legend: N trajectories, K of them with a gradient, M distinct ones among these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mgrpo.engine.batch.advantages import Call, Credit
from mgrpo.kernels import Objective

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Merged(NamedTuple):
    """Hold distinct trajectories: the index of the first of each (M,) int64, ascending; adv and weight (M,) float64."""

    ids: Ints
    adv: Floats
    weight: Floats


def compact(credit: Credit[Call], objective: Objective) -> tuple[list[Call], Floats, Floats]:
    """Return the distinct trajectories that the objective has a gradient for, their adv and their weight, (M,) each."""
    custom = objective.rule is not None
    by_sampler = custom or objective.sampler_cap is not None
    rows_N = np.array([call.rows for call in credit.calls], np.int64)
    ids_K = drop(rows_N, credit.adv, credit.weight, keep_zero_advantage=objective.needs_every_row)
    live = [credit.calls[i] for i in ids_K]
    digests_K = [call.sampler_digest if by_sampler else call.digest for call in live]
    found = merge(digests_K, credit.adv[ids_K], credit.weight[ids_K], by_advantage=custom)
    return [live[i] for i in found.ids], found.adv, found.weight


def drop(rows_N: Ints, adv_N: Floats, weight_N: Floats, *, keep_zero_advantage: bool) -> Ints:
    """Return the indices of the trajectories that have a gradient, in ascending order.

    Left out are trajectories without a row (no token of them was sampled), of weight 0, and, unless
    keep_zero_advantage, of advantage 0. Their share of every denominator stays in the weights of the others.
    """
    return np.flatnonzero((rows_N > 0) & (weight_N != 0) & (keep_zero_advantage | (adv_N != 0)))


def merge(digests_N: Sequence[str], adv_N: Floats, weight_N: Floats, *, by_advantage: bool = False) -> Merged:
    """Make identical trajectories one: sum their weights (all > 0) and average their advantages by weight.

    Trajectories are identical if their digests are equal and their advantages have the same sign (by_advantage: are
    equal). This is exact because every term of the loss is linear in the weight, and the policy term is positively
    homogeneous in the advantage among those of one sign. An objective of the user's own may be any function of the
    advantage, so it needs by_advantage.
    """
    _, digest_N = np.unique(np.asarray(digests_N, np.str_), return_inverse=True)
    _, side_N = np.unique(adv_N if by_advantage else np.sign(adv_N), return_inverse=True)
    _, first_U, group_N = np.unique(digest_N * len(adv_N) + side_N, return_index=True, return_inverse=True)
    ids_M = np.sort(first_U)
    place_N = np.argsort(np.argsort(first_U))[group_N]  # of each trajectory, its place in ids_M
    adv_M, weight_M = adv_N[ids_M], weight_N[ids_M]
    for members in _rounds(place_N):
        m = place_N[members]
        total = weight_M[m] + weight_N[members]
        adv_M[m] = (weight_M[m] * adv_M[m] + weight_N[members] * adv_N[members]) / total
        weight_M[m] = total
    return Merged(ids_M, adv_M, weight_M)


def _rounds(place_N: Ints) -> list[Ints]:
    """Return, for each round after the first, the next index of every place that has one left.

    So sums are taken in the order of the indices, and no bit of a result depends on which other trajectories are
    merged.
    """
    order_N = np.argsort(place_N, kind="stable")
    counts_M = np.bincount(place_N)
    begins_M = np.cumsum(counts_M) - counts_M
    round_N = np.arange(len(place_N)) - np.repeat(begins_M, counts_M)
    by_round_N = order_N[np.argsort(round_N, kind="stable")]
    return np.split(by_round_N, np.cumsum(np.bincount(round_N)))[1:-1]
