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
