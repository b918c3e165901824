"""The M-GRPO loss of one micro-batch, from logits or, fused, from the LM head's input.

Departs from the standard method: rows that add nothing never reach the head, and the fused form makes the gradient in
the forward, chunk by chunk (three matmuls, no logits kept); its backward only scales. Shared ratios (`sequence`,
`trajectory`) and a caller's rule need every log-prob of a sequence first, hence one forward matmul more, unless old
log-probs and sampler weights are absent: on-policy the ratio is 1 and the slopes are known beforehand.

Legend: N rows, L live rows, H hidden, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from . import checks
from .inplace import scale_in_place
from .linear_head import HeadPlan, sweep, wide
from .logprob import TokenLogprob
from .metrics import row_metrics
from .objective import Objective
from .terms import Coefficients, LossRows, live_rows, policy_terms, rule_slopes, slopes, total_loss, uses_sampler_weight
from .vocab_parallel import Shard, check_sharded_head

SPENT = (
    "linear_grpo_loss: got a second backward, expected one: the gradient is formed in the forward, and the first "
    "backward has scaled and handed out the only copy. Ask for all gradients at once, or compute the loss again."
)


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
    inplace: bool = False,
) -> Loss:
    """`linear_grpo_loss` for logits (N, V) of any float dtype that exist already; differentiable in them.

    inplace: the backward writes the gradient over the logits, as in `token_logprob`.
    """
    checks.check_logits(logits_NV, inplace=inplace)
    values = checks.ValueChecks(logits_NV.device)
    vectors = (advantages_N, loss_weights_N, old_logprobs_N, sampler_logprobs_N, ref_logprobs_N)
    rows = checked_rows(values, vectors, cu_seqlens, len(logits_NV), objective, wide(logits_NV.dtype))
    plan = _plan(values, targets_N, temperature, rows, objective, logits_NV.shape[1], logits_NV.dtype)
    live = rows if plan.index_L is None else rows.select(plan.index_L)
    logprobs_L, entropy_L = TokenLogprob.apply(logits_NV, plan, inplace)
    loss = RowLoss.apply(logprobs_L, entropy_L, live, objective)
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

    Source: M-GRPO (arXiv 2511.13288), Eqs. 8-17; settings in `Objective`; its rule, if any, says l_i instead. Row i
    predicts targets_N[i]: the caller has shifted. Every denominator, multiplicity and length normaliser is inside
    loss_weights_N; weight 0: the row does not count, and nothing else of it is read. Log-probs, in nats, are those of
    (hidden @ weight^T + bias) / temperature.

    hidden (N, H) and weight (V, H) bfloat16, float32 or float64, of one dtype unless under autocast; bias (V,);
    targets (N,) int64; advantages, loss weights, the log-probs, all constants, (N,) float; temperature a number or
    (N,).
    old_logprobs_N None: on-policy. cu_seqlens (S + 1,) integer: bounds of the sequences, for shared ratios.
    chunk_rows: rows of logits in memory at a time; None: 64 MiB of them.
    group: the ranks that share the vocabulary. weight and bias then are this rank's consecutive rows, as many as it
    likes or none, in rank order; all else is the same on every rank, targets in [0, sum of V) too. So are the results
    and hidden's gradient, which is summed over the ranks; weight and bias get that of their own rows.

    Loss and log-probs are float32, or float64 for float64 inputs. Differentiable in hidden, weight and bias, by one
    backward: their gradients are formed in the forward, and the backward scales and rounds them where they lie. A
    bfloat16 weight's gradient therefore is the front half of a float32 one's storage, which lives as long as it does.
    Raises ValueError for a wrong shape or dtype, a target outside [0, V), NaN (naming the row), or a missing input;
    RuntimeError in a second backward.
    """
    dtype, shard = check_sharded_head(hidden_NH, weight_VH, bias_V, chunk_rows, group)
    vectors = (advantages_N, loss_weights_N, old_logprobs_N, sampler_logprobs_N, ref_logprobs_N)
    values = checks.ValueChecks(hidden_NH.device)
    rows = checked_rows(values, vectors, cu_seqlens, len(hidden_NH), objective, wide(dtype))
    vocabulary = shard.total if shard else len(weight_VH)
    plan = _plan(values, targets_N, temperature, rows, objective, vocabulary, dtype, chunk_rows, shard)
    live = rows if plan.index_L is None else rows.select(plan.index_L)
    differentiate = torch.is_grad_enabled()
    loss, logprobs_L, entropy_L = _LinearGrpo.apply(hidden_NH, weight_VH, bias_V, plan, live, objective, differentiate)
    return _result(loss, logprobs_L, entropy_L, plan, live, objective, len(hidden_NH))


def checked_rows(
    values: checks.ValueChecks,
    vectors_N: tuple[Tensor | None, ...],
    cu_seqlens: Tensor | None,
    count: int,
    objective: Objective,
    dtype: torch.dtype,
) -> LossRows:
    """All N rows, their values yet to be settled."""
    names = ("advantages_N", "loss_weights_N", "old_logprobs_N", "sampler_logprobs_N", "ref_logprobs_N")
    given = {name: values_N for name, values_N in zip(names, vectors_N, strict=True) if values_N is not None}
    checks.check_needed(objective, given.get("ref_logprobs_N"), cu_seqlens)
    for name, values_N in given.items():
        checks.check_row_vector(name, values_N, count)
    values.finite("loss_weights_N", given["loss_weights_N"])
    counted_N = given["loss_weights_N"] != 0
    values.finite("advantages_N", given["advantages_N"], counted_N)
    for name in names[2:]:
        if name in given:
            values.not_nan(name, given[name], counted_N)
    old_N, sampler_N, ref_N = (given[name].detach().to(dtype) if name in given else None for name in names[2:])
    segment_N, sequences = _segments(values, cu_seqlens, count)
    return LossRows(
        given["advantages_N"].detach().to(dtype),
        given["loss_weights_N"].detach().to(dtype),
        old_N,
        sampler_N,
        ref_N,
        segment_N,
        sequences,
    )


