"""Compute causal attention over sequences of different lengths, with a backward made of matmuls.

A CPU computes all attention so; a GPU what flash attention does not take, such as float32 and wide heads.

torch's fused attention, called once per sequence, would have a backward that takes four to six times as long on a CPU
as the same sums written as batched matmuls, at the lengths of agents' turns (bench/NOTES.md). Here sequences of similar
length are padded to one batch (to at most twice their length), the forward is torch's fused kernel, and the backward
recomputes the probabilities. Soft-capped scores and sinks, which that kernel does not have, are computed in blocks.

Legend: T tokens of the flat row, A heads, D head size, E head size of the values, B sequences of a batch, L its
longest, P = B * L; Q queries of a block, K keys up to the last of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # queries whose scores are computed at a time


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


def buckets(lengths: list[int], device: torch.device | None = None) -> list[Bucket]:
    """Return batches of sequences, each at least half as long as the longest of its batch; empty ones are left out.

    device: where the tensors lie that are attended.
    """
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not lengths[i]:
            break
        if not groups or lengths[i] * 2 < lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(i)
    return [_bucket([(starts[i], lengths[i]) for i in group], device) for group in groups]


def _bucket(spans: list[tuple[int, int]], device: torch.device | None) -> Bucket:
    longest = spans[0][1]
    places_BL = torch.arange(len(spans) * longest).view(len(spans), longest)
    starts_B1, lengths_B1 = torch.tensor(spans).T[..., None]
    offsets_L = torch.arange(longest)
    real_BL = offsets_L < lengths_B1
    tokens_BL = starts_B1 + torch.minimum(offsets_L, lengths_B1 - 1)
    tokens_P, flat, places = (x.to(device) for x in (tokens_BL.flatten(), tokens_BL[real_BL], places_BL[real_BL]))
    return Bucket(tokens_P, flat, places, longest)


@dataclass(frozen=True)
class Scores:
    """Say how the product of a query and a key becomes a score: times `scale`, capped, and masked.

    window: a query attends to this many keys, including its own, the last one; None: to all. softcap c: scores become
    c * tanh(score / c).
    """

    scale: float
    window: int | None = None
    softcap: float | None = None

    def mask(
        self, first_query: int, first_key: int, queries: int, keys: int, device: torch.device | None = None
    ) -> Tensor:
        """Return (Q, K) bool, true where a query attends to a key, for positions that begin at the two given."""
        queries_Q = torch.arange(first_query, first_query + queries, device=device)
        back_QK = queries_Q[:, None] - torch.arange(first_key, first_key + keys, device=device)
        return (back_QK >= 0) if self.window is None else (back_QK >= 0) & (back_QK < self.window)

    def first_key(self, first_query: int) -> int:
        """Return the first key that any query from first_query on attends to."""
        return 0 if self.window is None else max(0, first_query - self.window + 1)


class _Causal(torch.autograd.Function):
    """Attend within each sequence: q, k (A, T, D), v (A, T, E) -> (A, T, E); the backward recomputes probabilities."""

    @staticmethod
    def forward(
        ctx: Any,
        q_ATD: Tensor,
        k_ATD: Tensor,
        v_ATE: Tensor,
        sinks_A: Tensor | None,
        scores: Scores,
        parts: list[Bucket],
    ) -> Tensor:
        out_ATE = torch.empty_like(v_ATE, memory_format=torch.contiguous_format)
        for part in parts:
            out_ABLE = _forward(part.pad(q_ATD), part.pad(k_ATD), part.pad(v_ATE), sinks_A, scores)
            out_ATE[:, part.flat] = out_ABLE.flatten(1, 2)[:, part.places]
        ctx.save_for_backward(q_ATD, k_ATD, v_ATE, sinks_A, out_ATE)
        ctx.scores, ctx.parts = scores, parts
        return out_ATE

    @staticmethod
    def backward(ctx: Any, dout_ATE: Tensor) -> tuple[Tensor | None, ...]:
        q_ATD, k_ATD, v_ATE, sinks_A, out_ATE = ctx.saved_tensors
        wide = torch.promote_types(q_ATD.dtype, torch.float32)
        delta_AT1 = (dout_ATE.to(wide) * out_ATE.to(wide)).sum(-1, keepdim=True)
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_ATD, k_ATD, v_ATE)]
        dsinks_A = None if sinks_A is None else torch.zeros_like(sinks_A, dtype=wide)
        for part in ctx.parts:
            q, k, v = part.pad(q_ATD), part.pad(k_ATD), part.pad(v_ATE)
            dout, delta = part.pad_zeros(dout_ATE), part.pad_zeros(delta_AT1)  # a pad has no gradient
            found = _backward(q, k, v, dout, delta, sinks_A, dsinks_A, ctx.scores)
            for grad_ATD, grad_ABLD in zip(grads, found, strict=True):
                grad_ATD[:, part.flat] = grad_ABLD.flatten(1, 2)[:, part.places]
        return *grads, None if sinks_A is None or dsinks_A is None else dsinks_A.to(sinks_A.dtype), None, None


def _forward(q: Tensor, k: Tensor, v: Tensor, sinks_A: Tensor | None, scores: Scores) -> Tensor:
    """Return (A, B, L, E): by torch's fused kernel, or in blocks of queries where it has no such scores."""
    length = q.shape[2]
    if scores.softcap is None and sinks_A is None:
        if scores.window is None or scores.window >= length:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scores.scale)
        return F.scaled_dot_product_attention(q, k, v, scores.mask(0, 0, length, length, q.device), scale=scores.scale)
    out, wide = torch.empty_like(v), torch.promote_types(q.dtype, torch.float32)
    for last in range(length, 0, -BLOCK):
        rows = slice(max(last - BLOCK, 0), last)
        keys = slice(scores.first_key(rows.start), last)
        probs_ABQK, _, _ = _probabilities(q[:, :, rows], k[:, :, keys], sinks_A, scores, rows.start, keys.start, wide)
        out[:, :, rows] = torch.matmul(probs_ABQK.to(q.dtype), v[:, :, keys])
    return out


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    delta: Tensor,
    sinks_A: Tensor | None,
    dsinks_A: Tensor | None,
    scores: Scores,
) -> tuple[Tensor, ...]:
    """Return the gradients of q, k and v; add that of the sinks to dsinks_A.

    delta: each query's sum of dout * out, (A, B, L, 1), at least fp32. Queries are taken in blocks, each against the
    keys that it may attend to, so that little of what the mask hides is computed. The last block comes first: without
    a window its products have a row for every key. Sums over blocks are in delta's dtype.
    """
    length, dq = q.shape[2], torch.empty_like(q)
    for last in range(length, 0, -BLOCK):
        rows = slice(max(last - BLOCK, 0), last)
        keys = slice(scores.first_key(rows.start), last)
        block = q[:, :, rows], k[:, :, keys], v[:, :, keys], dout[:, :, rows], delta[:, :, rows]
        parts = _block(*block, sinks_A, dsinks_A, scores, rows.start, keys.start)
        dq[:, :, rows] = parts[0]
        if last == length and keys.start == 0:
            dk, dv = (part.to(delta.dtype) for part in parts[1:])
            continue
        if last == length:
            dk, dv = (torch.zeros_like(x, dtype=delta.dtype) for x in (k, v))
        dk[:, :, keys] += parts[1]
        dv[:, :, keys] += parts[2]
    return dq, dk.to(q.dtype), dv.to(q.dtype)


