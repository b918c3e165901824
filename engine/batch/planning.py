"""Which trajectories make up which micro-batch of which rank.

Every rank computes the whole plan and takes its share: what stands at its turn in each round of `ranks` micro-batches.
All ranks run equally many, so that their collectives meet; one that has none left in a round runs a dummy.

Legend: N trajectories, B those of one micro-batch, M micro-batches; K trajectories that are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mgrpo import _packing

Ints = NDArray[np.int64]
NONE: Ints = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Bin:
    """The trajectories of one micro-batch; in a tree, the first shared_B tokens of each are those of the one before.

    dummy: other ranks have a micro-batch here and this rank has none. It runs some trajectory, without weight.
    """

    ids_B: Ints
    shared_B: Ints | None = None
    cost: float = 0.0  # of a tree
    dummy: bool = False


Share = list[list[Bin]]  # what one rank runs: of each mini-batch, its micro-batches


def plan_batches(
    rows_N: Ints,
    cap: int,
    *,
    ranks: int = 1,
    rank: int = 0,
    cost: tuple[float, float] = (1.0, 0.0),
    groups: Any = None,
    mini_batches: int = 1,
    seed: int = 0,
) -> Share:
    """The share of one rank in a plan of all trajectories that have rows. All arguments as of `_packing.plan`."""
    _check_ranks(ranks, rank)
    kept_K = np.flatnonzero(rows_N)
    groups_K = None if groups is None else each_of("groups", groups, len(rows_N))[kept_K]
    bounds_M1, places_K, steps_S1 = _packing.plan(
        rows_N[kept_K], cap, ranks, cost, groups_N=groups_K, mini_batches=mini_batches, seed=seed, allow_empty=True
    )
    bins = [Bin(kept_K[places_K[a:b]]) for a, b in pairwise(bounds_M1.tolist())]
    dummy = Bin(_shortest(rows_N), dummy=True)
    return [_share(bins[a:b], dummy, ranks, rank) for a, b in pairwise(steps_S1.tolist())]


def plan_trees(
    tokens_T: NDArray[Any],
    offsets_N1: Ints,
    rows_N: Ints,
    cap: int,
    *,
    ranks: int = 1,
    rank: int = 0,
    cost: tuple[float, float] = (1.0, 0.0),
) -> Share:
    """The share of one rank in a plan of prefix trees of at most `cap` distinct tokens, all in one mini-batch.

    tokens_T, offsets_N1 as in `_packing.tree_plan`; rows_N: 0 for what is left out, which yet may cost one token. cost:
    a token at depth i costs what row i of a sequence does in `_packing.plan`; the dearest trees run side by side.
    Raises ValueError if rows or an argument are out of range, or a trajectory is empty.
    """
    _check_ranks(ranks, rank)
    if len(cost) != 2 or not all(math.isfinite(part) and part >= 0 for part in cost):
        raise ValueError(f"cost: {cost} given: expected two finite numbers, none negative")
    if not rows_N.any():
        return [[]]
    computed_N = np.maximum(rows_N, 1)

    def planned(cap: int) -> list[Bin]:
        """The dearest first."""
        bounds_M1, ids_N, shared_N = _packing.tree_plan(tokens_T, offsets_N1, computed_N, cap)
        trees = [(ids_N[a:b], shared_N[a:b]) for a, b in pairwise(bounds_M1.tolist())]
        live = [Bin(*tree, _cost(computed_N, *tree, cost)) for tree in trees if rows_N[tree[0]].any()]
        return sorted(live, key=lambda b: -b.cost)

    bins = planned(cap) if ranks == 1 else _evened(planned, int(rows_N.max()), cap, ranks)
    bins += [Bin(NONE)] * (-len(bins) % ranks)
    return [_share(bins, Bin(_shortest(rows_N), np.zeros(1, np.int64), dummy=True), ranks, rank)]


def _cost(rows_N: Ints, ids_B: Ints, shared_B: Ints, cost: tuple[float, float]) -> float:
    ends_B, begins_B = rows_N[ids_B].astype(np.float64), shared_B.astype(np.float64)
    return float(cost[0] * (ends_B - begins_B).sum() + cost[1] * (ends_B**2 - begins_B**2).sum())


def _evened(planned: Callable[[int], list[Bin]], least: int, cap: int, ranks: int) -> list[Bin]:
    """Of some plans of no more rounds than that of `cap` takes, the fastest: smaller trees keep more ranks busy."""
    best = planned(cap)
    most = len(best) + -len(best) % ranks
    low, high = least - 1, cap
    while high - low > max(1, cap // 16):
        middle = (low + high) // 2
        trial = planned(middle)
        if len(trial) > most:
            low = middle
        else:
            high, best = middle, min(best, trial, key=lambda bins: sum(b.cost for b in bins[::ranks]))
    return best


def _share(bins: Sequence[Bin], dummy: Bin, ranks: int, rank: int) -> list[Bin]:
    """Every rank's turn comes once a round. What no rank has anything of is no mini-batch."""
    if not any(len(b.ids_B) for b in bins):
        return []
    return [b if len(b.ids_B) else dummy for b in bins[rank::ranks]]


def _shortest(rows_N: Ints) -> Ints:
    """The first of the trajectories with the fewest rows, of those that have any, as an array of one id or none."""
    kept_K = np.flatnonzero(rows_N)
    return kept_K[np.argsort(rows_N[kept_K], kind="stable")[:1]]


def _check_ranks(ranks: int, rank: int) -> None:
    if ranks < 1:
        raise ValueError(f"ranks: {ranks} given: expected at least 1")
    if not 0 <= rank < ranks:
        raise ValueError(f"rank: {rank} given: expected from 0 to below the {ranks} ranks")


def own(share: Share) -> tuple[Ints, Share]:
    """The trajectories that a rank has to read (K,), in ascending order, and its share in terms of these alone."""
    ids_K = np.unique(np.concatenate([NONE, *(b.ids_B for b in chain(*share))]))
    return ids_K, [[replace(b, ids_B=np.searchsorted(ids_K, b.ids_B)) for b in bins] for bins in share]


def each_of(name: str, values: Any, count: int, dtype: Any = None) -> NDArray[Any]:
    """As an array of one number for each trajectory. Raises ValueError, naming it, if it has another shape."""
    found_N = np.asarray(values, dtype)
    if found_N.shape != (count,):
        raise ValueError(
            f"{name}: an array of shape {found_N.shape} given: expected ({count},), one of each trajectory"
        )
    return found_N
