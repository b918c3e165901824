"""Attention on a CPU against its definition: one sequence at a time, explicit softmax, autograd, float64."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mgrpo.engine.model import cpu_attention as attention
from mgrpo.engine.model.cpu_attention import buckets, causal_attention

Lengths = st.lists(st.integers(1, 12) | st.integers(30, 40), min_size=1, max_size=9)


def definition(q_ATD: Tensor, k_ATD: Tensor, v_ATD: Tensor, scale: float, lengths: list[int]) -> Tensor:
    outs = []
    for q, k, v in zip(*(x.split(lengths, 1) for x in (q_ATD, k_ATD, v_ATD)), strict=True):
        later = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(later, float("-inf"))
        outs.append(scores.softmax(-1) @ v)
    return torch.cat(outs, 1)


def inputs(lengths: list[int], dtype: torch.dtype, seed: int = 0, size: float = 1.0) -> list[Tensor]:
    """Return q, k, v and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, sum(lengths), 8)
    return [(size * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(4)]


def run(attend: object, tensors: list[Tensor], *rest: object) -> list[Tensor]:
    """Return the output and the gradients of q, k and v."""
    q, k, v = (x.clone().requires_grad_() for x in tensors[:3])
    out = attend(q, k, v, 0.3, *rest)  # type: ignore[operator]
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3])]


@settings(max_examples=40)
@given(Lengths, st.integers(0, 99), st.sampled_from([0.1, 1.0, 30.0]), st.sampled_from([1, 5, 8, attention.BLOCK]))
def test_output_and_gradients_equal_the_definition(lengths: list[int], seed: int, size: float, block: int) -> None:
    tensors = inputs(lengths, torch.float64, seed, size)
    with mock.patch.object(attention, "BLOCK", block):
        found = run(causal_attention, tensors, buckets(lengths))
    for ours, truth in zip(found, run(definition, tensors, lengths), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10 * max(1.0, size**3))


@pytest.mark.parametrize("lengths", [[40, 7, 33, 21, 1, 38], [3 * attention.BLOCK + 1, 2 * attention.BLOCK]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_at_most_twice_that_of_the_plain_same_dtype_version(
    dtype: torch.dtype, lengths: list[int]
) -> None:
    low = inputs(lengths, dtype)
    truth = run(definition, [x.double() for x in low], lengths)
    ours, plain = run(causal_attention, low, buckets(lengths)), run(definition, low, lengths)
    for a, b, t in zip(ours, plain, truth, strict=True):
        assert (a - t).abs().max() <= 2 * (b - t).abs().max() + torch.finfo(dtype).eps


def test_a_sequence_is_not_touched_by_its_neighbours() -> None:
    alone = inputs([9], torch.float64)
    other = inputs([5], torch.float64, seed=1)
    beside = [torch.cat([b, a], 1) for a, b in zip(alone, other, strict=True)]
    for a, b in zip(
        run(causal_attention, alone, buckets([9])), run(causal_attention, beside, buckets([5, 9])), strict=True
    ):
        torch.testing.assert_close(a, b[:, 5:], rtol=0, atol=1e-14)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60))
def test_buckets_hold_every_token_once_and_pad_at_most_twofold(lengths: list[int]) -> None:
    parts = buckets(lengths)
    flat = torch.cat([part.flat for part in parts])
    assert sorted(flat.tolist()) == list(range(sum(lengths)))
    for part in parts:
        assert len(part.tokens_P) <= 2 * len(part.flat)
        assert torch.equal(part.tokens_P[part.places], part.flat)
