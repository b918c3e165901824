"""Pack ragged trajectories into micro-batches, from plain arrays to plain arrays, for any trainer: plan, read, fill.

Trajectories without weight or without a sampled token are left out, and so are the tokens after the last sampled one.
Every rank makes the same plan for all and fills only what it runs itself. A plan of sequences needs no tokens, only the
number of rows of each trajectory, so a rank may read just the trajectories that it fills. A prefix tree needs both.

Legend: N trajectories of T tokens in all; B trajectories of one micro-batch, M micro-batches; K trajectories that are
kept, or that one rank reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from mgrpo import _packing
from mgrpo.engine.batch.prefix_trees import pack_trees
from mgrpo.engine.batch.ragged import LOGPROBS, Columns, columns, integers, one_each
from mgrpo.engine.batch.shares import (
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

Read = Callable[[Ints], Mapping[str, Any]]


def pack(
    tokens: Any,
    sampled: Any,
    advantages: Any,
    weights: Any,
    cap: int,
    *,
    old_logprobs: Any = None,
    sampler_logprobs: Any = None,
    ref_logprobs: Any = None,
    rows: Any = None,
    read: Read | None = None,
    ranks: int = 1,
    rank: int = 0,
    cost: tuple[float, float] = (1.0, 0.0),
    groups: Any = None,
    mini_batches: int = 1,
    seed: int = 0,
    tree: bool = False,
    merge: bool = True,
    arena: _packing.Arena | None = None,
) -> list[list[MicroBatch]]:
    """Return the micro-batches that one rank runs, of at most `cap` rows each, as one list per mini-batch (step).

    tokens int32 or int64, sampled (true where the agent chose the token) bool or uint8, and log-probs float32 are
    ragged, in any form that `ragged` takes, and are read where they lie; only lists of lists are copied: of int for
    tokens, of bool or of 0 and 1 for sampled, and of float for log-probs. advantages and weights are (N,): the
    advantage of a trajectory, and the loss weight of each of its sampled tokens, denominators included. ranks, cost,
    groups, mini_batches and seed are as in `_packing.plan`. A micro-batch is what `_packing.fill` returns, in the
    arena's memory if one is given. A rank that has nothing left to run beside others gets a dummy: some trajectory,
    with weights, action_mask and counts all 0. A mini-batch without trajectories is an empty list, on every rank.

    read: for trajectories that lie elsewhere. tokens, sampled and log-probs are then None, and rows (N,) int64 is given
    instead: the index of the last sampled token of each trajectory, 0 if there is none. After the plan, read(ids (K,))
    is called once, with the trajectories of this rank in ascending order. It returns their columns by name: "tokens",
    "sampled" and, if wanted, the log-probs.

    tree: compute a prefix that trajectories share only once; cap then counts distinct tokens. A micro-batch is
    what `_packing.tree_fill` returns, with the names of TRL's TreeRow; a dummy has weights of 0; merge is as there. Not
    possible with columns that are lists of arrays, negative weights, groups, several mini-batches, or read.

    Raises ValueError, naming the argument, for input that is malformed, too long for cap, or not possible as said
    above.
    """
    named = dict(zip(LOGPROBS, (old_logprobs, sampler_logprobs, ref_logprobs), strict=True))
    if read is not None:
        _check_read(tree, rows, {"tokens": tokens, "sampled": sampled, **named})
        rows_N = integers("rows", rows)
        rows_N[one_each("weights", weights, len(rows_N), np.float64) == 0] = 0
    elif rows is not None:
        raise ValueError("rows: given without read: expected None, the number of rows follows from sampled")
    else:
        given = columns(tokens, sampled, advantages, weights, named)
        rows_N = given.rows_N
    if tree:
        if groups is not None or mini_batches != 1:
            raise ValueError("tree: True given with groups or mini_batches: expected neither")
        return pack_trees(given, cap, ranks=ranks, rank=rank, cost=cost, merge=merge, arena=arena)
    share = plan_batches(
        rows_N, cap, ranks=ranks, rank=rank, cost=cost, groups=groups, mini_batches=mini_batches, seed=seed
    )
    if read is not None:
        share, given = _read_share(read, share, rows_N, advantages, weights)
    return fill_batches(share, given, arena)


def _check_read(tree: bool, rows: Any, unread: Mapping[str, Any]) -> None:
    """Raise ValueError if `read` is given with an argument that it replaces, or without one that it needs."""
    if tree:
        raise ValueError("read: given with tree=True: expected the tokens themselves, a tree is planned from them")
    if given := [name for name, value in unread.items() if value is not None]:
        raise ValueError(f"{given[0]}: given together with read: expected None, read returns it")
    if rows is None:
        raise ValueError("rows: None given with read: expected the number of rows of each trajectory")


def _read_share(read: Read, share: Share, rows_N: Ints, advantages: Any, weights: Any) -> tuple[Share, Columns]:
    """Read the trajectories of a share; return the share in terms of these alone, and their columns."""
    ids_K = np.unique(ids_of(share))
    found = dict(read(ids_K))
    if not {"tokens", "sampled"} <= found.keys() <= {"tokens", "sampled", *LOGPROBS}:
        raise ValueError(f"read: columns {sorted(found)} returned: expected tokens, sampled and any of {LOGPROBS}")
    given = columns(
        found["tokens"],
        found["sampled"],
        one_each("advantages", advantages, len(rows_N), np.float64)[ids_K],
        one_each("weights", weights, len(rows_N), np.float64)[ids_K],
        {name: found.get(name) for name in LOGPROBS},
    )
    if (odd := np.flatnonzero(given.rows_N != rows_N[ids_K])).size:
        n, rows = ids_K[odd[0]], given.rows_N[odd[0]]
        raise ValueError(f"read: trajectory {n} with {rows} rows returned: expected {rows_N[n]}, as `rows` says")
    return [[replace(b, ids_B=np.searchsorted(ids_K, b.ids_B)) for b in bins] for bins in share], given


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
    """Return one rank's share of a plan of all trajectories that have rows. All arguments are as in `_packing.plan`."""
    check_ranks(ranks, rank)
    kept_K = np.flatnonzero(rows_N)
    groups_K = None if groups is None else one_each("groups", groups, len(rows_N))[kept_K]
    bounds_M1, places_K, steps_S1 = _packing.plan(
        rows_N[kept_K], cap, ranks, cost, groups_N=groups_K, mini_batches=mini_batches, seed=seed, allow_empty=True
    )
    bins = [Bin(kept_K[places_K[a:b]]) for a, b in pairwise(bounds_M1.tolist())]
    dummy = Bin(shortest(rows_N), dummy=True)
    return [deal(bins[a:b], dummy, ranks, rank) for a, b in pairwise(steps_S1.tolist())]


def fill_batches(share: Share, given: Columns, arena: _packing.Arena | None = None) -> list[list[MicroBatch]]:
    """Fill the micro-batches of a share of `plan_batches`, in one pass."""
    filled = _packing.fill(
        given.tokens_T,
        given.offsets_N1,
        given.sampled_T,
        ids_of(share),
        given.rows_N,
        given.advantages_N,
        given.weights_N,
        bins_M1=bounds_of(share),
        arena=arena,
        **logprob_options(given.logprobs),
    )
    return nested(share, filled)
