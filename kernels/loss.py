"""The M-GRPO loss of one micro-batch, computed from logits, from log-probs, or fused from the LM head's input.

Unlike the standard method, rows that add nothing to the gradient never reach the head, and the fused form computes the
gradient chunk by chunk in the forward (three matmuls, no logits kept); its backward only scales. Ratios shared by a
sequence (`sequence`, `trajectory`) and a caller's rule need every log-prob of a sequence first, which costs one more
forward matmul. Shared ratios do without it on-policy and without sampler weights: the ratio is 1, so the slopes are
known beforehand.

Legend: N rows, L live rows, H hidden, V vocabulary.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from . import checks
from .inplace import scale_in_place
from .inputs import checked_rows, plan_rows
from .linear_head import HeadPlan, check_master, sweep, wide
from .logprob import TokenLogprob
from .metrics import row_metrics
from .objective import Objective
from .terms import Coefficients, LossRows, live_rows, policy_terms, rule_slopes, slopes, total_loss, uses_sampler_weight
from .vocab_parallel import check_sharded_head

SPENT = (
    "linear_grpo_loss: got a second backward, expected one: the gradient is computed in the forward, and the first "
    "backward has scaled and returned the only copy. Ask for all gradients at once, or compute the loss again."
)
ADDED = "linear_grpo_loss: a gradient other than 1 reached a loss with a master_VH, whose gradient is added already"


class Loss(NamedTuple):
    """Hold a loss and what was computed with it.

    loss: 0-dim, differentiable. logprobs_N, entropy_N: detached, 0 at rows left out. metrics: see `metrics.py`.
    """

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
    inplace: bool = False,
    softcap: float | None = None,
) -> Loss:
    """Return the loss of `linear_grpo_loss` for existing logits (N, V) of any float dtype, differentiable in them.

    inplace: the backward writes the gradient over the logits, as in `token_logprob`. softcap: the logits are those
    before the cap.
    """
    checks.check_logits(logits_NV, inplace=inplace)
    checks.check_softcap(softcap)
    values = checks.ValueChecks(logits_NV.device)
    vectors = (advantages_N, loss_weights_N, old_logprobs_N, sampler_logprobs_N, ref_logprobs_N)
    rows = checked_rows(values, vectors, cu_seqlens, len(logits_NV), objective, wide(logits_NV.dtype))
    vocabulary, dtype = logits_NV.shape[1], logits_NV.dtype
    plan, live = plan_rows(values, targets_N, temperature, rows, objective, vocabulary, dtype, softcap=softcap)
    logprobs_L, entropy_L = TokenLogprob.apply(logits_NV, plan, inplace)
    loss, log_ratio_L = RowLoss.apply(logprobs_L, entropy_L, live, objective)
    return _result(loss, logprobs_L.detach(), entropy_L.detach(), log_ratio_L, plan, live, objective, len(logits_NV))


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
    softcap: float | None = None,
    buffer_bytes: int | None = None,
    master_VH: Tensor | None = None,
) -> Loss:
    """Return loss = sum_i loss_weights[i] * l_i, computed from the LM head's input without keeping logits.

    l_i = -clipped term * sampler weight + kl_coef * kl_i - entropy_coef * H_i (M-GRPO, arXiv 2511.13288, Eqs. 8-17).
    `Objective` holds the settings; if it has a rule, the rule computes l_i instead. Row i predicts targets_N[i]: the
    caller has shifted. Every denominator, multiplicity and length normaliser is part of loss_weights_N. A row of weight
    0 does not count, and nothing else of it is read. Log-probs, in nats, are those of
    x / temperature with x = hidden @ weight^T + bias or, with a softcap c, of c * tanh(x / c) / temperature.

    hidden (N, H) and weight (V, H): bfloat16, float32 or float64, of one dtype except under autocast. bias: (V,).
    targets: (N,) int64. Advantages, loss weights and the given log-probs: (N,) float, constants in the gradient.
    temperature: a number or (N,). old_logprobs_N None: on-policy. cu_seqlens: (S + 1,) integer, the bounds of the
    sequences, needed for shared ratios. chunk_rows: rows of logits in memory at a time; None: as many as fit 64 MiB on
    a CPU and, on a GPU, buffers of 400 MiB to 2.8 GiB, up to a quarter of what is free when it first meets this head.
    buffer_bytes: the most that the buffers on a GPU may take. With torch's deterministic algorithms, and with a group,
    they take 400 MiB or that.
    group: the ranks that share the vocabulary. weight and bias are then this rank's consecutive rows (any number of
    them, also none) in rank order; everything else is the same on every rank, with targets in [0, sum of V). The
    results and hidden's gradient, summed over the ranks, are also the same on every rank; weight and bias get the
    gradient of their own rows.

    Loss and log-probs are float32, or float64 for float64 inputs. The loss is differentiable in hidden, weight and
    bias by one backward: their gradients are computed in the forward, and the backward scales and rounds them in place.
    A bfloat16 weight's gradient is therefore the front half of a float32 gradient's storage, which lives as long as it.
    master_VH: a float32 leaf (float64 for float64) of the weight's shape. The weight's gradient is then added to
    master_VH.grad as it is summed, already in this call, and the weight itself gets none: nothing scales, rounds or
    copies it. So the loss must reach the backward with a gradient of 1, and a checkpoint must not call this twice.
    Raises ValueError for a wrong shape or dtype, a target outside [0, V), NaN (naming the row) or a missing input, and
    RuntimeError in a second backward, or in one with another gradient than 1 if there is a master.
    """
    checks.check_softcap(softcap)
    dtype, shard = check_sharded_head(hidden_NH, weight_VH, bias_V, chunk_rows, buffer_bytes, group)
    check_master(master_VH, weight_VH, dtype)
    vectors = (advantages_N, loss_weights_N, old_logprobs_N, sampler_logprobs_N, ref_logprobs_N)
    values = checks.ValueChecks(hidden_NH.device)
    rows = checked_rows(values, vectors, cu_seqlens, len(hidden_NH), objective, wide(dtype))
    vocabulary = shard.total if shard else len(weight_VH)
    plan, live = plan_rows(
        values, targets_N, temperature, rows, objective, vocabulary, dtype, chunk_rows, shard, softcap
    )
    plan = replace(plan, buffer_bytes=buffer_bytes, master_VH=master_VH)
    differentiate = torch.is_grad_enabled()
    loss, logprobs_L, entropy_L, log_ratio_L = _LinearGrpo.apply(
        hidden_NH, weight_VH, bias_V, plan, live, objective, differentiate
    )
    return _result(loss, logprobs_L, entropy_L, log_ratio_L, plan, live, objective, len(hidden_NH))


def logprob_loss(
    logprobs_N: Tensor,
    advantages_N: Tensor,
    loss_weights_N: Tensor,
    objective: Objective,
    *,
    entropies_N: Tensor | None = None,
    old_logprobs_N: Tensor | None = None,
    sampler_logprobs_N: Tensor | None = None,
    ref_logprobs_N: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Loss:
    """Return the loss of `linear_grpo_loss` for existing log-probs, for models that hand over log-probs, never logits.

    logprobs_N: (N,) float32 or float64, in nats. entropies_N: (N,), needed if entropy_coef is not 0; a rule sees zeros
    if there are none. The loss is differentiable in both; rows that add nothing to it get a gradient of 0.
    Raises ValueError for a wrong shape or dtype, NaN in a row that counts (naming it), or a missing input.
    """
    dtype, count = logprobs_N.dtype, logprobs_N.numel()
    checks.require(dtype in (torch.float32, torch.float64), "logprobs_N", dtype, "torch.float32 or torch.float64")
    missing = objective.entropy_coef != 0 and entropies_N is None
    checks.require(not missing, "entropies_N", None, "a tensor, as entropy_coef is not 0")
    entropies_N = torch.zeros_like(logprobs_N) if entropies_N is None else entropies_N
    values = checks.ValueChecks(logprobs_N.device)
    vectors = (advantages_N, loss_weights_N, old_logprobs_N, sampler_logprobs_N, ref_logprobs_N)
    rows = checked_rows(values, vectors, cu_seqlens, count, objective, dtype)
    for name, values_N in (("logprobs_N", logprobs_N), ("entropies_N", entropies_N)):
        checks.check_row_vector(name, values_N, count)
        values.not_nan(name, values_N, rows.weights_L != 0)
    live_N = live_rows(rows, objective)
    (live_count,) = values.settle(live_N.sum())
    index_L = torch.argsort(~live_N, stable=True)[:live_count]  # nonzero() would wait for the device again
    live = rows.select(index_L)
    logprobs_L, entropies_L = logprobs_N[index_L], entropies_N[index_L].to(dtype)
    loss, log_ratio_L = RowLoss.apply(logprobs_L, entropies_L, live, objective)
    metrics = row_metrics(logprobs_L.detach(), entropies_L.detach(), log_ratio_L, live, objective)
    shown = [torch.where(live_N, values_N.detach(), 0) for values_N in (logprobs_N, entropies_N)]
    return Loss(loss, shown[0], shown[1], metrics)


def _result(
    loss: Tensor,
    logprobs_L: Tensor,
    entropy_L: Tensor,
    log_ratio_L: Tensor,
    plan: HeadPlan,
    live: LossRows,
    objective: Objective,
    count: int,
) -> Loss:
    """Return the loss with its metrics, and log-probs and entropies at all N rows."""
    metrics = row_metrics(logprobs_L, entropy_L, log_ratio_L, live, objective)
    return Loss(loss, plan.put(logprobs_L, count), plan.put(entropy_L, count), metrics)


class RowLoss(torch.autograd.Function):
    """Compute the loss of log-probs and entropies, and the log of each ratio; the slopes are kept for the backward."""

    @staticmethod
    def forward(
        ctx: Any, logprobs_L: Tensor, entropy_L: Tensor, live: LossRows, objective: Objective
    ) -> tuple[Tensor, Tensor]:
        terms = policy_terms(logprobs_L, live, objective)
        if objective.rule is not None:
            ctx.save_for_backward(*rule_slopes(logprobs_L, entropy_L, live, objective))
        else:
            ctx.save_for_backward(*slopes(logprobs_L, live, objective, terms.slope_L))
        ctx.mark_non_differentiable(terms.log_ratio_L)
        return total_loss(logprobs_L, entropy_L, live, objective, terms), terms.log_ratio_L

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        by_logprob_L, by_entropy_L = ctx.saved_tensors
        return upstream * by_logprob_L, None if by_entropy_L is None else upstream * by_entropy_L, None, None


class _LinearGrpo(torch.autograd.Function):
    """Compute the fused loss, log-probs, entropies and log ratios and, in the forward, its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        plan: HeadPlan,
        live: LossRows,
        objective: Objective,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        needs = tuple(differentiate and needed for needed in ctx.needs_input_grad[:3])
        coefficients = None
        if any(needs):
            coefficients = _coefficients(hidden_NH, weight_VH, bias_V, plan, live, objective)
        out = sweep(hidden_NH, weight_VH, bias_V, plan, coefficients, needs)
        ctx.plan, ctx.count, ctx.gradients = plan, len(hidden_NH), out[2:]
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden_NH, weight_VH, bias_V)]
        terms = policy_terms(out.logprobs_L, live, objective)
        ctx.mark_non_differentiable(out.logprobs_L, out.entropy_L, terms.log_ratio_L)
        loss = total_loss(out.logprobs_L, out.entropy_L, live, objective, terms)
        return loss, out.logprobs_L, out.entropy_L, terms.log_ratio_L

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(SPENT)
        gradients, ctx.gradients = ctx.gradients, None
        if ctx.plan.master_VH is not None:  # on a GPU the host does not wait for the answer
            torch._assert_async(upstream == 1, ADDED)
        pairs = zip(gradients, ctx.dtypes, strict=True)
        dhidden_LH, dweight_VH, dbias_V = (None if t is None else scale_in_place(t, upstream, d) for t, d in pairs)
        dhidden_NH = None if dhidden_LH is None else ctx.plan.put(dhidden_LH, ctx.count)
        return dhidden_NH, dweight_VH, dbias_V, None, None, None, None


def _coefficients(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, plan: HeadPlan, live: LossRows, objective: Objective
) -> Coefficients:
    """Return the slopes of the rows; a rule and shared ratios may need a sweep for the log-probs first."""
    if objective.rule is not None:
        out = sweep(hidden_NH, weight_VH, bias_V, plan)
        return Coefficients(*rule_slopes(out.logprobs_L, out.entropy_L, live, objective))
    policy_slope_L: Tensor | None = None
    if objective.importance != "token":
        if live.old_L is None and not uses_sampler_weight(live, objective):
            logprobs_L = torch.zeros_like(live.weights_L)  # on-policy the ratio is 1 for any log-probs
        else:
            logprobs_L = sweep(hidden_NH, weight_VH, bias_V, plan).logprobs_L
        policy_slope_L = policy_terms(logprobs_L, live, objective).slope_L
    return Coefficients(policy_slope_L, rows=live, objective=objective)
