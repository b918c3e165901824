"""Test that the losses go into a whole `torch.compile` graph, and give there what they give outside."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mgrpo.kernels import Objective, grpo_loss, linear_grpo_loss
from mgrpo.kernels.graph import metric_names, packed, unpacked
from numerics import loss_case

FULL = Objective(importance="sequence", kl_coef=0.1, entropy_coef=0.1, dual_clip=3.0)
OBJECTIVES = [Objective(), FULL, Objective(sampler_cap=None, kl="k1", kl_coef=0.2), Objective(sampler_cap=float("inf"))]


def case(seed: int, dtype: torch.dtype, **changes: Any) -> tuple[list[Tensor], list[Tensor], dict[str, Any]]:
    """Return hidden, weight and bias, differentiable; the other positional inputs; the keywords."""
    settings = {"off_policy": True, "bias": True, "row_temperature": bool(seed % 2)} | changes
    heads, others, keywords = loss_case(seed, 12, 19, **settings)
    leaves = [x.to(dtype).requires_grad_() for x in (*heads, keywords.pop("bias_V"))]
    others = [x.float() if x.is_floating_point() else x for x in others]
    named = {name: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in keywords.items()}
    return leaves, others, named


def linear(leaves: Any, others: Any, objective: Objective, **named: Any) -> Any:
    """Compute the loss of the head's input, and something after it that the graph holds too."""
    out = linear_grpo_loss(leaves[0] * 1, leaves[1], *others, objective, bias_V=leaves[2], chunk_rows=5, **named)
    return out.loss * 1 / 3, out


def of_logits(leaves: Any, others: Any, objective: Objective, **named: Any) -> Any:
    """Compute the loss of logits that the graph computes."""
    out = grpo_loss(torch.nn.functional.linear(*leaves), *others, objective, **named)
    return out.loss * 1 / 3, out


def results(function: Any, leaves: list[Tensor], *inputs: Any, **named: Any) -> list[Any]:
    loss, out = function(leaves, *inputs, **named)
    gradients = torch.autograd.grad(loss, leaves, retain_graph=True)
    return [loss, *out[:3], out.metrics, *gradients, torch.autograd.grad(loss, leaves[0])[0]]


DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float32)


@pytest.mark.parametrize(("dtype", "objective"), list(zip(DTYPES, OBJECTIVES, strict=True)))
@pytest.mark.parametrize("function", [linear, of_logits])
def test_a_whole_graph_gives_what_a_call_outside_gives(function: Any, dtype: torch.dtype, objective: Objective) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for seed in (2, 3):
        leaves, others, named = case(seed, dtype)
        loss, out = function(leaves, others, objective, **named)
        wanted = [loss, *out[:3], out.metrics, *torch.autograd.grad(loss, leaves)]
        *got, again = results(compiled, leaves, others, objective, **named)
        torch.testing.assert_close(got, wanted)
        assert torch.equal(got[5], again) and got[1].dtype == wanted[1].dtype
        assert not got[2].requires_grad and not any(x.requires_grad for x in got[4].values())


def test_without_a_gradient_none_is_computed() -> None:
    leaves, others, named = case(2, torch.float32)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        loss, _ = compiled(leaves, others, Objective(), **named)
    assert not loss.requires_grad
    leaves[1].requires_grad_(False)
    loss, _ = compiled(leaves, others, Objective(), **named)
    assert loss.requires_grad and len(torch.autograd.grad(loss, [leaves[0], leaves[2]])) == 2


def test_under_autocast_the_matmuls_have_its_dtype_and_gradients_that_of_the_weights() -> None:
    leaves, others, named = case(2, torch.float32)

    def cast(*inputs: Any, **named: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return linear(*inputs, **named)

    loss, out = cast(leaves, others, Objective(), **named)
    wanted = [loss, *out[:3], out.metrics, *torch.autograd.grad(loss, leaves)]
    *got, _ = results(torch.compile(cast, fullgraph=True, backend="aot_eager"), leaves, others, Objective(), **named)
    torch.testing.assert_close(got, wanted)


def test_a_bad_value_is_named_as_outside() -> None:
    leaves, others, named = case(2, torch.float32)
    others[2][0], others[1][0] = 1.0, torch.nan
    compiled = torch.compile(linear, backend="aot_eager")
    with pytest.raises(ValueError, match="advantages_N: got nan at row 0"):
        compiled(leaves, others, Objective(), **named)


@pytest.mark.filterwarnings("ignore")  # torch warns of what it does itself where it breaks a graph
def test_a_rule_breaks_the_graph_and_works() -> None:
    leaves, others, named = case(2, torch.float32)
    ruled = replace(Objective(), rule=lambda rows, objective: rows.logprobs * rows.advantages)

    def alone() -> Any:
        return linear_grpo_loss(leaves[0], leaves[1], *others, ruled, **named).loss * 2

    assert torch.equal(torch.compile(alone, backend="aot_eager")(), alone())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_comes_out_of_its_arguments_as_it_went_in(objective: Objective) -> None:
    numbers, *words = packed(objective)
    assert unpacked(numbers, *words) == objective


@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_fake_form_says_what_comes_out(dtype: torch.dtype, needs: tuple[bool, ...]) -> None:
    leaves, (targets, advantages, weights), named = case(3, dtype)
    vectors = [advantages, weights, *(named[f"{name}_logprobs_N"] for name in ("old", "sampler", "ref"))]
    numbers, *words = packed(FULL)
    tail = [named["cu_seqlens"], named["temperature"], 1.0, numbers, *words, None, list(needs), dtype, None, None]
    inputs = [*(leaf.detach() for leaf in leaves), targets, *vectors, *tail]
    operation = torch.ops.mgrpo.linear_grpo_loss
    real = operation(*inputs)
    with FakeTensorMode() as mode:
        fake = operation(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in inputs))
    described = [[(x.shape, x.dtype, x.stride()) for x in outputs] for outputs in (real, fake)]
    assert described[0] == described[1]
    assert len(real[3]) == len(metric_names(FULL, sampler=vectors[3] is not None, ref=True))


def test_torch_finds_nothing_wrong_with_the_operations() -> None:
    leaves, (targets, advantages, weights), _ = case(2, torch.float32)
    numbers, *words = packed(Objective())
    rows = [targets, advantages, weights, None, None, None, None, None, 0.7, numbers, *words, None]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    inputs = (*leaves, *rows, [True] * 3, torch.float32, 5, None)
    torch.library.opcheck(torch.ops.mgrpo.linear_grpo_loss, inputs, test_utils=tests)
    logits_NV = (leaves[0] @ leaves[1].T).detach().requires_grad_()
    torch.library.opcheck(torch.ops.mgrpo.grpo_loss, (logits_NV, *rows, [True], torch.float32), test_utils=tests)
