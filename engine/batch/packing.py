"""Micro-batches of ragged trajectories, from plain arrays to plain arrays: plan, then fill. For any trainer.

Trajectories without weight or without a sampled token are left out, and so are the tokens after the last sampled one.
Every rank plans the same for all and fills only what it runs itself; all ranks run equally many micro-batches, so that
their collectives meet. A plan needs no tokens, only the number of rows of each trajectory (a tree needs both): a rank
may read the trajectories that it fills, and no other.

Legend: N trajectories of T tokens in all; B those of one micro-batch, M micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mgrpo import _packing
from mgrpo.engine.batch.planning import NONE, Ints, Share, each_of, plan_batches, plan_trees
from mgrpo.engine.batch.ragged import Values, ragged

MicroBatch = dict[str, Any]  # as `_packing.fill` or `_packing.tree_fill` gives it


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
    with it: columns that are lists of arrays, negative weights, groups, several mini-batches.
    Raises ValueError, naming the argument, for whatever is malformed, too long for cap, or refused above.
    """
    logprobs = {"old_logprobs": old_logprobs, "sampler_logprobs": sampler_logprobs, "ref_logprobs": ref_logprobs}
    given = columns(tokens, sampled, advantages, weights, logprobs)
    if not tree:
        share = plan_batches(
            given.rows_N, cap, ranks=ranks, rank=rank, cost=cost, groups=groups, mini_batches=mini_batches, seed=seed
        )
        return fill_batches(share, given, arena)
    if groups is not None or mini_batches != 1:
        raise ValueError("tree: True given with groups or mini_batches: expected neither")
    tokens_T = _flat("tokens", given.tokens_T)
    share = plan_trees(tokens_T, given.offsets_N1, given.rows_N, cap, ranks=ranks, rank=rank, cost=cost)
    return fill_trees(share, given, merge, arena)


def columns(tokens: Any, sampled: Any, advantages: Any, weights: Any, logprobs: dict[str, Any]) -> Columns:
    """The arguments of `pack` as the packer takes them; log-probs that are None are left out.

    Raises ValueError if they are not of the same trajectories.
    """
    tokens_T, offsets_N1 = ragged(tokens, "tokens")
    sampled_T = _alike("sampled", sampled, offsets_N1)
    rows_N = _packing.trainable_rows(offsets_N1, sampled_T)
    weights_N = each_of("weights", weights, len(rows_N), np.float64)
    return Columns(
        tokens_T,
        offsets_N1,
        sampled_T,
        np.where(weights_N == 0, 0, rows_N),
        each_of("advantages", advantages, len(rows_N), np.float64),
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


def fill_trees(
    share: Share, given: Columns, merge: bool = True, arena: _packing.Arena | None = None
) -> list[list[MicroBatch]]:
    """The micro-batches of a share of `plan_trees`, in one pass, as `pack` gives them.

    Raises ValueError if a column is a list of arrays, or a weight negative.
    """
    bins = list(chain(*share))
    filled = _packing.tree_fill(
        _flat("tokens", given.tokens_T),
        given.offsets_N1,
        _flat("sampled", given.sampled_T, np.bool_),
        np.concatenate([NONE, *(b.ids_B for b in bins)]),
        np.concatenate([NONE, *(b.shared_B for b in bins if b.shared_B is not None)]),
        np.maximum(given.rows_N, 1),
        given.advantages_N,
        given.weights_N,
        merge=merge,
        bins_M1=np.cumsum([0, *(len(b.ids_B) for b in bins)]),
        arena=arena,
        **_options({name: _flat(name, column, np.float32) for name, column in given.logprobs.items()}),
    )
    return _nested(share, filled)


def _options(logprobs: dict[str, Values]) -> dict[str, Any]:
    """As fill and tree_fill call them."""
    return {f"{name}_T": column for name, column in logprobs.items()}


def _flat(name: str, column: Values, dtype: Any = np.int64) -> NDArray[Any]:
    """The dtype is that of no rows at all."""
    if not isinstance(column, list):
        return column
    if column:
        raise ValueError(
            f"{name}: a list of arrays given: expected one flat array for a tree; np.concatenate copies them"
        )
    return np.zeros(0, dtype)


def _nested(share: Share, filled: Iterable[MicroBatch]) -> list[list[MicroBatch]]:
    """Mini-batch by mini-batch, and nothing in a dummy counts."""
    rest = iter(filled)
    return [[_silenced(next(rest)) if b.dummy else next(rest) for b in bins] for bins in share]


def _silenced(batch: MicroBatch) -> MicroBatch:
    for name in ("weights", "action_mask"):
        if name in batch:
            batch[name].fill(0)
    return batch | {name: 0 * batch[name] for name in ("actions", "weight_sum") if name in batch}
