"""The M-GRPO loss of one micro-batch, computed from logits, from log-probs, or fused from the LM head's input.

Unlike the standard method, rows that add nothing to the gradient never reach the head, and the fused form computes the
gradient chunk by chunk in the forward (three matmuls, no logits kept); its backward only scales. Ratios shared by a
sequence (`sequence`, `trajectory`) and a caller's rule need every log-prob of a sequence first, which costs one more
forward matmul. Shared ratios do without it on-policy and without sampler weights: the ratio is 1, so the slopes are
known beforehand.

Legend: N rows, L live rows, H hidden, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version
from torch.distributed import ProcessGroup

from . import checks, graph
from .inplace import scale_in_place
from .inputs import GivenRows, find_live, given_rows, plan_rows
from .linear_head import HeadPlan, Sweep, check_master, sweep, wide
from .logprob import SPENT as OVERWRITTEN
from .logprob import TokenLogprob, token_pass
from .metrics import loss_and_metrics
from .objective import Objective
from .terms import Coefficients, LossRows, policy_terms, rule_slopes, uses_sampler_weight
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

    The gradient is computed in this call, while the logits are at hand, and the backward only scales it, in place: not
    at all if its own gradient is 1. A second backward computes it again. Without a gradient (`torch.no_grad`) there is
    no such buffer. float16 logits get theirs in the backward, as the scale of the loss must come before rounding.
    inplace: this call writes the gradient over the logits, which saves the buffer. Nothing may read them afterwards;
    an operation that saved them for its own backward raises there, by torch's version counter. There is no second
    backward then. softcap: the logits are those before the cap.
    """
    checks.check_logits(logits_NV, inplace=inplace)
    checks.check_softcap(softcap)
    (count, vocabulary), dtype = logits_NV.shape, logits_NV.dtype
    vectors = (advantages_N, loss_weights_N, old_logprobs_N, sampler_logprobs_N, ref_logprobs_N)
    if torch.compiler.is_compiling() and objective.rule is None and dtype != torch.float16:
        rows = (targets_N, vectors, cu_seqlens, temperature, objective, softcap)
        return Loss(*graph.call(LOGITS_OPERATION, (logits_NV,), *rows, dtype))
    given = given_rows(vectors, cu_seqlens, count, objective, wide(dtype), logits_NV.device)
    plan, live = plan_rows(given, targets_N, temperature, vocabulary, dtype, softcap=softcap)
    if dtype != torch.float16 and torch.is_grad_enabled() and logits_NV.requires_grad:
        loss, logprobs_L, entropy_L, metrics = _LogitsGrpo.apply(logits_NV, plan, live, objective, inplace)
    else:
        logprobs_L, entropy_L = TokenLogprob.apply(logits_NV, plan, inplace)
        loss, metrics = RowLoss.apply(logprobs_L, entropy_L, live, objective)
    return Loss(loss, plan.put(logprobs_L.detach(), count), plan.put(entropy_L.detach(), count), metrics)


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
    if torch.compiler.is_compiling() and objective.rule is None and shard is None and master_VH is None:
        rows = (targets_N, vectors, cu_seqlens, temperature, objective, softcap)
        leaves = (hidden_NH, weight_VH, bias_V)
        return Loss(*graph.call(LINEAR_OPERATION, leaves, *rows, dtype, chunk_rows, buffer_bytes))
    count, vocabulary = len(hidden_NH), shard.total if shard else len(weight_VH)
    given = given_rows(vectors, cu_seqlens, count, objective, wide(dtype), hidden_NH.device)
    plan, live = plan_rows(given, targets_N, temperature, vocabulary, dtype, chunk_rows, shard, softcap)
    plan = replace(plan, buffer_bytes=buffer_bytes, master_VH=master_VH)
    differentiate = torch.is_grad_enabled()
    loss, logprobs_L, entropy_L, metrics = _LinearGrpo.apply(
        hidden_NH, weight_VH, bias_V, plan, live, objective, differentiate
    )
    return Loss(loss, plan.put(logprobs_L, count), plan.put(entropy_L, count), metrics)


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
    vectors = (advantages_N, loss_weights_N, old_logprobs_N, sampler_logprobs_N, ref_logprobs_N)
    scores = (logprobs_N.detach(), entropies_N.detach())
    given = given_rows(vectors, cu_seqlens, count, objective, dtype, logprobs_N.device, scores)
    live = find_live(given)
    if live.index_L is None:
        loss, metrics = RowLoss.apply(logprobs_N, entropies_N.to(dtype), live.rows, objective)
        return Loss(loss, *scores, metrics)
    logprobs_L, entropies_L = logprobs_N[live.index_L], entropies_N[live.index_L].to(dtype)
    loss, metrics = RowLoss.apply(logprobs_L, entropies_L, live.rows, objective)
    assert live.rest_D is not None
    shown = [scores_N.index_fill(0, live.rest_D, 0) for scores_N in scores]
    return Loss(loss, shown[0], shown[1], metrics)


