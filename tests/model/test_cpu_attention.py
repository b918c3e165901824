"""The CPU's attention against the definition: one sequence at a time, explicit softmax, autograd, float64."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mgrpo.engine.model import cpu_attention as attention
from mgrpo.engine.model.cpu_attention import Scores, buckets, causal_attention

PLAIN = Scores(0.3)
Lengths = st.lists(st.integers(1, 12) | st.integers(30, 40), min_size=1, max_size=9)


def definition(
    q_ATD: Tensor, k_ATD: Tensor, v_ATE: Tensor, scores: Scores, lengths: list[int], sinks_A: Tensor | None = None
) -> Tensor:
    """Attend as transformers' eager code does: all scores, the cap, the mask, the sink's column, softmax."""
    outs = []
    for q, k, v in zip(*(x.split(lengths, 1) for x in (q_ATD, k_ATD, v_ATE)), strict=True):
        all_ALL = q @ k.transpose(1, 2) * scores.scale
        if scores.softcap is not None:
            all_ALL = (all_ALL / scores.softcap).tanh() * scores.softcap
        back_LL = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
        hidden_LL = (back_LL < 0) | (back_LL >= (scores.window or q.shape[1]))
        all_ALL = all_ALL.masked_fill(hidden_LL, float("-inf"))
        if sinks_A is not None:
            all_ALL = torch.cat([all_ALL, sinks_A.view(-1, 1, 1).expand(*all_ALL.shape[:2], 1)], -1)
        outs.append(all_ALL.softmax(-1)[..., : q.shape[1]] @ v)
    return torch.cat(outs, 1)


def inputs(lengths: list[int], dtype: torch.dtype, seed: int = 0, size: float = 1.0) -> list[Tensor]:
    """q, k, v and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, sum(lengths), 8)
    return [(size * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(4)]


def run(attend: object, tensors: list[Tensor], *rest: object, scores: Scores = PLAIN) -> list[Tensor]:
    """Return the output and the gradients of q, k and v, and of the sinks if they are among the rest."""
    q, k, v = (x.clone().requires_grad_() for x in tensors[:3])
    out = attend(q, k, v, scores, *rest)  # type: ignore[operator]
    sinks = [x for x in rest if isinstance(x, Tensor)]
    return [out.detach(), *torch.autograd.grad(out, (q, k, v, *sinks), tensors[3])]


@settings(max_examples=40)
@given(Lengths, st.integers(0, 99), st.sampled_from([0.1, 1.0, 30.0]), st.sampled_from([1, 5, 8, attention.BLOCK]))
def test_output_and_gradients_equal_the_definition(lengths: list[int], seed: int, size: float, block: int) -> None:
    tensors = inputs(lengths, torch.float64, seed, size)
    with mock.patch.object(attention, "BLOCK", block):
        found = run(causal_attention, tensors, buckets(lengths))
    for ours, truth in zip(found, run(definition, tensors, lengths), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10 * max(1.0, size**3))


@settings(max_examples=60)
@given(
    Lengths,
    st.none() | st.integers(1, 45),
    st.none() | st.sampled_from([0.5, 5.0]),
    st.booleans(),
    st.sampled_from([3, 8]),
    st.sampled_from([1, 5, 8, attention.BLOCK]),
)
def test_windows_caps_sinks_and_narrow_values_equal_the_definition(
    lengths: list[int], window: int | None, softcap: float | None, sinks: bool, values: int, block: int
) -> None:
    q, k, v, dout = inputs(lengths, torch.float64)
    tensors, scores = [q, k, v[..., :values], dout[..., :values]], Scores(0.3, window, softcap)
    given_A = [torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64, requires_grad=True)] if sinks else []
    with mock.patch.object(attention, "BLOCK", block):
        found = run(causal_attention, tensors, buckets(lengths), *given_A, scores=scores)
    for ours, truth in zip(found, run(definition, tensors, lengths, *given_A, scores=scores), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


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
