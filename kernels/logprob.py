"""Compute log-prob and entropy of each row's target, differentiable, from logits or from the LM head's input.

The forward keeps no softmax and, from the head's input, no logits; the backward computes them again by chunks.

Legend: N rows, H hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version
from torch.distributed import ProcessGroup

from .checks import ValueChecks, check_logits, check_softcap, check_targets, check_temperature, require_device
from .dispatch import takes_kernels, triton_module
from .inplace import scale_in_place
from .linear_head import HeadPlan, sweep, token_sweep, wide
from .terms import Coefficients
from .vocab_parallel import check_sharded_head

SPENT = (
    "inplace=True: got a second backward, expected one: the first has overwritten the logits with their gradient. "
    "Ask for all gradients at once, or compute the logits again."
)


def token_logprob(
    logits_NV: Tensor,
    targets_N: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    inplace: bool = False,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return log softmax(logits / temperature) at the target, and the entropy of that softmax, in nats.

    logits (N, V) any float, targets (N,) int64, temperature a number or (N,) -> two (N,) float32, or float64 for
    float64 logits. Both are differentiable in the logits.
    softcap c: the logits are first replaced by c * tanh(logits / c), as Gemma 2 does (arXiv 2408.00118, section 2).
    inplace: the backward writes the gradient over the logits, which saves memory of their size. Nothing else may need
    them: an operation that saved them for its own backward raises there, by torch's version counter.
    Raises ValueError for a wrong shape, dtype, target, temperature or softcap and, with inplace, for logits that are a
    leaf; RuntimeError in a second backward with inplace.
    """
    check_logits(logits_NV, inplace=inplace)
    check_softcap(softcap)
    temperature = _checked(targets_N, temperature, logits_NV, logits_NV.shape[1])
    plan = HeadPlan(targets_N, None, temperature, logits_NV.dtype, softcap=softcap)
    return TokenLogprob.apply(logits_NV, plan, inplace)


def linear_logprob(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    chunk_rows: int | None = None,
    group: ProcessGroup | None = None,
    softcap: float | None = None,
    buffer_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `token_logprob` of the logits hidden @ weight^T + bias, computed `chunk_rows` rows at a time.

    hidden (N, H) and weight (V, H) bfloat16, float32 or float64 -> two (N,) float32, or float64 for float64 inputs.
    Both are differentiable in hidden, weight and bias (four matmuls). group, buffer_bytes: as in `linear_grpo_loss`.
    softcap: as in `token_logprob`.
    A row's results depend on its neighbours and on chunk_rows only as far as the matmul's order of summation does. On a
    CPU (257 rows of width 576, V 49152) no bit changed in bfloat16. In float32 only chunks of one or two rows changed
    log-probs, by at most 2e-6 nats. On a GPU this has not been measured.
    Raises ValueError for a wrong shape, dtype, target, temperature or softcap.
    """
    check_softcap(softcap)
    dtype, shard = check_sharded_head(hidden_NH, weight_VH, bias_V, chunk_rows, buffer_bytes, group)
    temperature = _checked(targets_N, temperature, hidden_NH, shard.total if shard else len(weight_VH))
    local_N = targets_N - shard.first if shard else targets_N
    plan = HeadPlan(local_N, None, temperature, dtype, chunk_rows, shard, softcap=softcap, buffer_bytes=buffer_bytes)
    return _LinearLogprob.apply(hidden_NH, weight_VH, bias_V, plan)


def _checked(targets_N: Tensor, temperature: float | Tensor, rows_NX: Tensor, vocabulary: int) -> float | Tensor:
    """Check all values of targets and temperature; return the temperature."""
    count, device = len(rows_NX), rows_NX.device
    check_targets(targets_N, count)
    require_device("targets_N", targets_N, device)
    checked = check_temperature(temperature, count)
    temperature_N = checked if isinstance(checked, Tensor) else None
    if temperature_N is not None:
        require_device("temperature", temperature_N, device)
    if count and takes_kernels(rows_NX, rows_NX.dtype):
        good, *_ = triton_module("vectors").check_rows(rows_NX, count, targets_N, temperature_N, vocabulary)
        if good:
            return checked
        # Otherwise a value is bad, and the checks below name it.
    values = ValueChecks(device)
    values.targets(targets_N, count, vocabulary)
    values.temperature(checked, count)
    values.settle()
    return checked


def token_pass(
    logits_NV: Tensor, plan: HeadPlan, coefficients: Coefficients | None = None, gradient_NV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return log-prob and entropy of the plan's rows of logits; with coefficients also write the whole gradient.

    gradient_NV may be the logits.
    """
    if takes_kernels(logits_NV, logits_NV.dtype):
        out = triton_module("linear_head").token_forward(logits_NV, plan, coefficients, gradient_NV)
    else:
        out = token_sweep(logits_NV, plan, coefficients, gradient_NV)
    if gradient_NV is not None and plan.rest_D is not None:
        gradient_NV.index_fill_(0, plan.rest_D, 0)
    return out[0], out[1]


class TokenLogprob(torch.autograd.Function):
    """Compute log-prob and entropy of the plan's rows of logits; inplace: the gradient is written over the logits."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, plan: HeadPlan, inplace: bool) -> tuple[Tensor, Tensor]:
        ctx.plan, ctx.inplace, ctx.spent = plan, inplace, False
        ctx.set_materialize_grads(False)
        if takes_kernels(logits_NV, logits_NV.dtype):
            statistics = triton_module("linear_head").token_forward(logits_NV, plan)
            ctx.save_for_backward(logits_NV, *statistics)
            return statistics[:2]
        ctx.save_for_backward(logits_NV)
        return token_sweep(logits_NV, plan)[:2]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, by_logprob_L: Tensor | None, by_entropy_L: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        if ctx.spent:
            raise RuntimeError(SPENT)
        ctx.spent = ctx.inplace
        logits_NV, *statistics = (t.detach() for t in ctx.saved_tensors)
        coefficients = Coefficients(by_logprob_L, by_entropy_L)
        gradient_NV = logits_NV if ctx.inplace else torch.empty_like(logits_NV)
        if statistics:
            triton_module("linear_head").token_backward(logits_NV, ctx.plan, statistics, coefficients, gradient_NV)
        else:
            token_sweep(logits_NV, ctx.plan, coefficients, gradient_NV)
        if ctx.plan.rest_D is not None:
            gradient_NV.index_fill_(0, ctx.plan.rest_D, 0)
        if ctx.inplace:
            increment_version(logits_NV)  # autograd does not see a kernel's writes
        return gradient_NV, None, None


class _LinearLogprob(torch.autograd.Function):
    """Compute log-prob and entropy from the head's input; the backward sweeps a second time."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, plan: HeadPlan
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