class RowLoss(torch.autograd.Function):
    """Compute the loss of log-probs and entropies, and its metrics; the slopes are kept for the backward."""

    @staticmethod
    def forward(
        ctx: Any, logprobs_L: Tensor, entropy_L: Tensor, live: LossRows, objective: Objective
    ) -> tuple[Tensor, dict[str, Tensor]]:
        needed = any(ctx.needs_input_grad)
        loss, metrics, slopes = loss_and_metrics(logprobs_L, entropy_L, live, objective, with_slopes=needed)
        ctx.save_for_backward(*slopes)
        return loss, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: None) -> tuple[Tensor | None, ...]:
        by_logprob_L, by_entropy_L = ctx.saved_tensors
        return upstream * by_logprob_L, None if by_entropy_L is None else upstream * by_entropy_L, None, None


class _LogitsGrpo(torch.autograd.Function):
    """Compute the loss of logits, log-probs, entropies and metrics and, in the forward, the logits' gradient.

    inplace: the gradient is written over the logits. Otherwise these are kept for a second backward.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, plan: HeadPlan, live: LossRows, objective: Objective, inplace: bool
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        ctx.set_materialize_grads(False)
        values_NV = logits_NV.detach()
        ctx.plan, ctx.coefficients = plan, _coefficients(partial(token_pass, values_NV, plan), live, objective)
        ctx.gradient_NV = values_NV if inplace else torch.empty_like(values_NV)
        logprobs_L, entropy_L = token_pass(values_NV, plan, ctx.coefficients, ctx.gradient_NV)
        if inplace:
            increment_version(logits_NV)  # autograd does not see a kernel's writes
        ctx.save_for_backward(None if inplace else logits_NV)
        ctx.mark_non_differentiable(logprobs_L, entropy_L)
        loss, metrics, _ = loss_and_metrics(logprobs_L, entropy_L, live, objective)
        return loss, logprobs_L, entropy_L, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 5
        gradient_NV, ctx.gradient_NV = ctx.gradient_NV, None
        if gradient_NV is None:
            (logits_NV,) = ctx.saved_tensors
            if logits_NV is None:
                raise RuntimeError(OVERWRITTEN)
            gradient_NV = torch.empty_like(logits_NV)
            token_pass(logits_NV.detach(), ctx.plan, ctx.coefficients, gradient_NV)
        return scale_in_place(gradient_NV, upstream, gradient_NV.dtype), None, None, None, None


class _LinearGrpo(torch.autograd.Function):
    """Compute the fused loss, log-probs, entropies and metrics and, in the forward, its gradients."""

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
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        ctx.set_materialize_grads(False)
        needs = tuple(differentiate and needed for needed in ctx.needs_input_grad[:3])
        out = _sweep_all((hidden_NH, weight_VH, bias_V), plan, live, objective, needs)
        ctx.plan, ctx.count, ctx.gradients = plan, len(hidden_NH), out[2:]
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden_NH, weight_VH, bias_V)]
        ctx.mark_non_differentiable(out.logprobs_L, out.entropy_L)
        loss, metrics, _ = loss_and_metrics(out.logprobs_L, out.entropy_L, live, objective)
        return loss, out.logprobs_L, out.entropy_L, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 7
        if ctx.gradients is None:
            raise RuntimeError(SPENT)
        gradients, ctx.gradients = ctx.gradients, None
        if ctx.plan.master_VH is not None:  # on a GPU the host does not wait for the answer
            torch._assert_async(upstream == 1, ADDED)
        pairs = zip(gradients, ctx.dtypes, strict=True)
        dhidden_LH, dweight_VH, dbias_V = (None if t is None else scale_in_place(t, upstream, d) for t, d in pairs)
        dhidden_NH = None if dhidden_LH is None else ctx.plan.put(dhidden_LH, ctx.count)
        return dhidden_NH, dweight_VH, dbias_V, None, None, None, None


def _sweep_all(
    head: tuple[Tensor, Tensor, Tensor | None],
    plan: HeadPlan,
    live: LossRows,
    objective: Objective,
    needs: tuple[bool, ...],
) -> Sweep:
    """Compute the rows' log-probs and entropies, and the gradients that are needed."""
    coefficients = _coefficients(partial(sweep, *head, plan), live, objective) if any(needs) else None
    return sweep(*head, plan, coefficients, needs)


