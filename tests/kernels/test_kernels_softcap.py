"""Compare log-probs and losses of capped logits, c * tanh(logits / c), with plain torch in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo.kernels import Objective, grpo_loss, linear_grpo_loss, linear_logprob, token_logprob
from mgrpo.kernels.reference import grpo_loss_ref, linear_grpo_loss_ref, token_logprob_ref
from numerics import OBJECTIVES, close, gradients, loss_case, within_rule

CAPS = st.sampled_from([0.5, 3.0, 30.0, 1e4])  # most logits are cut by the first, none by the last
CASES = st.builds(
    loss_case,
    st.integers(0, 2**20),
    st.integers(0, 17),
    st.integers(1, 40),
    off_policy=st.booleans(),
    bias=st.booleans(),
    row_temperature=st.booleans(),
)


def mixed(logprobs, entropy):
    """Return a scalar in which every row's log-prob and entropy has its own weight."""
    at = torch.arange(1, len(logprobs) + 1, dtype=logprobs.dtype)
    return (logprobs * at.cos()).sum() + (entropy * at.sin()).sum()


def assert_same(got, truth, leaves):
    """Compare two pairs of log-probs and entropies, and the gradients that they give."""
    assert close(got[0], truth[0]) and close(got[1], truth[1])
    for a, b in zip(gradients(lambda: mixed(*got), leaves), gradients(lambda: mixed(*truth), leaves), strict=True):
        assert close(a, b)


@given(CASES, CAPS, st.integers(1, 18))
@settings(max_examples=60)
def test_log_probs_are_those_of_capped_logits(case, softcap, chunk_rows):
    heads, (targets, *_), keywords = case
    bias, temperature = keywords["bias_V"], keywords["temperature"]
    leaves = [tensor.requires_grad_() for tensor in (*heads, bias) if tensor is not None]
    logits = torch.nn.functional.linear(*heads, bias)
    kept = {"temperature": temperature, "softcap": softcap}
    got = linear_logprob(*heads, targets, bias_V=bias, chunk_rows=chunk_rows, **kept)
    assert_same(got, token_logprob_ref(logits, targets, **kept), leaves)
    logits = logits.detach().requires_grad_()
    assert_same(token_logprob(logits, targets, **kept), token_logprob_ref(logits, targets, **kept), [logits])


@given(CASES, OBJECTIVES, CAPS, st.integers(1, 18))
@settings(max_examples=100)
def test_losses_are_those_of_capped_logits(case, objective, softcap, chunk_rows):
    heads, others, keywords = case
    bias = keywords.pop("bias_V")
    leaves = [tensor.requires_grad_() for tensor in (*heads, bias) if tensor is not None]
    keywords["softcap"] = softcap
    truth = linear_grpo_loss_ref(*heads, *others, objective, bias_V=bias, **keywords)[0]
    got = linear_grpo_loss(*heads, *others, objective, bias_V=bias, chunk_rows=chunk_rows, **keywords).loss
    assert close(got, truth)
    for a, b in zip(gradients(lambda: got, leaves), gradients(lambda: truth, leaves), strict=True):
        assert close(a, b)
    logits = torch.nn.functional.linear(*heads, bias).detach().requires_grad_()
    got, truth = (
        grpo_loss(logits, *others, objective, **keywords).loss,
        grpo_loss_ref(logits, *others, objective, **keywords)[0],
    )
    assert close(got, truth)
    assert close(*(gradients(lambda v=v: v, [logits])[0] for v in (got, truth)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("softcap", "bias"), [(0.5, False), (30.0, True)])
def test_no_worse_than_plain_in_the_same_dtype(dtype, softcap, bias):
    g = torch.Generator().manual_seed(1)
    shapes = ((70, 32), (517, 32), (517,))[: 2 + bias]
    leaves = [torch.randn(*shape, generator=g).to(dtype).requires_grad_() for shape in shapes]
    targets = torch.randint(517, (70,), generator=g)

    def fused(hidden, weight, bias=None):
        return linear_logprob(hidden, weight, targets, bias_V=bias, chunk_rows=16, softcap=softcap)

    def plain(hidden, weight, bias=None):
        return token_logprob_ref(torch.nn.functional.linear(hidden, weight, bias), targets, softcap=softcap)

    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    values = [f(*x) for f, x in ((fused, leaves), (plain, leaves), (plain, wide))]
    grads = [gradients(lambda v=v: mixed(*v), x) for v, x in zip(values, (leaves, leaves, wide), strict=True)]
    for got, same, truth in (*zip(*values, strict=True), *zip(*grads, strict=True)):
        assert within_rule(got, same, truth)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_in_place_gives_the_same_bits(dtype):
    g = torch.Generator().manual_seed(2)
    values, targets = (4 * torch.randn(9, 70, generator=g)).to(dtype), torch.randint(70, (9,), generator=g)
    grads = []
    for inplace in (False, True):
        logits = values.clone().requires_grad_() * 1
        got = token_logprob(logits, targets, temperature=0.7, inplace=inplace, softcap=3.0)
        (grad,) = torch.autograd.grad(mixed(*got), logits)
        assert (grad.data_ptr() == logits.data_ptr()) == inplace
        grads.append(grad)
    assert torch.equal(*grads)


def test_an_infinite_logit_is_capped():
    logits = torch.tensor([[torch.inf, -torch.inf, 0.0]], requires_grad=True)
    logprobs, entropy = token_logprob(logits, torch.tensor([0]), softcap=2.0)
    truth = token_logprob_ref(torch.tensor([[2.0, -2.0, 0.0]]), torch.tensor([0]))
    torch.testing.assert_close((logprobs, entropy), truth)
    assert torch.isfinite(torch.autograd.grad(logprobs.sum(), logits)[0]).all()


@pytest.mark.parametrize("softcap", [0.0, -1.0, float("inf"), float("nan")])
def test_a_cap_that_is_none_is_refused(softcap):
    hidden, targets, ones = torch.ones(2, 4), torch.tensor([0, 1]), torch.ones(2)
    calls = (
        lambda: token_logprob(hidden, targets, softcap=softcap),
        lambda: linear_logprob(hidden, hidden, targets, softcap=softcap),
        lambda: grpo_loss(hidden, targets, ones, ones, Objective(), softcap=softcap),
        lambda: linear_grpo_loss(hidden, hidden, targets, ones, ones, Objective(), softcap=softcap),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"softcap: got .*, expected a finite number > 0 or None"):
            call()
