"""Log-prob and entropy of each row's target, from logits or from the LM head's input, differentiable.

The forward keeps no logits (the linear form) and no softmax (either form); the backward forms them again by chunks.

Legend: N rows, H hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from .checks import ValueChecks, check_logits
from .device import takes_kernels, triton_module
from .head import Plan, sweep, token_sweep, wide
from .narrow import scale_in_place
from .rows import Coefficients
from .shard import check_sharded_head


def token_logprob(logits_NV: Tensor, targets_N: Tensor, *, temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at the target, and the entropy of that softmax, in nats.

    logits (N, V) any float, targets (N,) int64, temperature a number or (N,) -> two (N,) float32, or float64 for
    float64 logits. Differentiable in the logits. ValueError for a wrong shape, dtype, target or temperature.
    """
    check_logits(logits_NV)
    temperature = _checked(targets_N, temperature, logits_NV, logits_NV.shape[1])
    return TokenLogprob.apply(logits_NV, Plan(targets_N, None, temperature, logits_NV.dtype))


def linear_logprob(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    chunk_rows: int | None = None,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """`token_logprob` of the logits hidden @ weight^T + bias, which are formed `chunk_rows` rows at a time.

    hidden (N, H) and weight (V, H) bfloat16, float32 or float64 -> two (N,) float32, or float64 for float64 inputs.
    Differentiable in hidden, weight and bias (four matmuls). group: as in `linear_grpo_loss`.
    ValueError for a wrong shape, dtype, target, temperature.
    """
    dtype, shard = check_sharded_head(hidden_NH, weight_VH, bias_V, chunk_rows, group)
    temperature = _checked(targets_N, temperature, hidden_NH, shard.total if shard else len(weight_VH))
    local_N = targets_N - shard.first if shard else targets_N
    plan = Plan(local_N, None, temperature, dtype, chunk_rows, shard)
    return _LinearLogprob.apply(hidden_NH, weight_VH, bias_V, plan)


def _checked(targets_N: Tensor, temperature: float | Tensor, rows_NX: Tensor, vocabulary: int) -> float | Tensor:
    """The temperature, all values being sound."""
    values = ValueChecks(rows_NX.device)
    values.targets(targets_N, len(rows_NX), vocabulary)
    temperature = values.temperature(temperature, len(rows_NX))
    values.settle()
    return temperature


class TokenLogprob(torch.autograd.Function):
    """Log-prob and entropy of the plan's rows of some logits."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        if takes_kernels(logits_NV, logits_NV.dtype):
            kept = triton_module("fused").token_forward(logits_NV, plan)
            ctx.save_for_backward(logits_NV, *kept)
            return kept[:2]
        ctx.save_for_backward(logits_NV)
        return token_sweep(logits_NV, plan)[:2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_logprob_L: Tensor | None, by_entropy_L: Tensor | None) -> tuple[Tensor | None, None]:
        logits_NV, *kept = ctx.saved_tensors
        coefficients = Coefficients(by_logprob_L, by_entropy_L)
        if kept:
            return triton_module("fused").token_backward(logits_NV, ctx.plan, kept, coefficients), None
        return token_sweep(logits_NV, ctx.plan, coefficients).dlogits_NV, None


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, plan: Plan
    ) -> tuple[Tensor, Tensor]:
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V)
        return sweep(hidden_NH, weight_VH, bias_V, plan)[:2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_logprob_N: Tensor | None, by_entropy_N: Tensor | None) -> tuple[Tensor | None, ...]:
        coefficients = Coefficients(by_logprob_N, by_entropy_N)
        hidden_NH, weight_VH, bias_V = ctx.saved_tensors
        out = sweep(hidden_NH, weight_VH, bias_V, ctx.plan, coefficients, ctx.needs_input_grad[:3])
        one = hidden_NH.new_ones((), dtype=wide(ctx.plan.matmul_dtype))
        pairs = zip(out[2:], ctx.saved_tensors, strict=True)
        return *(None if t is None else scale_in_place(t, one, leaf.dtype) for t, leaf in pairs), None
