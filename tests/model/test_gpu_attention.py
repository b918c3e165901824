"""Flash attention as each version of torch offers it, put in its place here by a plain function of that signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from mgrpo.engine.model import gpu_attention
from mgrpo.engine.model.attention import Local, Packed, Rule
from mgrpo.engine.model.gpu_attention import flash_attention

HEADS, GROUPS, SIZE, OWN = 6, 2, 16, 10
LENGTHS = (5, 1, 9)


def plain(q: Tensor, k: Tensor, v: Tensor, bounds: list[int], scale: float, window: tuple[int, int]) -> Tensor:
    """Attend as `varlen_attn` says: within each sequence, to so many keys on the left and none on the right."""
    assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous() and window[1] == 0
    assert q.shape[-1] == k.shape[-1] == v.shape[-1], "flash attention has one head size"
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    out = torch.empty_like(q)
    for begin, end in pairwise(bounds):
        back = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        seen = (back >= 0) & (back <= window[0] if window[0] >= 0 else back == back)
        scores = torch.einsum("qad,kad->aqk", q[begin:end], k[begin:end]) * scale
        out[begin:end] = torch.einsum("aqk,kad->qad", scores.masked_fill(~seen, -torch.inf).softmax(-1), v[begin:end])
    return out


def of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):  # type: ignore[no-untyped-def]
    assert query.shape[1] == key.shape[1] and max_q == max_k == max(LENGTHS)
    return plain(query, key, value, cu_seq_q.tolist(), scale, window_size)


def of_2_13(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):  # type: ignore[no-untyped-def]
    assert enable_gqa and max_q == max_k == max(LENGTHS)
    return plain(query, key, value, cu_seq_q.tolist(), scale, window_size)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize(("grouped", "version"), [(False, of_2_11), (True, of_2_13)])
def test_each_version_of_torch_gives_the_attention_of_a_cpu(
    grouped: bool, version: Callable[..., Tensor], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_attention, "GROUPED", grouped)
    monkeypatch.setattr(gpu_attention, "varlen_attn", version)
    torch.manual_seed(0)
    shapes = ((HEADS, SIZE), (GROUPS, SIZE), (GROUPS, OWN))
    q, k, v = (torch.randn(heads, sum(LENGTHS), size, dtype=torch.float64) for heads, size in shapes)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    truth = Packed(bounds, max(LENGTHS)).attend(0, q, k, v, Rule(0.3, Local(window=window)))
    found = flash_attention(q, k, v, bounds, max(LENGTHS), scale=0.3, window=window)
    assert found.shape == (sum(LENGTHS), HEADS, OWN) and found.is_contiguous()
    torch.testing.assert_close(found, truth)


def test_what_is_passed_to_the_installed_torch_is_in_its_signature() -> None:
    known = inspect.signature(varlen_attn).parameters
    assert {"scale", "window_size"} <= known.keys()
    assert ("enable_gqa" in known) == gpu_attention.GROUPED


@pytest.mark.parametrize(
    ("device", "dtype", "size", "taken"),
    [
        ("cuda", torch.bfloat16, 256, True),
        ("cuda", torch.float16, 8, True),
        ("cuda", torch.bfloat16, 512, False),
        ("cuda", torch.float32, 64, False),
        ("cuda", torch.float64, 64, False),
        ("cpu", torch.bfloat16, 64, False),
    ],
)
def test_what_flash_attention_refuses_is_left_to_the_attention_in_blocks(
    device: str, dtype: torch.dtype, size: int, taken: bool
) -> None:
    class Somewhere:
        """A tensor as far as it is asked, for there is no GPU."""

        def __init__(self) -> None:
            self.is_cuda, self.dtype, self.shape = device == "cuda", dtype, (1, 1, size)

    given: Any = Somewhere()
    assert gpu_attention.takes(given) is taken
