"""From weighted trajectories to micro-batches, computing nothing that adds nothing.

Before packing, exactly: trajectories of weight zero, without an action or (where neither KL nor entropy asks for them)
of advantage zero are left out, their share of every denominator kept; identical trajectories become one; the tokens
after a trajectory's last action are cut off. What is left is planned into micro-batches and filled into flat buffers.

Legend: N trajectories, P rows of a micro-batch, B its sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mgrpo import _packing
from mgrpo.engine.types import Trajectory


@dataclass(frozen=True)
class Weighed:
    """A trajectory with its advantage and the loss weight of each of its action tokens."""

    trajectory: Trajectory
    advantage: float
    weight: float


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Row i is a token whose successor, targets_P[i], is predicted.

    input_ids, positions, targets (P,) int64; cu_seqlens (B+1,) int32; advantages, weights (P,) float32 (weight 0: the
    row does not count); sampler_logprobs (P,) float32.
    """

    input_ids_P: Tensor
    positions_P: Tensor
    targets_P: Tensor
    cu_seqlens_B1: Tensor
    max_seqlen: int
    advantages_P: Tensor
    weights_P: Tensor
    sampler_logprobs_P: Tensor

    def __len__(self) -> int:
        return len(self.input_ids_P)


def drop(weighed: Sequence[Weighed], *, keep_zero_advantage: bool) -> list[Weighed]:
    """Leave out what has no gradient."""
    return [
        w
        for w in weighed
        if w.weight != 0 and (keep_zero_advantage or w.advantage != 0) and w.trajectory.sampled[1:].any()
    ]


def merge(weighed: Sequence[Weighed], *, by_sampler_logprobs: bool) -> list[Weighed]:
    """Make identical trajectories one: weights summed, advantages averaged by weight.

    Exact because every term of the loss is linear in the weight, and the policy term is positively homogeneous in the
    advantage among those of one sign. by_sampler_logprobs: they are alike only if the sampler's log-probs are too.
    """
    merged: dict[tuple[bytes | float, ...], Weighed] = {}
    for w in weighed:
        t = w.trajectory
        same = (t.tokens.tobytes(), t.sampled.tobytes(), float(np.sign(w.advantage)))
        key = (*same, t.logprobs.tobytes()) if by_sampler_logprobs else same
        first = merged.get(key)
        if first is None:
            merged[key] = w
        else:
            weight = first.weight + w.weight
            advantage = (first.weight * first.advantage + w.weight * w.advantage) / weight
            merged[key] = replace(first, weight=weight, advantage=advantage)
    return list(merged.values())


def pack(weighed: Sequence[Weighed], max_tokens: int) -> list[Batch]:
    """Plan and fill micro-batches of at most `max_tokens` rows. Raises ValueError if one trajectory has more."""
    if not weighed:
        return []
    trajectories = [w.trajectory for w in weighed]
    tokens_T = np.concatenate([t.tokens for t in trajectories])
    sampled_T = np.concatenate([t.sampled for t in trajectories])
    logprobs_T = np.concatenate([t.logprobs for t in trajectories])
    offsets_N1 = np.cumsum([0, *map(len, trajectories)])
    rows_N = _packing.trainable_rows(offsets_N1, sampled_T)
    if rows_N.max() > max_tokens:
        raise ValueError(
            f"compute.max_tokens: {max_tokens} given: expected at least {rows_N.max()}, the longest trajectory's tokens"
        )
    bins_M1, ids_N, _ = _packing.plan(rows_N, max_tokens)
    advantages_N = np.array([w.advantage for w in weighed])
    weights_N = np.array([w.weight for w in weighed])
    return [
        _batch(
            _packing.fill(
                tokens_T,
                offsets_N1,
                sampled_T,
                ids_N[start:stop],
                rows_N,
                advantages_N,
                weights_N,
                sampler_logprobs_T=logprobs_T,
            )
        )
        for start, stop in pairwise(bins_M1.tolist())
    ]


def _batch(flat: dict[str, np.ndarray]) -> Batch:
    return Batch(
        input_ids_P=torch.from_numpy(flat["input_ids"]),
        positions_P=torch.from_numpy(flat["positions"]),
        targets_P=torch.from_numpy(flat["targets"]),
        cu_seqlens_B1=torch.from_numpy(flat["cu_seqlens"]),
        max_seqlen=int(flat["max_seqlen"]),
        advantages_P=torch.from_numpy(flat["advantages"]),
        weights_P=torch.from_numpy(flat["weights"]),
        sampler_logprobs_P=torch.from_numpy(flat["sampler_logprobs"]),
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The same batch on a device."""
    moved: dict[str, Any] = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in vars(batch).items()}
    return Batch(**moved)