def _coefficients(first: Callable[[], Sequence[Any]], live: LossRows, objective: Objective) -> Coefficients:
    """Return the slopes of the rows; a rule and shared ratios may need `first`, a pass for log-probs and entropies."""
    if objective.rule is not None:
        logprobs_L, entropy_L, *_ = first()
        return Coefficients(*rule_slopes(logprobs_L, entropy_L, live, objective))
    policy_slope_L: Tensor | None = None
    if objective.importance != "token":
        if live.old_L is None and not uses_sampler_weight(live, objective):
            logprobs_L = torch.zeros_like(live.weights_L)  # on-policy the ratio is 1 for any log-probs
        else:
            logprobs_L = first()[0]
        policy_slope_L = policy_terms(logprobs_L, live, objective).slope_L
    return Coefficients(policy_slope_L, rows=live, objective=objective)


def _given_to(rows: dict[str, Any], first_NX: Tensor, dtype: torch.dtype) -> tuple[GivenRows, float | Tensor]:
    """Return the rows and the temperature that an operation of a graph was given."""
    vectors = tuple(rows[name] for name in ("advantages", "weights", "old", "sampler", "ref"))
    objective = graph.unpacked(rows["numbers"], rows["importance"], rows["kl"])
    given = given_rows(vectors, rows["bounds"], len(first_NX), objective, wide(dtype), first_NX.device)
    return given, rows["temperature"] if rows["temperatures"] is None else rows["temperatures"]


def _run_linear(leaves: Any, rows: dict[str, Any], extra: Any) -> tuple[Any, ...]:
    """Compute `linear_grpo_loss` as an operation of a graph."""
    (hidden_NH, weight_VH, _), (dtype, chunk_rows, buffer_bytes) = leaves, extra
    given, temperature = _given_to(rows, hidden_NH, dtype)
    plan, live = plan_rows(
        given, rows["targets"], temperature, len(weight_VH), dtype, chunk_rows, softcap=rows["softcap"]
    )
    plan, count = replace(plan, buffer_bytes=buffer_bytes), len(hidden_NH)
    out = _sweep_all(leaves, plan, live, given.objective, tuple(rows["needs"]))
    loss, metrics, _ = loss_and_metrics(out.logprobs_L, out.entropy_L, live, given.objective)
    dhidden_NH = None if out.dhidden_LH is None else plan.put(out.dhidden_LH, count)
    shown = (plan.put(out.logprobs_L, count), plan.put(out.entropy_L, count))
    return loss, *shown, metrics, (dhidden_NH, out.dweight_VH, out.dbias_V)


def _run_logits(leaves: Any, rows: dict[str, Any], extra: Any) -> tuple[Any, ...]:
    """Compute `grpo_loss` as an operation of a graph."""
    (logits_NV,), (dtype,), count = leaves, extra, len(leaves[0])
    given, temperature = _given_to(rows, logits_NV, dtype)
    plan, live = plan_rows(given, rows["targets"], temperature, logits_NV.shape[1], dtype, softcap=rows["softcap"])
    coefficients, gradient_NV = None, None
    if rows["needs"][0]:
        coefficients = _coefficients(partial(token_pass, logits_NV, plan), live, given.objective)
        gradient_NV = torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
    logprobs_L, entropy_L = token_pass(logits_NV, plan, coefficients, gradient_NV)
    loss, metrics, _ = loss_and_metrics(logprobs_L, entropy_L, live, given.objective)
    return loss, plan.put(logprobs_L, count), plan.put(entropy_L, count), metrics, (gradient_NV,)


LINEAR_OPERATION = graph.operation(
    "linear_grpo_loss",
    "Tensor hidden, Tensor weight, Tensor? bias",
    "ScalarType dtype, int? chunk_rows, int? buffer_bytes",
    _run_linear,
)
LOGITS_OPERATION = graph.operation("grpo_loss", "Tensor logits", "ScalarType dtype", _run_logits)
