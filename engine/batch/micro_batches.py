"""Hold micro-batches as tensors, make those of one step, and copy them to the device ahead of use.

Legend: N trajectories, P rows of a micro-batch, B its sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mgrpo import _packing
from mgrpo.engine.batch.advantages import Call
from mgrpo.engine.batch.packing import pack
from mgrpo.engine.batch.shares import Ints, MicroBatch
from mgrpo.engine.types import Trajectory


@dataclass(frozen=True)
class Batch:
    """Hold one micro-batch. Row i is a token whose successor, targets_P[i], is predicted.

    input_ids, positions and targets are (P,) int64; cu_seqlens (B + 1,) int32; advantages and weights (P,) float32, and
    a row of weight 0 does not count. The log-probs are (P,) float32, in nats: the sampler's, those of the weights that
    the ratio is taken against, and those of the KL's reference.
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

    @classmethod
    def of(cls, batch: Batch | MicroBatch) -> Batch:
        """Return a micro-batch of `pack` as tensors over the same memory. Raises ValueError for a prefix tree."""
        if isinstance(batch, Batch):
            return batch
        if "cu_seqlens" not in batch:
            raise ValueError(f"batch: columns {sorted(batch)} given: expected a micro-batch of pack, with tree=False")
        names = [field.name for field in fields(cls) if field.name.endswith("_P")]
        columns = {name: torch.from_numpy(batch[name[:-2]]) for name in names if name[:-2] in batch}
        cu_seqlens_B1 = torch.from_numpy(batch["cu_seqlens"])
        return cls(cu_seqlens_B1=cu_seqlens_B1, max_seqlen=int(batch["max_seqlen"]), **columns)

    def __len__(self) -> int:
        return len(self.input_ids_P)


def pack_calls(
    calls: Sequence[Call],
    adv_N: NDArray[np.float64],
    weight_N: NDArray[np.float64],
    max_tokens: int,
    *,
    read: Callable[[list[Call]], Any] = list,
    ranks: int = 1,
    rank: int = 0,
    arena: _packing.Arena | None = None,
) -> list[Batch]:
    """Return the micro-batches of one rank, of at most `max_tokens` rows, in the arena's memory if one is given.

    read: returns the trajectories that some records stand for; called once, with those that this rank runs. Every rank
    gets equally many micro-batches. Raises ValueError if one trajectory has more than `max_tokens` rows.
    """
    rows_N = np.array([call.rows if weight else 0 for call, weight in zip(calls, weight_N, strict=True)], np.int64)
    if (longest := rows_N.max(initial=0)) > max_tokens:
        raise ValueError(
            f"compute.max_tokens: {max_tokens} given: expected at least {longest}, the longest trajectory's tokens"
        )

    def columns(ids_K: Ints) -> dict[str, Any]:
        trajectories: list[Trajectory] = read([calls[i] for i in ids_K])
        return {
            "tokens": [t.tokens for t in trajectories],
            "sampled": [t.sampled for t in trajectories],
            "sampler_logprobs": [t.logprobs for t in trajectories],
        }

    (batches,) = pack(
        None, None, adv_N, weight_N, max_tokens, rows=rows_N, read=columns, ranks=ranks, rank=rank, arena=arena
    )
    return [Batch.of(batch) for batch in batches]


def one_sequence(tokens: Sequence[int], device: torch.device) -> Batch:
    """Return a micro-batch of one sequence in which every token after the first counts."""
    ids_T, rows = torch.tensor(tokens, device=device), len(tokens) - 1
    positions_P, ones_P = torch.arange(rows, device=device), torch.ones(rows, device=device)
    cu_seqlens_B1 = torch.tensor([0, rows], dtype=torch.int32, device=device)
    return Batch(ids_T[:-1], positions_P, ids_T[1:], cu_seqlens_B1, rows, ones_P, ones_P)


def make_arena(device: torch.device) -> _packing.Arena:
    """Return memory for `pack` that later steps use again; it is pinned if batches are copied to a GPU from there."""
    if device.type != "cuda":
        return _packing.Arena()
    return _packing.Arena(lambda size: torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy())


def to_device(batch: Batch, device: torch.device, *, non_blocking: bool = False) -> Batch:
    """Return the same batch on a device. non_blocking is as for `Tensor.to`."""
    moved: dict[str, Any] = {name: value.to(device, non_blocking=non_blocking) for name, value in tensors(batch)}
    return replace(batch, **moved)


def tensors(batch: Batch) -> list[tuple[str, Tensor]]:
    """Return the tensors of a batch, with their names."""
    return [(name, value) for name, value in vars(batch).items() if isinstance(value, Tensor)]


def prefetch(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches on a device. Each is copied to a GPU, from pinned memory, while the previous one is used."""
    if device.type != "cuda":
        yield from (to_device(batch, device) for batch in batches)
        return
    side, ahead = torch.cuda.Stream(device), None
    try:
        for batch in batches:
            now, ahead = ahead, _Copy(batch, device, side)
            if now is not None:
                yield now.arrived()
                now.event.synchronize()  # the copy reads host memory that may be freed after this
        if ahead is not None:
            yield ahead.arrived()
    finally:
        side.synchronize()  # if the consumer stops early, copies are still under way


class _Copy:
    """Copy a batch to a GPU on a separate stream, holding the host memory that the copy reads."""

    def __init__(self, batch: Batch, device: torch.device, stream: torch.cuda.Stream):
        self.batch, self.device = batch, device
        with torch.cuda.stream(stream):
            self.moved = to_device(batch, device, non_blocking=True)
            self.event = stream.record_event()

    def arrived(self) -> Batch:
        """Return the batch for use on the current stream, which waits for the copy and keeps its memory until done."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self.event)
        for _, value in tensors(self.moved):
            value.record_stream(stream)
        return self.moved