def _segments(values: checks.ValueChecks, cu_seqlens: Tensor | None, count: int) -> tuple[Tensor | None, int]:
    """Sequence of each row, and how many sequences there are: some such, if the bounds turn out to be bad."""
    if cu_seqlens is None:
        return None, 0
    values.offsets("cu_seqlens", cu_seqlens, count)
    sequences = max(1, len(cu_seqlens) - 1)
    ends_S = cu_seqlens[1:].to(torch.int64).contiguous()
    row_N = torch.arange(count, device=cu_seqlens.device)
    return torch.searchsorted(ends_S, row_N, right=True).clamp_(max=sequences - 1), sequences


def _plan(
    values: checks.ValueChecks,
    targets_N: Tensor,
    temperature: float | Tensor,
    rows: LossRows,
    objective: Objective,
    vocabulary: int,
    dtype: torch.dtype,
    chunk_rows: int | None = None,
    shard: Shard | None = None,
) -> HeadPlan:
    """Check targets and temperature, settle all checks, and leave out the rows that add nothing."""
    count = len(rows.weights_L)
    values.targets(targets_N, count, vocabulary, rows.weights_L != 0)
    temperature = values.temperature(temperature, count, rows.weights_L != 0)
    live_N = live_rows(rows, objective)
    (live,) = values.settle(live_N.sum())
    local_N = targets_N - shard.first if shard else targets_N
    if live == count:
        return HeadPlan(local_N, None, temperature, dtype, chunk_rows, shard)
    # The host knows how many rows are live, so need not wait for the device again, as it would in nonzero().
    index_L, rest_D = torch.argsort(~live_N, stable=True).tensor_split([live])
    if isinstance(temperature, Tensor):
        temperature = temperature[index_L]
    return HeadPlan(local_N[index_L], index_L, temperature, dtype, chunk_rows, shard, rest_D)


def _result(
    loss: Tensor,
    logprobs_L: Tensor,
    entropy_L: Tensor,
    plan: HeadPlan,
    live: LossRows,
    objective: Objective,
    count: int,
) -> Loss:
    metrics = row_metrics(logprobs_L, entropy_L, live, objective)
    return Loss(loss, plan.put(logprobs_L, count), plan.put(entropy_L, count), metrics)


class RowLoss(torch.autograd.Function):
    """The loss from log-probs and entropies."""

    @staticmethod
    def forward(ctx: Any, logprobs_L: Tensor, entropy_L: Tensor, live: LossRows, objective: Objective) -> Tensor:
        if objective.rule is not None:
            ctx.save_for_backward(*rule_slopes(logprobs_L, entropy_L, live, objective))
        else:
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
        plan: HeadPlan,
        live: LossRows,
        objective: Objective,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs = tuple(differentiate and needed for needed in ctx.needs_input_grad[:3])
        coefficients = None
        if any(needs):
            coefficients = _coefficients(hidden_NH, weight_VH, bias_V, plan, live, objective)
        out = sweep(hidden_NH, weight_VH, bias_V, plan, coefficients, needs)
        ctx.plan, ctx.count, ctx.dtypes = (
            plan,
            len(hidden_NH),
            [None if t is None else t.dtype for t in (hidden_NH, weight_VH, bias_V)],
        )
        ctx.gradients = out[2:]
        ctx.mark_non_differentiable(out.logprobs_L, out.entropy_L)
        loss = total_loss(out.logprobs_L, out.entropy_L, live, objective)
        return loss, out.logprobs_L, out.entropy_L

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(SPENT)
        gradients, ctx.gradients = ctx.gradients, None
        pairs = zip(gradients, ctx.dtypes, strict=True)
        dhidden_LH, dweight_VH, dbias_V = (None if t is None else scale_in_place(t, upstream, d) for t, d in pairs)
        dhidden_NH = None if dhidden_LH is None else ctx.plan.put(dhidden_LH, ctx.count)
        return dhidden_NH, dweight_VH, dbias_V, None, None, None, None


def _coefficients(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, plan: HeadPlan, live: LossRows, objective: Objective
) -> Coefficients:
    """Slopes of the rows: a token's from its own log-prob, shared ones or a rule's from a sweep before."""
    if objective.rule is not None:
        found = sweep(hidden_NH, weight_VH, bias_V, plan)
        return Coefficients(*rule_slopes(found.logprobs_L, found.entropy_L, live, objective))
    policy_slope_L: Tensor | None = None
    if objective.importance != "token":
        if live.old_L is None and not uses_sampler_weight(live, objective):
            logprobs_L = torch.zeros_like(live.weights_L)  # on-policy: any will do, the ratio is 1
        else:
            logprobs_L = sweep(hidden_NH, weight_VH, bias_V, plan).logprobs_L
        policy_slope_L = policy_terms(logprobs_L, live, objective).slope_L
    return Coefficients(policy_slope_L, rows=live, objective=objective)
