"""Micro-batches of ragged trajectories, from plain arrays to plain arrays: plan, then fill. For any trainer.

Trajectories without weight or without a sampled token are left out, and so are the tokens after the last sampled one.
Every rank plans the same for all and fills only what it runs itself; all ranks run equally many micro-batches, so that
their collectives meet. A plan needs no tokens, only the number of rows of each trajectory (a tree needs both): a rank
may read the trajectories that it fills, and no other.

Legend: N trajectories of T tokens in all; B those of one micro-batch, M micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mgrpo import _packing
from mgrpo.engine.ragged import Values, ragged

Ints = NDArray[np.int64]
MicroBatch = dict[str, Any]  # as `_packing.fill` or `_packing.tree_fill` gives it
NONE: Ints = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Columns:
    """N trajectories, as the packer takes them. rows_N: how many leading tokens of each are computed; 0: left out."""

    tokens_T: Values
    offsets_N1: Ints
    sampled_T: Values
    rows_N: Ints
    advantages_N: NDArray[np.float64]
    weights_N: NDArray[np.float64]
    logprobs: dict[str, Values]  # by their names in `_packing.fill`


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
    """The micro-batches that one rank runs, of at most `cap` rows each: a list of them for each mini-batch (one step).

    tokens int32 or int64, sampled (true where the agent chose the token) bool or uint8, log-probs float32: ragged, in
    any form that `ragged` takes, and read where they lie. advantages, weights (N,): a trajectory's advantage and the
    weight of each of its sampled tokens, denominators included. ranks, cost, groups, mini_batches, seed as in
    `_packing.plan`. A micro-batch is what `_packing.fill` gives, in the arena's memory if there is one. A rank that has
    nothing left to run beside others gets a dummy: some trajectory, weights, action_mask and counts all 0. A mini-batch
    that no trajectory is left for is an empty list, on every rank.

    tree: tokens that trajectories begin with in common are computed once; cap counts distinct tokens. A micro-batch is
    what `_packing.tree_fill` gives, with the names of TRL's TreeRow, a dummy has weights of 0; merge as there. Refused
    with it: columns that are lists of arrays, negative weights, groups, several mini-batches, an arena.
    Raises ValueError, naming the argument, for whatever is malformed, too long for cap, or refused above.
    """
    logprobs = {"old_logprobs": old_logprobs, "sampler_logprobs": sampler_logprobs, "ref_logprobs": ref_logprobs}
    given = columns(tokens, sampled, advantages, weights, logprobs)
    if not tree:
        share = plan_batches(
            given.rows_N, cap, ranks=ranks, rank=rank, cost=cost, groups=groups, mini_batches=mini_batches, seed=seed
        )
        return fill_batches(share, given, arena)
    if groups is not None or mini_batches != 1 or arena is not None:
        raise ValueError("tree: True given with groups, mini_batches or arena: expected none of these")
    return fill_trees(plan_trees(given, cap, ranks=ranks, rank=rank, cost=cost), given, merge)


def columns(tokens: Any, sampled: Any, advantages: Any, weights: Any, logprobs: dict[str, Any]) -> Columns:
    """The arguments of `pack` as the packer takes them; log-probs that are None are left out.

    Raises ValueError if they are not of the same trajectories.
    """
    tokens_T, offsets_N1 = ragged(tokens, "tokens")
    sampled_T = _alike("sampled", sampled, offsets_N1)
    rows_N = _packing.trainable_rows(offsets_N1, sampled_T)
    weights_N = _each("weights", weights, len(rows_N), np.float64)
    return Columns(
        tokens_T,
        offsets_N1,
        sampled_T,
        np.where(weights_N == 0, 0, rows_N),
        _each("advantages", advantages, len(rows_N), np.float64),
        weights_N,
        {name: _alike(name, values, offsets_N1) for name, values in logprobs.items() if values is not None},
    )


def _alike(name: str, values: Any, offsets_N1: Ints) -> Values:
    """A column as ragged as the tokens are."""
    column, found_N1 = ragged(values, name)
    if len(found_N1) != len(offsets_N1):
        raise ValueError(f"{name}: {len(found_N1) - 1} rows given: expected {len(offsets_N1) - 1}, as tokens has")
    if (found_N1 != offsets_N1).any():
        row = int(np.flatnonzero(np.diff(found_N1) != np.diff(offsets_N1))[0])
        lengths = (int(np.diff(o)[row]) for o in (found_N1, offsets_N1))
        raise ValueError("{}: row {} has {} entries: expected {}, as tokens has".format(name, row, *lengths))
    return column


def _each(name: str, values: Any, count: int, dtype: Any = None) -> NDArray[Any]:
    found_N = np.asarray(values, dtype)
    if found_N.shape != (count,):
        raise ValueError(
            f"{name}: an array of shape {found_N.shape} given: expected ({count},), one of each trajectory"
        )
    return found_N


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
    _check_rank(ranks, rank)
    kept_K = np.flatnonzero(rows_N)
    groups_K = None if groups is None else _each("groups", groups, len(rows_N))[kept_K]
    bounds_M1, places_K, steps_S1 = _packing.plan(
        rows_N[kept_K], cap, ranks, cost, groups_N=groups_K, mini_batches=mini_batches, seed=seed, allow_empty=True
    )
    bins = [Bin(kept_K[places_K[a:b]]) for a, b in pairwise(bounds_M1.tolist())]
    dummy = Bin(_shortest(rows_N), dummy=True)
    return [_share(bins[a:b], dummy, ranks, rank) for a, b in pairwise(steps_S1.tolist())]


def plan_trees(
    given: Columns, cap: int, *, ranks: int = 1, rank: int = 0, cost: tuple[float, float] = (1.0, 0.0)
) -> Share:
    """The share of one rank in a plan of prefix trees of at most `cap` tokens, all in one mini-batch.

    The dearest run side by side. cost: a token at depth i costs what row i of a sequence does in `_packing.plan`. A
    trajectory that is left out costs one token at most. Raises ValueError if a trajectory is empty, or if a column is a
    list of arrays.
    """
    _check_rank(ranks, rank)
    if not given.rows_N.any():
        return [[]]
    tokens_T, rows_N = _flat("tokens", given.tokens_T), np.maximum(given.rows_N, 1)

    def planned(cap: int) -> list[Bin]:
        """The dearest first."""
        bounds_M1, ids_N, shared_N = _packing.tree_plan(tokens_T, given.offsets_N1, rows_N, cap)
        trees = [(ids_N[a:b], shared_N[a:b]) for a, b in pairwise(bounds_M1.tolist())]
        live = [Bin(*tree, _cost(rows_N, *tree, cost)) for tree in trees if given.rows_N[tree[0]].any()]
        return sorted(live, key=lambda b: -b.cost)

    bins = planned(cap) if ranks == 1 else _evened(planned, int(rows_N.max()), cap, ranks)
    bins += [Bin(NONE)] * (-len(bins) % ranks)
    return [_share(bins, Bin(_shortest(given.rows_N), np.zeros(1, np.int64), dummy=True), ranks, rank)]


def _cost(rows_N: Ints, ids_B: Ints, shared_B: Ints, cost: tuple[float, float]) -> float:
    ends_B, begins_B = rows_N[ids_B].astype(np.float64), shared_B.astype(np.float64)
    return float(cost[0] * (ends_B - begins_B).sum() + cost[1] * (ends_B**2 - begins_B**2).sum())


def _evened(planned: Callable[[int], list[Bin]], least: int, cap: int, ranks: int) -> list[Bin]:
    """Of some plans of no more rounds than that of `cap` takes, the fastest: smaller trees keep more ranks busy."""
    best = planned(cap)
    most = len(best) + -len(best) % ranks
    low, high = least, cap
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


def _check_rank(ranks: int, rank: int) -> None:
    if ranks < 1:
        raise ValueError(f"ranks: {ranks} given: expected at least 1")
    if not 0 <= rank < ranks:
        raise ValueError(f"rank: {rank} given: expected from 0 to below the {ranks} ranks")


def own(share: Share) -> tuple[Ints, Share]:
    """The trajectories that a rank has to read (K,), in ascending order, and its share in terms of these alone."""
    ids_K = np.unique(np.concatenate([NONE, *(b.ids_B for b in chain(*share))]))
    return ids_K, [[replace(b, ids_B=np.searchsorted(ids_K, b.ids_B)) for b in bins] for bins in share]


def fill_batches(share: Share, given: Columns, arena: _packing.Arena | None = None) -> list[list[MicroBatch]]:
    """The micro-batches of a share of `plan_batches`, in one pass, as `pack` gives them."""
    bins = list(chain(*share))
    filled = _packing.fill(
        given.tokens_T,
        given.offsets_N1,
        given.sampled_T,
        np.concatenate([NONE, *(b.ids_B for b in bins)]),
        given.rows_N,
        given.advantages_N,
        given.weights_N,
        bins_M1=np.cumsum([0, *(len(b.ids_B) for b in bins)]),
        arena=arena,
        **_options(given.logprobs),
    )
    return _nested(share, filled)


def fill_trees(share: Share, given: Columns, merge: bool = True) -> list[list[MicroBatch]]:
    """The micro-batches of a share of `plan_trees`, as `pack` gives them.

    Raises ValueError if a column is a list of arrays, or a weight negative.
    """
    tokens_T, sampled_T = _flat("tokens", given.tokens_T), _flat("sampled", given.sampled_T)
    logprobs = _options({name: _flat(name, column) for name, column in given.logprobs.items()})
    rows_N, facts = np.maximum(given.rows_N, 1), (given.advantages_N, given.weights_N)

    def fill(tree: Bin) -> MicroBatch:
        ids_B, shared_B = tree.ids_B, tree.shared_B
        assert shared_B is not None
        return _packing.tree_fill(
            tokens_T, given.offsets_N1, sampled_T, ids_B, shared_B, rows_N, *facts, **logprobs, merge=merge
        )

    return _nested(share, map(fill, chain(*share)))


def _options(logprobs: dict[str, Values]) -> dict[str, Any]:
    """As fill and tree_fill call them."""
    return {f"{name}_T": column for name, column in logprobs.items()}


def _flat(name: str, column: Values) -> NDArray[Any]:
    if isinstance(column, list):
        raise ValueError(
            f"{name}: a list of arrays given: expected one flat array for a tree; np.concatenate copies them"
        )
    return column


def _nested(share: Share, filled: Iterable[MicroBatch]) -> list[list[MicroBatch]]:
    """Mini-batch by mini-batch, and nothing in a dummy counts."""
    rest = iter(filled)
    return [[_silenced(next(rest)) if b.dummy else next(rest) for b in bins] for bins in share]


def _silenced(batch: MicroBatch) -> MicroBatch:
    for name in ("weights", "action_mask"):
        if name in batch:
            batch[name].fill(0)
    return batch | {name: 0 * batch[name] for name in ("actions", "weight_sum") if name in batch}
