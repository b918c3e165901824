"""The M-GRPO loss of one micro-batch, from logits or, fused, from the LM head's input.

Departs from the standard method: rows that add nothing never reach the head, and the fused form makes the gradient in
the forward, chunk by chunk (three matmuls, no logits kept); its backward only scales. Shared ratios (`sequence`,
`trajectory`) need every log-prob of a sequence first, hence one forward matmul more, unless old log-probs and sampler
weights are absent: on-policy the ratio is 1 and the slopes are known beforehand.

Legend: N rows, L live rows, H hidden, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from . import checks
from .head import Plan, sweep, wide
from .logprob import TokenLogprob
from .metrics import row_metrics
from .objective import Objective
from .rows import Coefficients, Rows, live_rows, policy_terms, slopes, total_loss, uses_sampler_weight
from .shard import Shard, check_sharded_head


class Loss(NamedTuple):
    """loss: 0-dim, differentiable. logprobs_N, entropy_N: detached, 0 at rows left out. metrics: see `metrics.py`."""

    loss: Tensor
    logprobs_N: Tensor
    entropy_N: Tensor
    metrics: dict[str, Tensor]


def grpo_loss(
    logits_NV: Tensor,
    targets_N: Tensor,
    advantages_N: Tensor,
    loss_weights_N: Tensor,
    objective: Objective,
    *,
    old_logprobs_N: Tensor | None = None,
    sampler_logprobs_N: Tensor | None = None,
    ref_logprobs_N: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
) -> Loss:
    """`linear_grpo_loss` for logits (N, V) of any float dtype that exist already; differentiable in them."""
    checks.check_logits(logits_NV)
    vectors = (advantages_N, loss_weights_N, old_logprobs_N, sampler_logprobs_N, ref_logprobs_N)
    rows = _rows(vectors, cu_seqlens, len(logits_NV), objective, wide(logits_NV.dtype))
    plan = _plan(targets_N, temperature, rows, objective, logits_NV.shape[1], logits_NV.dtype)
    live = rows if plan.index_L is None else rows.select(plan.index_L)
    logprobs_L, entropy_L = TokenLogprob.apply(logits_NV, plan)
    loss = _RowLoss.apply(logprobs_L, entropy_L, live, objective)
    return _result(loss, logprobs_L.detach(), entropy_L.detach(), plan, live, objective, len(logits_NV))


def linear_grpo_loss(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    advantages_N: Tensor,
    loss_weights_N: Tensor,
    objective: Objective,
    *,
    old_logprobs_N: Tensor | None = None,
    sampler_logprobs_N: Tensor | None = None,
    ref_logprobs_N: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bias_V: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    chunk_rows: int | None = None,
    group: ProcessGroup | None = None,
) -> Loss:
    """loss = sum_i loss_weights[i] * l_i,  l_i = -clipped term * sampler weight + kl_coef * kl_i - entropy_coef * H_i.

    Source: M-GRPO (arXiv 2511.13288), Eqs. 8-17; settings in `Objective`. Row i predicts targets_N[i]: the caller has
    shifted. Every denominator, multiplicity and length normaliser is inside loss_weights_N; weight 0: the row does not
    count, and nothing else of it is read. Log-probs, in nats, are those of (hidden @ weight^T + bias) / temperature.

    hidden (N, H) and weight (V, H) bfloat16, float32 or float64, of one dtype unless under autocast; bias (V,);
    targets (N,) int64; advantages, loss weights, the log-probs, all constants, (N,) float; temperature a number or
    (N,).
    old_logprobs_N None: on-policy. cu_seqlens (S + 1,) integer: bounds of the sequences, for shared ratios.
    chunk_rows: rows of logits in memory at a time; None: 64 MiB of them.
    group: the ranks that share the vocabulary. weight and bias then are this rank's consecutive rows, as many as it
    likes or none, in rank order; all else is the same on every rank, targets in [0, sum of V) too. So are the results
    and hidden's gradient, which is summed over the ranks; weight and bias get that of their own rows.
    Loss and log-probs are float32, or float64 for
    float64 inputs. Differentiable, once, in hidden, weight and bias.
    Raises ValueError for a wrong shape or dtype, a target outside [0, V), NaN (naming the row), or a missing input.
    """
    dtype, shard = check_sharded_head(hidden_NH, weight_VH, bias_V, chunk_rows, group)
    vectors = (advantages_N, loss_weights_N, old_logprobs_N, sampler_logprobs_N, ref_logprobs_N)
    rows = _rows(vectors, cu_seqlens, len(hidden_NH), objective, wide(dtype))
    vocabulary = shard.total if shard else len(weight_VH)
    plan = _plan(targets_N, temperature, rows, objective, vocabulary, dtype, chunk_rows, shard)
    live = rows if plan.index_L is None else rows.select(plan.index_L)
    differentiate = torch.is_grad_enabled()
    loss, logprobs_L, entropy_L = _LinearGrpo.apply(hidden_NH, weight_VH, bias_V, plan, live, objective, differentiate)
    return _result(loss, logprobs_L, entropy_L, plan, live, objective, len(hidden_NH))


def _rows(
    vectors_N: tuple[Tensor | None, ...],
    cu_seqlens: Tensor | None,
    count: int,
    objective: Objective,
    dtype: torch.dtype,
) -> Rows:
    """Checked rows, all N of them."""
    names = ("advantages_N", "loss_weights_N", "old_logprobs_N", "sampler_logprobs_N", "ref_logprobs_N")
    given = {name: values_N for name, values_N in zip(names, vectors_N, strict=True) if values_N is not None}
    checks.check_needed(objective, given.get("ref_logprobs_N"), cu_seqlens)
    for name, values_N in given.items():
        checks.check_row_vector(name, values_N, count)
    checks.check_finite("loss_weights_N", given["loss_weights_N"])
    counted_N = given["loss_weights_N"] != 0
    checks.check_finite("advantages_N", given["advantages_N"], counted_N)
    for name in names[2:]:
        if name in given:
            checks.check_not_nan(name, given[name], counted_N)
    old_N, sampler_N, ref_N = (given[name].detach().to(dtype) if name in given else None for name in names[2:])
    segment_N, sequences = _segments(cu_seqlens, count)
    return Rows(
        given["advantages_N"].detach().to(dtype),
        given["loss_weights_N"].detach().to(dtype),
        old_N,
        sampler_N,
        ref_N,
        segment_N,
        sequences,
    )


def _segments(cu_seqlens: Tensor | None, count: int) -> tuple[Tensor | None, int]:
    """Sequence of each row, and how many sequences there are."""
    if cu_seqlens is None:
        return None, 0
    checks.check_offsets("cu_seqlens", cu_seqlens, count)
    sequences = len(cu_seqlens) - 1
    return torch.repeat_interleave(torch.arange(sequences, device=cu_seqlens.device), cu_seqlens.diff()), sequences


def _plan(
    targets_N: Tensor,
    temperature: float | Tensor,
    rows: Rows,
    objective: Objective,
    vocabulary: int,
    dtype: torch.dtype,
    chunk_rows: int | None = None,
    shard: Shard | None = None,
) -> Plan:
    """Check the targets and the temperature, and leave out the rows that add nothing."""
    count = len(rows.weights_L)
    checks.check_targets(targets_N, count, vocabulary, rows.weights_L != 0)
    temperature = checks.check_temperature(temperature, count, rows.weights_L != 0)
    local_N = targets_N - shard.first if shard else targets_N
    index_L = live_rows(rows, objective)
    if len(index_L) == count:
        return Plan(local_N, None, temperature, dtype, chunk_rows, shard)
    if isinstance(temperature, Tensor):
        temperature = temperature[index_L]
    return Plan(local_N[index_L], index_L, temperature, dtype, chunk_rows, shard)


def _result(
    loss: Tensor, logprobs_L: Tensor, entropy_L: Tensor, plan: Plan, live: Rows, objective: Objective, count: int
) -> Loss:
    metrics = row_metrics(logprobs_L, entropy_L, live, objective)
    return Loss(loss, plan.put(logprobs_L, count), plan.put(entropy_L, count), metrics)


class _RowLoss(torch.autograd.Function):
    """The loss from log-probs and entropies."""

    @staticmethod
    def forward(ctx: Any, logprobs_L: Tensor, entropy_L: Tensor, live: Rows, objective: Objective) -> Tensor:
        ctx.save_for_backward(*slopes(logprobs_L, live, objective))
        return total_loss(logprobs_L, entropy_L, live, objective)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        by_logprob_L, by_entropy_L = ctx.saved_tensors
        return upstream * by_logprob_L, None if by_entropy_L is None else upstream * by_entropy_L, None, None


class _LinearGrpo(torch.autograd.Function):
    """The fused loss: everything happens in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        plan: Plan,
        live: Rows,
        objective: Objective,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs = tuple(differentiate and needed for needed in ctx.needs_input_grad[:3])
        coefficients = None
        if any(needs):
            coefficients = _coefficients(hidden_NH, weight_VH, bias_V, plan, live, objective)
        out = sweep(hidden_NH, weight_VH, bias_V, plan, coefficients, needs)
        ctx.plan, ctx.count, ctx.dtype = plan, len(hidden_NH), hidden_NH.dtype
        ctx.save_for_backward(out.dhidden_LH, out.dweight_VH, out.dbias_V)
        ctx.mark_non_differentiable(out.logprobs_L, out.entropy_L)
        loss = total_loss(out.logprobs_L, out.entropy_L, live, objective)
        return loss, out.logprobs_L, out.entropy_L

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # A Python number, because a 0-dim tensor would be rounded to bf16 first; 1.0, the usual one, costs no pass.
        scale = float(upstream)
        dhidden_LH, dweight_VH, dbias_V = (t if t is None or scale == 1.0 else t * scale for t in ctx.saved_tensors)
        dhidden_NH = None if dhidden_LH is None else ctx.plan.put(dhidden_LH.to(ctx.dtype), ctx.count)
        return dhidden_NH, dweight_VH, dbias_V, None, None, None, None


def _coefficients(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, plan: Plan, live: Rows, objective: Objective
) -> Coefficients:
    """Slopes of the rows: a token's from its own log-prob, shared ones from a sweep over all rows before."""
    policy_slope_L: Tensor | None = None
    if objective.importance != "token":
        if live.old_L is None and not uses_sampler_weight(live, objective):
            logprobs_L = torch.zeros_like(live.weights_L)  # on-policy: any will do, the ratio is 1
        else:
            logprobs_L = sweep(hidden_NH, weight_VH, bias_V, plan).logprobs_L
        policy_slope_L = policy_terms(logprobs_L, live, objective).slope_L
    return Coefficients(policy_slope_L, rows=live, objective=objective)
