"""Attend over sequences side by side in one flat row on a GPU, by the kernels that torch brings.

Flash attention is the fastest. It neither caps scores nor knows of sinks, which FlexAttention is compiled for: a kernel
of Triton that is made when it is first called, for any number of tokens.

torch's `varlen_attn` is not the same in all versions: that of 2.11 has no `enable_gqa`, and takes as many heads of keys
and values as of queries. What it offers is read from its signature, and there heads are repeated.

Legend: T tokens of the flat row, A query heads, G key-value heads, D head size, E that of the values, B sequences,
N blocks of tokens.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn

DTYPES = (torch.bfloat16, torch.float16)
WIDEST = 256  # the largest head size
BLOCK = 128  # tokens of a block: FlexAttention leaves out blocks in which no query sees any key
GROUPED = "enable_gqa" in inspect.signature(varlen_attn).parameters  # whether heads may share keys and values


def takes(q_ATD: Tensor) -> bool:
    """Return whether flash attention computes heads of that dtype and size, on that device."""
    return q_ATD.is_cuda and q_ATD.dtype in DTYPES and q_ATD.shape[-1] <= WIDEST


def flash_attention(
    q_ATD: Tensor,
    k_GTD: Tensor,
    v_GTE: Tensor,
    cu_seqlens_B1: Tensor,
    longest: int,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Attend causally within each sequence; returns (T, A, E), contiguous, in q's dtype.

    q, k, v: bfloat16 or float16, all of one dtype. cu_seqlens: (B + 1,) int32. window: a query attends to this many
    keys, including its own, the last one; None: to all before it.
    """
    size, own = q_ATD.shape[2], v_GTE.shape[2]
    shared: dict[str, Any] = {"enable_gqa": True} if GROUPED else {}
    repeat = 1 if GROUPED else q_ATD.shape[0] // k_GTD.shape[0]
    keys, values = (_by_token(x, repeat) for x in (k_GTD, F.pad(v_GTE, (0, size - own))))
    out_TAD = varlen_attn(
        _by_token(q_ATD, 1),
        keys,
        values,
        cu_seqlens_B1,
        cu_seqlens_B1,
        longest,
        longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **shared,
    )
    assert isinstance(out_TAD, Tensor)
    return out_TAD[:, :, :own].contiguous()


def _by_token(x_GTD: Tensor, repeat: int) -> Tensor:
    """Return (T, repeat * G, D), contiguous, with each head as often as asked for."""
    heads = x_GTD.repeat_interleave(repeat, 0) if repeat > 1 else x_GTD
    return heads.transpose(0, 1).contiguous()


def block_mask(cu_seqlens_B1: Tensor, tokens: int, window: int | None = None) -> BlockMask:
    """Return which keys FlexAttention lets each of so many queries see: the causal ones of its sequence.

    Nothing of the size of a whole mask is made, and nothing is copied to the CPU. window: a query sees this many keys,
    including its own, the last one; None: all before it.
    """
    places_T = torch.arange(tokens, device=cu_seqlens_B1.device)
    first_T = cu_seqlens_B1[torch.searchsorted(cu_seqlens_B1, places_T.to(cu_seqlens_B1), right=True) - 1].to(places_T)
    if window is not None:
        first_T = torch.maximum(first_T, places_T - window + 1)

    def sees(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first_T[query])

    own_N = torch.arange(-(-tokens // BLOCK), device=places_T.device)
    last_N = ((own_N + 1) * BLOCK - 1).clamp(max=tokens - 1)  # the last query of each block
    low_N = first_T[own_N * BLOCK] // BLOCK
    whole_N = torch.minimum(-(-first_T[last_N] // BLOCK), own_N)  # from this block on all see all, up to their own
    partial, full = _blocks(low_N, whole_N, own_N), _blocks(whole_N, own_N, None)
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK, sees, (tokens, tokens))


def _blocks(low_N: Tensor, high_N: Tensor, further_N: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (1, 1, N) how many blocks of keys each block of queries has, and (1, 1, N, N) which they are.

    These are all from low to below high, and one further.
    """
    count_N = high_N - low_N
    listed_NN = low_N[:, None] + torch.arange(len(low_N), device=low_N.device)
    listed_NN = listed_NN.clamp(max=len(low_N) - 1)  # what stands behind the count is not read
    if further_N is not None:
        listed_NN = listed_NN.scatter(1, count_N[:, None], further_N[:, None])
        count_N = count_N + 1
    return count_N.int()[None, None], listed_NN.int()[None, None]


def scored_attention(
    q_ATD: Tensor,
    k_GTD: Tensor,
    v_GTE: Tensor,
    mask: BlockMask,
    *,
    scale: float,
    softcap: float | None = None,
    sinks_A: Tensor | None = None,
) -> Tensor:
    """Attend under a mask with capped scores and sinks; returns (T, A, E), contiguous, in q's dtype.

    softcap c: scores become c * tanh(score / c). sinks: of each head the score of a further key whose value is zero.
    Its share is taken off at the end: a softmax with one more score s is that without it times sigmoid(lse - s), where
    lse is the log-sum-exp of the others.
    """
    wide = torch.promote_types(q_ATD.dtype, torch.float32)
    caps_A = q_ATD.new_full(q_ATD.shape[:1], softcap or 0.0, dtype=wide)  # torch 2.15 lets a score use no Python float

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return caps_A[head] * torch.tanh(score / caps_A[head])

    out_1ATE, aux = _flex(
        q_ATD[None],
        k_GTD[None],
        v_GTE[None],
        score_mod=None if softcap is None else capped,
        block_mask=mask,
        scale=scale,
        enable_gqa=q_ATD.shape[0] != k_GTD.shape[0],
        return_aux=AuxRequest(lse=sinks_A is not None),
    )
    out_ATE = out_1ATE[0]
    if sinks_A is not None:
        kept_AT = torch.sigmoid(aux.lse[0] - sinks_A.to(aux.lse.dtype)[:, None])
        out_ATE = (out_ATE * kept_AT[..., None]).to(q_ATD.dtype)
    return out_ATE.transpose(0, 1).contiguous()


# Compiled whole or not at all: without a kernel it would hold every score of the row.
_flex: Any = torch.compile(flex_attention, dynamic=True, fullgraph=True)
