"""Test what the fused head does on a GPU alone: buffers of any size, and the sum in the weight's master."""

import pytest
import torch
from triton_cases import as_good, kernels_take_the_tensors, placed, skip_unless_kernels_run

from mgrpo.kernels import Objective, linear_grpo_loss, linear_logprob
from mgrpo.kernels.reference import linear_grpo_loss_ref
from numerics import double, error, loss_case

skip_unless_kernels_run()
__all__ = ["kernels_take_the_tensors"]
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:overflow encountered")]
FULL = Objective(kl_coef=0.1, entropy_coef=0.1, dual_clip=3.0)
VOCABULARY = 40


def case(dtype):
    heads, others, keywords = loss_case(5, 300, VOCABULARY, 16, off_policy=True, bias=False, row_temperature=False)
    return placed(heads, dtype), placed(others, torch.float32), placed(keywords, torch.float32)


def run(heads, others, keywords, **more):
    leaves = [head.detach().requires_grad_() for head in heads]
    out = linear_grpo_loss(*leaves, *others, FULL, **keywords, **more)
    out.loss.backward()
    return [out.loss.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_size_of_the_buffers_changes_rounding_alone(dtype):
    heads, others, keywords = case(dtype)
    whole = run(heads, others, keywords)
    truth = run_reference(heads, others, keywords)
    for size in (1, 4096, 1 << 16):
        for got, same, true in zip(run(heads, others, keywords, buffer_bytes=size), whole, truth, strict=True):
            assert as_good(got, same, true)
    targets = others[0]
    one, two = (linear_logprob(*heads, targets, buffer_bytes=size)[0] for size in (None, 4096))
    assert error(one, two) < 1e-5


def run_reference(heads, others, keywords):
    leaves = [head.requires_grad_() for head in double(heads)]
    loss = linear_grpo_loss_ref(*leaves, *double(others), FULL, **double(keywords))[0]
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("buffer_bytes", [None, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_master_gets_the_sum_of_every_call(dtype, buffer_bytes):
    heads, others, keywords = case(dtype)
    master = torch.nn.Parameter(heads[1].detach().float())
    truth = run_reference(heads, others, keywords)
    for calls in (1, 2):
        loss, dhidden, dweight = run(heads, others, keywords, master_VH=master, buffer_bytes=buffer_bytes)
        assert dweight is None and master.grad.dtype == torch.float32
        assert error(master.grad, calls * truth[2]) < (2e-2 if dtype == torch.bfloat16 else 1e-4)
        assert error(loss, truth[0]) < 1e-2 and error(dhidden, truth[1]) < 3e-2


def test_a_call_without_live_rows_keeps_the_sum():
    heads, others, keywords = case(torch.float32)
    master = torch.nn.Parameter(heads[1].detach().float())
    targets, advantages, weights = others
    run(heads, (targets, advantages, 0 * weights), keywords, master_VH=master)
    assert torch.equal(master.grad, torch.zeros_like(master))
    run(heads, others, keywords, master_VH=master)
    before = master.grad.clone()
    run(heads, (targets, advantages, 0 * weights), keywords, master_VH=master)
    assert torch.equal(master.grad, before) and float(before.abs().sum()) > 0
