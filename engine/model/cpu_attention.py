"""Compute causal attention over sequences of different lengths on a CPU, with a backward made of matmuls.

torch's fused attention, called once per sequence, would have a backward that takes four to six times as long on a CPU
as the same sums written as batched matmuls, at the lengths of agents' turns (bench/NOTES.md). Here sequences of similar
length are padded to one batch (to at most twice their length), the forward is torch's fused kernel, and the backward
recomputes the probabilities.

Legend: T tokens of the flat row, A heads, D head size, B sequences of a batch, L its longest, P = B * L; Q queries of a
block, K keys up to the last of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # queries whose scores the backward computes at a time


@dataclass(frozen=True)
class Bucket:
    """Hold sequences of similar length as one padded batch.

    tokens_P: the flat token of each place (pads repeat the last one). flat: the real tokens; places: where each of them
    lies in the batch.
    """

    tokens_P: Tensor
    flat: Tensor
    places: Tensor
    longest: int

    def pad(self, x_ATD: Tensor) -> Tensor:
        """Return (A, B, L, D) of (A, T, D)."""
        heads, _, size = x_ATD.shape
        return x_ATD[:, self.tokens_P].view(heads, -1, self.longest, size)

    def pad_zeros(self, x_ATD: Tensor) -> Tensor:
        """Return (A, B, L, D) of (A, T, D), with zeros at the pads."""
        heads, _, size = x_ATD.shape
        x_APD = x_ATD.new_zeros(heads, len(self.tokens_P), size)
        x_APD[:, self.places] = x_ATD[:, self.flat]
        return x_APD.view(heads, -1, self.longest, size)


def buckets(lengths: list[int]) -> list[Bucket]:
    """Return batches of sequences, each at least half as long as the longest of its batch."""
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not groups or lengths[i] * 2 < lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(i)
    return [_bucket([(starts[i], lengths[i]) for i in group]) for group in groups]


def _bucket(spans: list[tuple[int, int]]) -> Bucket:
    longest = spans[0][1]
    places_BL = torch.arange(len(spans) * longest).view(len(spans), longest)
    starts_B1, lengths_B1 = torch.tensor(spans).T[..., None]
    offsets_L = torch.arange(longest)
    real_BL = offsets_L < lengths_B1
    tokens_BL = starts_B1 + torch.minimum(offsets_L, lengths_B1 - 1)
    return Bucket(tokens_BL.flatten(), tokens_BL[real_BL], places_BL[real_BL], longest)


class _Causal(torch.autograd.Function):
    """Let each sequence attend to itself: q, k, v (A, T, D) -> (A, T, D). The backward recomputes probabilities."""

    @staticmethod
    def forward(ctx: Any, q_ATD: Tensor, k_ATD: Tensor, v_ATD: Tensor, scale: float, parts: list[Bucket]) -> Tensor:
        out_ATD = torch.empty_like(q_ATD, memory_format=torch.contiguous_format)
        for part in parts:
            q, k, v = part.pad(q_ATD), part.pad(k_ATD), part.pad(v_ATD)
            out_ABLD = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
            out_ATD[:, part.flat] = out_ABLD.flatten(1, 2)[:, part.places]
        ctx.save_for_backward(q_ATD, k_ATD, v_ATD, out_ATD)
        ctx.scale, ctx.parts = scale, parts
        return out_ATD

    @staticmethod
    def backward(ctx: Any, dout_ATD: Tensor) -> tuple[Tensor | None, ...]:
        q_ATD, k_ATD, v_ATD, out_ATD = ctx.saved_tensors
        wide = torch.promote_types(q_ATD.dtype, torch.float32)
        delta_AT1 = (dout_ATD.to(wide) * out_ATD.to(wide)).sum(-1, keepdim=True)
        grads = [torch.empty_like(q_ATD, memory_format=torch.contiguous_format) for _ in range(3)]
        for part in ctx.parts:
            q, k, v = part.pad(q_ATD), part.pad(k_ATD), part.pad(v_ATD)
            dout, delta = part.pad_zeros(dout_ATD), part.pad_zeros(delta_AT1)  # a pad has no gradient
            for grad_ATD, grad_ABLD in zip(grads, _backward(q, k, v, dout, delta, ctx.scale), strict=True):
                grad_ATD[:, part.flat] = grad_ABLD.flatten(1, 2)[:, part.places]
        return *grads, None, None


def _backward(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, delta: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Return the gradients of q, k and v, (A, B, L, D) each.

    delta: each query's sum of dout * out, (A, B, L, 1), at least fp32. Queries are taken in blocks, each against the
    keys up to its last query, so little of what the mask hides is computed. The last block comes first, because its
    products have a row for every key. Sums over blocks are in delta's dtype.
    """
    length, dq = q.shape[2], torch.empty_like(q)
    for last in range(length, 0, -BLOCK):
        rows = slice(max(last - BLOCK, 0), last)
        parts = _block(q[:, :, rows], k[:, :, :last], v[:, :, :last], dout[:, :, rows], delta[:, :, rows], scale)
        dq[:, :, rows] = parts[0]
        if last == length:
            dk, dv = (part.to(delta.dtype) for part in parts[1:])
        else:
            dk[:, :, :last] += parts[1]
            dv[:, :, :last] += parts[2]
    return dq, dk.to(q.dtype), dv.to(q.dtype)


def _block(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, delta: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return what Q queries, the last of K tokens, add to the gradients of q (A, B, Q, D), k and v (A, B, K, D).

    Scores and probabilities are in delta's dtype, products in q's.
    """
    queries, keys = q.shape[2], k.shape[2]
    mask_QK = torch.full((queries, keys), float("-inf"), dtype=delta.dtype).triu(keys - queries + 1)
    scores_ABQK = torch.matmul((q * scale).to(delta.dtype), k.to(delta.dtype).transpose(2, 3)).add_(mask_QK)
    probs_ABQK = scores_ABQK.softmax(-1)
    dv = torch.matmul(probs_ABQK.to(q.dtype).transpose(2, 3), dout)
    dprobs_ABQK = torch.matmul(dout, v.transpose(2, 3)).to(delta.dtype)
    dscores_ABQK = dprobs_ABQK.sub_(delta).mul_(probs_ABQK).mul_(scale).to(q.dtype)
    return torch.matmul(dscores_ABQK, k), torch.matmul(dscores_ABQK.transpose(2, 3), q), dv


def causal_attention(q_ATD: Tensor, k_ATD: Tensor, v_ATD: Tensor, scale: float, parts: list[Bucket]) -> Tensor:
    """Return the attention of each sequence of the flat row to itself, (A, T, D) in q's dtype.

    parts: from `buckets`.
    """
    return _Causal.apply(q_ATD, k_ATD, v_ATD, scale, parts)
