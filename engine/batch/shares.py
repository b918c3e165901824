"""Deal the micro-batches of a plan out to ranks.

Every rank computes the whole plan and takes its share: one micro-batch of every `ranks` in turn. All ranks run equally
many micro-batches, so that their collectives meet. A rank that has none left in a round runs a dummy.

Legend: N trajectories, B trajectories of one micro-batch, K trajectories that are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
NONE: Ints = np.zeros(0, np.int64)
MicroBatch = dict[str, Any]  # as `_packing.fill` or `_packing.tree_fill` returns it


@dataclass(frozen=True)
class Bin:
    """Name the trajectories of one micro-batch.

    In a prefix tree, each trajectory shares its first shared_B tokens with the trajectory before it. dummy: other ranks
    have a micro-batch in this round and this rank has none, so it runs some trajectory with weight 0.
    """

    ids_B: Ints
    shared_B: Ints | None = None
    cost: float = 0.0  # of a prefix tree
    dummy: bool = False


Share = list[list[Bin]]  # what one rank runs: the micro-batches of each mini-batch


def deal(bins: Sequence[Bin], dummy: Bin, ranks: int, rank: int) -> list[Bin]:
    """Return every `ranks`-th bin, beginning at `rank`, with a dummy for each empty one.

    A mini-batch in which no rank has anything is empty.
    """
    if not any(len(b.ids_B) for b in bins):
        return []
    return [b if len(b.ids_B) else dummy for b in bins[rank::ranks]]


def shortest(rows_N: Ints) -> Ints:
    """Return the first trajectory with the fewest rows, among those that have any, as an array of one id or none."""
    kept_K = np.flatnonzero(rows_N)
    return kept_K[np.argsort(rows_N[kept_K], kind="stable")[:1]]


def check_ranks(ranks: int, rank: int) -> None:
    """Raise ValueError unless there is a rank and `rank` is one of them."""
    if ranks < 1:
        raise ValueError(f"ranks: {ranks} given: expected at least 1")
    if not 0 <= rank < ranks:
        raise ValueError(f"rank: {rank} given: expected from 0 to below the {ranks} ranks")


def ids_of(share: Share) -> Ints:
    """Return the trajectories of all bins of a share, bin by bin."""
    return np.concatenate([NONE, *(b.ids_B for b in chain(*share))])


def bounds_of(share: Share) -> Ints:
    """Return where each bin begins and ends in `ids_of`, (M + 1,) for M bins."""
    return np.cumsum([0, *(len(b.ids_B) for b in chain(*share))])


def logprob_options(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return log-probs under the names that `_packing.fill` and `_packing.tree_fill` use."""
    return {f"{name}_T": column for name, column in columns.items()}


def nested(share: Share, filled: Iterable[MicroBatch]) -> list[list[MicroBatch]]:
    """Return the filled micro-batches by mini-batch; nothing in a dummy counts."""
    rest = iter(filled)
    return [[_silenced(next(rest)) if b.dummy else next(rest) for b in bins] for bins in share]


def _silenced(batch: MicroBatch) -> MicroBatch:
    """Set everything that counts to 0, arrays in place."""
    for name in ("weights", "action_mask"):
        if name in batch:
            batch[name].fill(0)
    return batch | {name: 0 * batch[name] for name in ("actions", "weight_sum") if name in batch}
