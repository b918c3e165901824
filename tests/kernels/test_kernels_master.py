"""Test that the fused loss adds the gradient of the head to a float32 master as autograd adds it to a weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mgrpo.kernels import Loss, Objective, linear_grpo_loss
from numerics import error, loss_case


def case(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
    heads, others, keywords = loss_case(3, 40, 37, 8, off_policy=True, bias=True, row_temperature=False)
    keywords["bias_V"] = keywords["bias_V"].to(dtype).requires_grad_()
    return [head.to(dtype).requires_grad_() for head in heads], list(others), keywords


def run(heads, others, keywords, **more) -> Loss:
    return linear_grpo_loss(*heads, *others, Objective(), chunk_rows=7, **keywords, **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_what_autograd_adds_to_a_wide_weight(dtype):
    heads, others, keywords = case(dtype)
    plain, _, plain_keywords = case(dtype)
    master = torch.nn.Parameter(heads[1].detach().clone())
    for _ in range(2):
        run(heads, others, keywords, master_VH=master).loss.backward()
        run(plain, others, plain_keywords).loss.backward()
        assert heads[1].grad is None
        assert master.grad.dtype == dtype
        torch.testing.assert_close(master.grad, plain[1].grad, rtol=1e-5, atol=1e-7)
        assert torch.equal(heads[0].grad, plain[0].grad)
        assert torch.equal(keywords["bias_V"].grad, plain_keywords["bias_V"].grad)


def test_the_first_sum_is_equal_to_the_bit():
    heads, others, keywords = case(torch.float32)
    plain, _, plain_keywords = case(torch.float32)
    master = torch.nn.Parameter(heads[1].detach().clone())
    run(heads, others, keywords, master_VH=master)
    run(plain, others, plain_keywords).loss.backward()
    assert torch.equal(master.grad, plain[1].grad)


def test_a_bf16_weight_keeps_what_rounding_would_lose():
    heads, others, keywords = case(torch.bfloat16)
    master = torch.nn.Parameter(heads[1].detach().float())
    rounded = torch.zeros_like(master)
    for _ in range(3):
        run(heads, others, keywords, master_VH=master)
        plain, _, plain_keywords = case(torch.bfloat16)
        run(plain, others, plain_keywords).loss.backward()
        rounded += plain[1].grad
    wide = [head.detach().float().requires_grad_() for head in heads]
    wide_keywords = keywords | {"bias_V": keywords["bias_V"].detach().float()}
    run(wide, others, wide_keywords).loss.backward()
    truth = 3 * wide[1].grad
    assert master.grad.dtype == torch.float32
    assert error(master.grad, truth) <= error(rounded, truth)
    torch.testing.assert_close(master.grad.bfloat16(), rounded.bfloat16(), rtol=2e-2, atol=1e-4)


def test_a_tied_weight_gets_only_its_other_gradient():
    heads, others, keywords = case(torch.float32)
    table = heads[1]
    rows = torch.randint(37, (40,))
    whole, others_part = torch.nn.Parameter(table.detach().clone()), torch.nn.Parameter(table.detach().clone())
    loss = linear_grpo_loss(table[rows], table, *others, Objective(), **keywords, master_VH=whole).loss
    loss.backward()
    plain = table.detach().clone().requires_grad_()
    linear_grpo_loss(plain[rows], plain, *others, Objective(), **keywords).loss.backward()
    torch.testing.assert_close(whole.grad + table.grad, plain.grad)
    fixed = linear_grpo_loss(others_part[rows], table.detach(), *others, Objective(), **keywords).loss
    fixed.backward()
    assert torch.equal(table.grad, others_part.grad)


def test_nothing_is_added_where_nothing_is_differentiated():
    heads, others, keywords = case(torch.float32)
    master = torch.nn.Parameter(heads[1].detach().clone())
    with torch.no_grad():
        run(heads, others, keywords, master_VH=master)
    run([heads[0], heads[1].detach()], others, keywords, master_VH=master).loss.backward()
    assert master.grad is None


def test_a_scaled_loss_is_refused():
    heads, others, keywords = case(torch.float32)
    master = torch.nn.Parameter(heads[1].detach().clone())
    with pytest.raises(RuntimeError, match="a gradient other than 1 reached a loss with a master_VH"):
        (2 * run(heads, others, keywords, master_VH=master).loss).backward()
    (run(heads, others, keywords, master_VH=master).loss + 3).backward()


@pytest.mark.parametrize("change", ["shape", "dtype", "leaf"])
def test_a_master_that_is_none_is_refused(change):
    heads, others, keywords = case(torch.bfloat16)
    master = heads[1].detach().float().requires_grad_()
    wrong = {"shape": master.detach()[1:], "dtype": master.detach().double(), "leaf": master * 1}[change]
    with pytest.raises(ValueError, match="master_VH: got shape, dtype, device, is_leaf"):
        run(heads, others, keywords, master_VH=wrong)
