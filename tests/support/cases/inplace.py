"""Test the gradient that is written over the logits, on DEVICE: for the plain path and for the row kernel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo.kernels import Objective, grpo_loss, token_logprob
from numerics import OBJECTIVES, gradients, loss_case

DEVICE = "cpu"  # the tests of the Triton kernels run the functions below on theirs
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def placed(args):
    """Move tensors to DEVICE."""
    if isinstance(args, dict):
        return {name: placed(value) for name, value in args.items()}
    return args.to(DEVICE) if torch.is_tensor(args) else args


def logits_of(hidden, weight, dtype):
    """Return a leaf, and logits that an operation made of it, since only such may be overwritten."""
    leaf = placed((hidden @ weight.T).to(dtype)).requires_grad_()
    return leaf, leaf * 1


@given(
    st.builds(
        loss_case,
        st.integers(0, 2**20),
        st.integers(0, 17),
        st.integers(1, 40),
        off_policy=st.booleans(),
        bias=st.just(False),
        row_temperature=st.booleans(),
    ),
    OBJECTIVES,
    st.sampled_from(DTYPES),
)
@settings(max_examples=60, derandomize=True)
def test_in_place_gives_the_same_bits(case, objective, dtype):
    heads, others, keywords = case
    del keywords["bias_V"]
    others, keywords = [placed(x) for x in others], placed(keywords)
    grads = []
    for inplace in (False, True):
        leaf, logits = logits_of(*heads, dtype)
        result = grpo_loss(logits, *others, objective, **keywords, inplace=inplace)
        (of_logits,) = gradients(lambda loss=result.loss: loss, [logits])
        assert not logits.numel() or (of_logits.data_ptr() == logits.data_ptr()) == inplace
        leaf, logits = logits_of(*heads, dtype)
        result = grpo_loss(logits, *others, objective, **keywords, inplace=inplace)
        grads.append([of_logits, *gradients(lambda loss=result.loss: loss, [leaf])])
    for plain, over in zip(*grads, strict=True):
        assert torch.equal(plain, over)


@pytest.mark.parametrize("vocabulary", [1, 5, 63, 4097])
@pytest.mark.parametrize("strided", [False, True])
def test_log_probs_in_place(vocabulary, strided):
    g = torch.Generator().manual_seed(vocabulary)
    values = placed(torch.randn(6, 2 * vocabulary, generator=g))
    targets = placed(torch.randint(vocabulary, (6,), generator=g))
    grads = []
    for inplace in (False, True):
        leaf = values.clone().requires_grad_()
        logits = (leaf * 1)[::2, ::2] if strided else (leaf * 1)[::2, :vocabulary].contiguous()
        logprobs, entropy = token_logprob(logits, targets[::2], temperature=0.7, inplace=inplace)
        grads += gradients(lambda x=logprobs, y=entropy: (x.cos() + y.sin()).sum(), [leaf])
    assert torch.equal(*grads)


def test_misuse_is_refused():
    leaf = torch.randn(3, 5, device=DEVICE, requires_grad=True)
    targets = torch.arange(3, device=DEVICE)
    logits = leaf * 1
    logprobs, _ = token_logprob(logits, targets, inplace=True)
    logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace=True: got a second backward"):
        logprobs.sum().backward()
    with pytest.raises(ValueError, match="logits_NV: got a leaf"):
        token_logprob(leaf, targets, inplace=True)
    with pytest.raises(ValueError, match="logits_NV: got strides"):
        token_logprob((leaf * 1)[:1].expand(3, 5), targets, inplace=True)
    with pytest.raises(ValueError, match="logits_NV: got a leaf"):
        grpo_loss(leaf, targets, targets.float(), targets.float(), Objective(), inplace=True)


def test_another_operation_that_kept_the_logits_does_not_read_their_gradient():
    leaf = torch.randn(3, 5, device=DEVICE, requires_grad=True)
    targets = torch.arange(3, device=DEVICE)
    for other in (torch.square, lambda x: token_logprob(x, targets, inplace=True)[0]):
        logits = leaf * 1
        kept, over = other(logits).sum(), token_logprob(logits, targets, inplace=True)[0].sum()
        over.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            kept.backward()
    logits = leaf.tanh()  # its own backward needs them
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        token_logprob(logits, targets, inplace=True)[0].sum().backward()


def test_without_grad_nothing_is_overwritten():
    logits = torch.randn(3, 5, device=DEVICE)
    before = logits.clone()
    with torch.no_grad():
        token_logprob(logits, torch.arange(3, device=DEVICE), inplace=True)
    assert torch.equal(logits, before)


def loss_of(seed, dtype, objective, *, count=9, vocabulary=37):
    """Return logits that an operation made of a leaf, and a function of them that computes their loss."""
    heads, others, keywords = loss_case(seed, count, vocabulary, off_policy=True, bias=False, row_temperature=True)
    del keywords["bias_V"]
    leaf, logits = logits_of(*heads, dtype)
    others, keywords = [placed(x) for x in others], placed(keywords)
    return leaf, logits, lambda x, **more: grpo_loss(x, *others, objective, **keywords, **more)


FORWARD = [Objective(), Objective(importance="sequence", kl_coef=0.1), Objective(kl_coef=0.1, entropy_coef=0.1)]


@pytest.mark.parametrize("objective", FORWARD)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_is_there_before_the_backward_which_scales_it(dtype, objective):
    _, logits, loss = loss_of(2, dtype, objective)
    for inplace in (False, True):
        kept = loss(logits, inplace=inplace)
        buffer = kept.loss.grad_fn.gradient_NV
        before = buffer.clone()
        assert (buffer.data_ptr() == logits.data_ptr()) == inplace
        (third,) = torch.autograd.grad(kept.loss, logits, torch.tensor(1 / 3, dtype=kept.loss.dtype, device=DEVICE))
        assert third.data_ptr() == buffer.data_ptr() and kept.loss.grad_fn.gradient_NV is None
        tolerance = {torch.bfloat16: 2**-7}.get(dtype, torch.finfo(dtype).eps)  # the interpreter truncates
        torch.testing.assert_close(third.double(), before.double() / 3, rtol=tolerance, atol=0)


@pytest.mark.parametrize("objective", FORWARD)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_backward_gives_the_gradient_unless_it_is_over_the_logits(dtype, objective):
    leaf, logits, loss = loss_of(4, dtype, objective)
    kept = loss(logits).loss
    once, again = (torch.autograd.grad(kept, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, again) and once.any()
    twice = torch.autograd.grad(kept + kept, leaf)[0]
    tolerance = {torch.bfloat16: 2**-6}.get(dtype, 1e-6)
    torch.testing.assert_close(twice.double(), 2 * once.double(), rtol=tolerance, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(kept, leaf)
    over = loss(logits, inplace=True).loss
    torch.autograd.grad(over, logits, retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace=True: got a second backward"):
        torch.autograd.grad(over, logits)


def test_logits_that_changed_are_not_read_by_a_second_backward():
    leaf, logits, loss = loss_of(4, torch.float32, Objective())
    kept = loss(logits).loss
    with torch.no_grad():
        logits.mul_(2)
    torch.autograd.grad(kept, leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(kept, leaf)


def test_without_a_gradient_there_is_no_buffer_and_nothing_is_overwritten():
    _, logits, loss = loss_of(4, torch.float32, Objective())
    before = logits.detach().clone()
    with torch.no_grad():
        alone = loss(logits, inplace=True)
    assert alone.loss.grad_fn is None and torch.equal(logits, before)
    frozen = loss(logits.detach())
    assert frozen.loss.grad_fn is None
    with_gradient = loss(logits)
    assert torch.equal(with_gradient.loss, alone.loss) and torch.equal(frozen.loss, alone.loss)
    assert torch.equal(with_gradient.logprobs_N, alone.logprobs_N) and alone.metrics == frozen.metrics


def test_small_gradients_of_float16_logits_do_not_vanish():
    """Scale the loss by 2^16, as fp16 training does: rounded before it, gradients of 1e-8 would be 0."""
    leaf = torch.zeros(4, 5, device=DEVICE, dtype=torch.float16, requires_grad=True)
    ones = torch.ones(4, device=DEVICE)
    loss = grpo_loss(leaf * 1, torch.zeros(4, dtype=torch.int64, device=DEVICE), ones, ones * 1e-8, Objective()).loss
    (loss * 2**16).backward()
    assert abs(float(leaf.grad[0, 0]) + 0.8 * 1e-8 * 2**16) < 1e-6
