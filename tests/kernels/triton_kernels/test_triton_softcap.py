"""Compare the row kernel on capped logits, c * tanh(logits / c), with the definition in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_cases import DEVICE, as_good, kernels_take_the_tensors, placed, skip_unless_kernels_run

from mgrpo.kernels import Objective, linear_grpo_loss, linear_logprob, token_logprob
from mgrpo.kernels.reference import linear_grpo_loss_ref, token_logprob_ref
from numerics import double, gradients, loss_case

skip_unless_kernels_run()
__all__ = ["kernels_take_the_tensors"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:overflow encountered"),
    pytest.mark.filterwarnings("ignore:invalid value encountered"),  # in what a `where` does not choose
]
HALF_AND_SINGLE = [torch.float32, torch.bfloat16]


def mixed(logprobs, entropy):
    """Return a scalar in which every row's log-prob and entropy has its own weight."""
    at = torch.arange(1, len(logprobs) + 1, dtype=logprobs.dtype, device=logprobs.device)
    return (logprobs * at.cos()).sum() + (entropy * at.sin()).sum()


def assert_as_good_as_plain(kernel, plain, leaves):
    """Compare values and gradients of two functions of the leaves; the truth is the second one in float64."""
    runs = []
    for function, args in ((kernel, leaves), (plain, leaves), (plain, double(leaves))):
        args = [arg.detach().requires_grad_() for arg in args]
        values = function(*args)
        runs.append([*(v.detach() for v in values), *gradients(lambda v=values: mixed(*v), args)])
    for got, same, truth in zip(*runs, strict=True):
        assert torch.isfinite(got).all()
        assert as_good(got, same, truth)


@given(
    st.integers(0, 2**20),
    st.integers(1, 4),
    st.integers(1, 70),
    st.sampled_from([0.5, 3.0, 30.0, 1e4]),
    st.sampled_from([1e-3, 1.0, 30.0]),
    st.sampled_from(HALF_AND_SINGLE),
)
@settings(max_examples=25, derandomize=True)
def test_token_logprob_is_as_good_as_plain(seed, count, vocabulary, softcap, spread, dtype):
    g = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(count, vocabulary, generator=g)).to(DEVICE, dtype)
    targets = torch.randint(vocabulary, (count,), generator=g).to(DEVICE)
    assert_as_good_as_plain(
        lambda x: token_logprob(x, targets, temperature=0.7, softcap=softcap),
        lambda x: token_logprob_ref(x, targets, 0.7, softcap),
        [logits],
    )


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_linear_logprob_is_as_good_as_plain(dtype, softcap):
    g = torch.Generator().manual_seed(5)
    leaves = placed([0.5 * torch.randn(*shape, generator=g) for shape in ((18, 16), (517, 16), (517,))], dtype)
    targets = torch.randint(517, (18,), generator=g).to(DEVICE)

    def kernel(hidden, weight, bias):
        return linear_logprob(hidden, weight, targets, bias_V=bias, chunk_rows=7, softcap=softcap)

    def plain(hidden, weight, bias):
        return token_logprob_ref(torch.nn.functional.linear(hidden, weight, bias), targets, softcap=softcap)

    assert_as_good_as_plain(kernel, plain, leaves)


@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_the_loss_is_as_good_as_plain(importance):
    objective = Objective(importance=importance, kl_coef=0.1, entropy_coef=0.1)
    heads, others, keywords = loss_case(3, 12, 41, off_policy=True, bias=True, row_temperature=True)
    keywords["softcap"] = 2.0
    runs = []
    for function, dtype in (
        (linear_grpo_loss, torch.float32),
        (linear_grpo_loss_ref, torch.float32),
        (linear_grpo_loss_ref, torch.float64),
    ):
        leaves = [leaf.requires_grad_() for leaf in placed(heads, dtype)]
        loss = function(*leaves, *placed(others, dtype), objective, **placed(keywords, dtype))[0]
        runs.append([loss.detach(), *gradients(lambda v=loss: v, leaves)])
    for got, same, truth in zip(*runs, strict=True):
        assert as_good(got, same, truth)


def test_padding_stays_out_of_the_softmax():
    """Use logits far below 0, which the cap raises to -30: padding must not be raised with them."""
    targets = torch.tensor([0, 32, 64], device=DEVICE)
    got, entropy = token_logprob(torch.full((3, 65), -500.0, device=DEVICE), targets, softcap=30.0)
    expected = torch.full_like(got, -float(torch.tensor(65.0).log()))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy, -expected, rtol=1e-5, atol=1e-6)


def test_a_broken_logit_is_not_hidden():
    logits = torch.randn(3, 70, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    logits[1, 40] = torch.nan
    logprobs, entropy = token_logprob(logits, torch.tensor([0, 1, 2], device=DEVICE), softcap=30.0)
    assert logprobs.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]