def _block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    delta: Tensor,
    sinks_A: Tensor | None,
    dsinks_A: Tensor | None,
    scores: Scores,
    first_query: int,
    first_key: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what Q queries give to the gradients of q (A, B, Q, D), k (A, B, K, D) and v (A, B, K, E).

    Scores and probabilities are in delta's dtype, products in q's.
    """
    probs_ABQK, capped, sink = _probabilities(q, k, sinks_A, scores, first_query, first_key, delta.dtype)
    if dsinks_A is not None and sink is not None:
        dsinks_A -= (sink * delta[..., 0]).sum((1, 2))
    dv = torch.matmul(probs_ABQK.to(q.dtype).transpose(2, 3), dout)
    dprobs_ABQK = torch.matmul(dout, v.transpose(2, 3)).to(delta.dtype)
    dscores_ABQK = dprobs_ABQK.sub_(delta).mul_(probs_ABQK)
    if capped is not None and scores.softcap is not None:
        dscores_ABQK.mul_(1 - (capped / scores.softcap).square())  # the derivative of c * tanh(x / c)
    dscores_ABQK = dscores_ABQK.mul_(scores.scale).to(q.dtype)
    return torch.matmul(dscores_ABQK, k), torch.matmul(dscores_ABQK.transpose(2, 3), q), dv


def _probabilities(
    q: Tensor,
    k: Tensor,
    sinks_A: Tensor | None,
    scores: Scores,
    first_query: int,
    first_key: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return probabilities (A, B, Q, K), the capped scores if they are, and the sinks' probabilities (A, B, Q)."""
    hidden_QK = ~scores.mask(first_query, first_key, q.shape[2], k.shape[2], q.device)
    mask_QK = torch.zeros(hidden_QK.shape, dtype=dtype, device=q.device).masked_fill_(hidden_QK, float("-inf"))
    scores_ABQK, capped = torch.matmul((q * scores.scale).to(dtype), k.to(dtype).transpose(2, 3)), None
    if scores.softcap is not None:
        capped = scores_ABQK.div_(scores.softcap).tanh_().mul_(scores.softcap)
        scores_ABQK = capped.clone()
    scores_ABQK.add_(mask_QK)
    if sinks_A is None:
        return scores_ABQK.softmax(-1), capped, None
    sinks_ABQ1 = sinks_A.to(dtype).view(-1, 1, 1, 1).expand(*scores_ABQK.shape[:3], 1)
    probs = torch.cat([scores_ABQK, sinks_ABQ1], -1).softmax(-1)
    return probs[..., :-1].contiguous(), capped, probs[..., -1]


def causal_attention(
    q_ATD: Tensor,
    k_ATD: Tensor,
    v_ATE: Tensor,
    scores: Scores,
    parts: list[Bucket],
    sinks_A: Tensor | None = None,
) -> Tensor:
    """Attend within each sequence of the flat row; returns (A, T, E) in q's dtype.

    parts: from `buckets`. sinks_A: of each head the score of a key whose value is zero, as gpt-oss has them.
    """
    return _Causal.apply(q_ATD, k_ATD, v_ATE, sinks_A, scores, parts)
