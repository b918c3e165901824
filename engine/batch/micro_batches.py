"""From weighted trajectories to micro-batches, computing nothing that adds nothing.

Before packing, exactly: trajectories of weight zero, without an action or (where neither KL nor entropy asks for them)
of advantage zero are left out, their share of every denominator kept; identical trajectories become one; the tokens
after a trajectory's last action are cut off. What is left is packed (packing.py) and copied to the device ahead of use.

Legend: N trajectories, P rows of a micro-batch, B its sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mgrpo import _packing
from mgrpo.engine.batch import packing
from mgrpo.engine.batch.planning import own, plan_batches
from mgrpo.engine.types import Trajectory


class Summary(Protocol):
    """What planning must know of a trajectory, and can without its tokens: `Trajectory` says it, and so does the store.

    rows: how many of its tokens are computed; the digests are those of trajectories that are alike.
    """

    @property
    def rows(self) -> int: ...
    @property
    def digest(self) -> str: ...
    @property
    def sampler_digest(self) -> str: ...


@dataclass(frozen=True)
class Weighed:
    """A trajectory, or the store's record of it, its advantage and the loss weight of each of its action tokens."""

    trajectory: Summary
    advantage: float
    weight: float


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Row i is a token whose successor, targets_P[i], is predicted.

    input_ids, positions, targets (P,) int64; cu_seqlens (B+1,) int32; advantages, weights (P,) float32 (weight 0: the
    row does not count); log-probs (P,) float32, in nats: the sampler's, of the weights that the ratio is against, of
    the KL's reference.
    """

    input_ids_P: Tensor
    positions_P: Tensor
    targets_P: Tensor
    cu_seqlens_B1: Tensor
    max_seqlen: int
    advantages_P: Tensor
    weights_P: Tensor
    sampler_logprobs_P: Tensor | None = None
    old_logprobs_P: Tensor | None = None
    ref_logprobs_P: Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids_P)


def drop(weighed: Sequence[Weighed], *, keep_zero_advantage: bool) -> list[Weighed]:
    """Leave out what has no gradient."""
    return [w for w in weighed if w.weight != 0 and (keep_zero_advantage or w.advantage != 0) and w.trajectory.rows > 0]


def merge(weighed: Sequence[Weighed], *, by_sampler_logprobs: bool, by_advantage: bool = False) -> list[Weighed]:
    """Make identical trajectories one: weights summed, advantages averaged by weight.

    Exact because every term of the loss is linear in the weight, and the policy term is positively homogeneous in the
    advantage among those of one sign. by_sampler_logprobs, by_advantage: they are alike only if the sampler's log-probs
    are too, or the advantages, of which a user's own objective may be any function.
    """
    merged: dict[tuple[str, float], Weighed] = {}
    for w in weighed:
        digest = w.trajectory.sampler_digest if by_sampler_logprobs else w.trajectory.digest
        key = (digest, w.advantage if by_advantage else float(np.sign(w.advantage)))
        first = merged.get(key)
        if first is None:
            merged[key] = w
        else:
            weight = first.weight + w.weight
            advantage = (first.weight * first.advantage + w.weight * w.advantage) / weight
            merged[key] = replace(first, weight=weight, advantage=advantage)
    return list(merged.values())


def pack(
    weighed: Sequence[Weighed],
    max_tokens: int,
    *,
    read: Callable[[list[Any]], list[Trajectory]] = list,
    ranks: int = 1,
    rank: int = 0,
    arena: _packing.Arena | None = None,
) -> list[Batch]:
    """The micro-batches of one rank, of at most `max_tokens` rows, in the arena's memory if one is given.

    read: the trajectories that some summaries speak of; asked once, for those that this rank runs. Their own arrays are
    read where they lie. As many micro-batches for every rank: one that has nothing left to run beside others gets the
    shortest trajectory without weight. Raises ValueError if one trajectory has more rows.
    """
    rows_N = np.array([w.trajectory.rows if w.weight else 0 for w in weighed], np.int64)
    if (longest := rows_N.max(initial=0)) > max_tokens:
        raise ValueError(
            f"compute.max_tokens: {max_tokens} given: expected at least {longest}, the longest trajectory's tokens"
        )
    ids_K, share = own(plan_batches(rows_N, max_tokens, ranks=ranks, rank=rank))
    mine = [weighed[i] for i in ids_K]
    trajectories = read([w.trajectory for w in mine])
    given = packing.columns(
        [t.tokens for t in trajectories],
        [t.sampled for t in trajectories],
        [w.advantage for w in mine],
        [w.weight for w in mine],
        {"sampler_logprobs": [t.logprobs for t in trajectories]},
    )
    (filled,) = packing.fill_batches(share, given, arena)
    return [as_batch(flat) for flat in filled]


def as_batch(batch: Batch | packing.MicroBatch) -> Batch:
    """What `packing.pack` gives as tensors, over the same memory. Raises ValueError for a prefix tree."""
    if isinstance(batch, Batch):
        return batch
    if "cu_seqlens" not in batch:
        raise ValueError(f"batch: columns {sorted(batch)} given: expected a micro-batch of pack, with tree=False")
    names = [field.name for field in fields(Batch) if field.name.endswith("_P")]
    columns = {name: torch.from_numpy(batch[name[:-2]]) for name in names if name[:-2] in batch}
    cu_seqlens_B1 = torch.from_numpy(batch["cu_seqlens"])
    return Batch(cu_seqlens_B1=cu_seqlens_B1, max_seqlen=int(batch["max_seqlen"]), **columns)


def one_sequence(tokens: Sequence[int], device: torch.device) -> Batch:
    """A micro-batch in which every token after the first counts."""
    ids_T, rows = torch.tensor(tokens, device=device), len(tokens) - 1
    positions_P, ones_P = torch.arange(rows, device=device), torch.ones(rows, device=device)
    cu_seqlens_B1 = torch.tensor([0, rows], dtype=torch.int32, device=device)
    return Batch(ids_T[:-1], positions_P, ids_T[1:], cu_seqlens_B1, rows, ones_P, ones_P)


def make_arena(device: torch.device) -> _packing.Arena:
    """Memory for `pack`, used again by a later step: pinned where batches go to a GPU from."""
    if device.type != "cuda":
        return _packing.Arena()
    return _packing.Arena(lambda size: torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy())


def to_device(batch: Batch, device: torch.device, *, non_blocking: bool = False) -> Batch:
    """The same batch on a device. non_blocking: as of `Tensor.to`."""
    moved: dict[str, Any] = {name: value.to(device, non_blocking=non_blocking) for name, value in tensors(batch)}
    return replace(batch, **moved)


def tensors(batch: Batch) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in vars(batch).items() if isinstance(value, Tensor)]


def prefetch(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on a device. To a GPU each is copied, from pinned memory, while the one before is worked on."""
    if device.type != "cuda":
        yield from (to_device(batch, device) for batch in batches)
        return
    side, ahead = torch.cuda.Stream(device), None
    try:
        for batch in batches:
            now, ahead = ahead, _Copy(batch, device, side)
            if now is not None:
                yield now.arrived()
                now.event.synchronize()  # before what it reads may go
        if ahead is not None:
            yield ahead.arrived()
    finally:
        side.synchronize()  # a consumer that stops early leaves copies under way


class _Copy:
    """A batch on its way to a GPU, on a stream of its own. Holds the host's memory, which the copy reads."""

    def __init__(self, batch: Batch, device: torch.device, stream: torch.cuda.Stream):
        self.batch, self.device = batch, device
        with torch.cuda.stream(stream):
            self.moved = to_device(batch, device, non_blocking=True)
            self.event = stream.record_event()

    def arrived(self) -> Batch:
        """For what the present stream does from here on, and until that is done."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self.event)
        for _, value in tensors(self.moved):
            value.record_stream(stream)
        return self.moved
