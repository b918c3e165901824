"""Plan and fill prefix trees: micro-batches in which a prefix that trajectories share is computed once.

Legend: N trajectories of T tokens in all; B trajectories of one tree, M trees.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mgrpo import _packing
from mgrpo.engine.batch.ragged import Columns, Values
from mgrpo.engine.batch.shares import (
    NONE,
    Bin,
    Ints,
    MicroBatch,
    Share,
    bounds_of,
    check_ranks,
    deal,
    ids_of,
    logprob_options,
    nested,
    shortest,
)


def pack_trees(
    given: Columns,
    cap: int,
    *,
    ranks: int,
    rank: int,
    cost: tuple[float, float],
    merge: bool,
    arena: _packing.Arena | None,
) -> list[list[MicroBatch]]:
    """Return the prefix trees of one rank, all in one mini-batch. Raises ValueError if a column is a list of arrays."""
    tokens_T = _flat("tokens", given.tokens_T)
    share = plan_trees(tokens_T, given.offsets_N1, given.rows_N, cap, ranks=ranks, rank=rank, cost=cost)
    return fill_trees(share, given, merge, arena)


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
    """Return one rank's share of a plan of prefix trees of at most `cap` distinct tokens, all in one mini-batch.

    tokens_T and offsets_N1 are as in `_packing.tree_plan`. rows_N is 0 for a trajectory that is left out, which may
    still cost one token. A token at depth i costs what row i of a sequence costs in `_packing.plan`; the most expensive
    trees run side by side. Raises ValueError if rows or an argument are out of range, or a trajectory is empty.
    """
    check_ranks(ranks, rank)
    if len(cost) != 2 or not all(math.isfinite(part) and part >= 0 for part in cost):
        raise ValueError(f"cost: {cost} given: expected two finite numbers, none negative")
    if not rows_N.any():
        return [[]]
    computed_N = np.maximum(rows_N, 1)

    def plan(cap: int) -> list[Bin]:
        bounds_M1, ids_N, shared_N = _packing.tree_plan(tokens_T, offsets_N1, computed_N, cap)
        trees = [(ids_N[a:b], shared_N[a:b]) for a, b in pairwise(bounds_M1.tolist())]
        live = [Bin(*tree, _cost(computed_N, *tree, cost)) for tree in trees if rows_N[tree[0]].any()]
        return sorted(live, key=lambda b: -b.cost)  # the most expensive first

    bins = plan(cap) if ranks == 1 else _fastest(plan, int(rows_N.max()), cap, ranks)
    bins += [Bin(NONE)] * (-len(bins) % ranks)
    return [deal(bins, Bin(shortest(rows_N), np.zeros(1, np.int64), dummy=True), ranks, rank)]


def _cost(rows_N: Ints, ids_B: Ints, shared_B: Ints, cost: tuple[float, float]) -> float:
    """Return the cost of one tree: linear and quadratic in the depth, counting only the tokens that are not shared."""
    ends_B, begins_B = rows_N[ids_B].astype(np.float64), shared_B.astype(np.float64)
    return float(cost[0] * (ends_B - begins_B).sum() + cost[1] * (ends_B**2 - begins_B**2).sum())


def _fastest(plan: Callable[[int], list[Bin]], least: int, cap: int, ranks: int) -> list[Bin]:
    """Search caps for a faster plan that needs no more rounds than `cap` does: smaller trees keep more ranks busy."""
    best = plan(cap)
    most = len(best) + -len(best) % ranks
    low, high = least - 1, cap
    while high - low > max(1, cap // 16):
        middle = (low + high) // 2
        trial = plan(middle)
        if len(trial) > most:
            low = middle
        else:
            high, best = middle, min(best, trial, key=lambda bins: sum(b.cost for b in bins[::ranks]))
    return best


def fill_trees(
    share: Share, given: Columns, merge: bool = True, arena: _packing.Arena | None = None
) -> list[list[MicroBatch]]:
    """Fill the micro-batches of a share of `plan_trees`, in one pass.

    Raises ValueError if a column is a list of arrays, or a weight negative.
    """
    filled = _packing.tree_fill(
        _flat("tokens", given.tokens_T),
        given.offsets_N1,
        _flat("sampled", given.sampled_T, np.bool_),
        ids_of(share),
        np.concatenate([NONE, *(b.shared_B for b in chain(*share) if b.shared_B is not None)]),
        np.maximum(given.rows_N, 1),
        given.advantages_N,
        given.weights_N,
        merge=merge,
        bins_M1=bounds_of(share),
        arena=arena,
        **logprob_options({name: _flat(name, column, np.float32) for name, column in given.logprobs.items()}),
    )
    return nested(share, filled)


def _flat(name: str, column: Values, dtype: Any = np.int64) -> NDArray[Any]:
    """Return a column as one array; `dtype` is that of a column without trajectories. Raises ValueError for a list."""
    if not isinstance(column, list):
        return column
    if column:
        raise ValueError(
            f"{name}: a list of arrays given: expected one flat array for a tree; np.concatenate copies them"
        )
    return np.zeros(0, dtype)
