"""Attend over sequences side by side in one flat row on a GPU, by the flash attention that torch brings.

torch's `varlen_attn` is not the same in all versions: that of 2.11 has no `enable_gqa`, and takes as many heads of keys
and values as of queries. What it offers is read from its signature, and there heads are repeated.

Legend: T tokens of the flat row, A query heads, G key-value heads, D head size, E that of the values, B sequences.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

DTYPES = (torch.bfloat16, torch.float16)
WIDEST = 256  # the largest head size
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
