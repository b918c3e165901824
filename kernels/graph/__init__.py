"""The losses as single operations of a `torch.compile` graph, each with a fake form, which says what comes out of it.

A graph holds neither a read by the host nor a choice that depends on values, and a loss has both: it checks its inputs
and leaves rows out. As one operation it runs as it always does. The gradients are outputs of the operation, and the
graph scales them; nothing is overwritten, so that a second backward is allowed.

Legend: N rows, M metrics.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..objective import Objective

# What the losses have in common, after the tensors that are differentiated.
ROWS = (
    "Tensor targets, Tensor advantages, Tensor weights, Tensor? old, Tensor? sampler, Tensor? ref, Tensor? bounds, "
    "Tensor? temperatures, float temperature, float[] numbers, str importance, str kl, float? softcap, bool[] needs"
)
ALWAYS = ("rows", "clip_low", "clip_high", "ratio_sum", "ratio_max", "entropy_sum", "logprob_sum")
OFF = -1.0  # no setting that may be None is negative


def packed(objective: Objective) -> tuple[list[float], str, str]:
    """Return an objective without a rule as arguments of an operation."""
    optional = [OFF if x is None else float(x) for x in (objective.dual_clip, objective.sampler_cap)]
    always = (objective.clip_low, objective.clip_high, objective.kl_coef, objective.entropy_coef)
    return [*(float(x) for x in always), *optional], objective.importance, objective.kl


def unpacked(numbers: Sequence[float], importance: Any, kl: Any) -> Objective:
    """Return the objective that `packed` was given."""
    low, high, kl_coef, entropy_coef, *optional = numbers
    dual, cap = (None if x == OFF else x for x in optional)
    return Objective(low, high, dual, importance, kl_coef, kl, entropy_coef, cap)


def metric_names(objective: Objective, *, sampler: bool, ref: bool) -> list[str]:
    """Return the metrics that a loss reports, in its order; sampler, ref: whether it is given their log-probs."""
    names = [*ALWAYS, *(["kl_sum"] if ref else []), *(["gap_sum", "gap_max"] if sampler else [])]
    return [
        *names,
        *(["sampler_weight_sum", "sampler_capped"] if sampler and objective.sampler_cap is not None else []),
    ]


def operation(name: str, leaves: str, extra: str, body: Callable[..., tuple[Any, ...]]) -> Any:
    """Define an operation: loss, log-probs, entropies, metrics, and the gradient of each leaf (empty: not needed).

    leaves: the names of the tensors to differentiate, the first of them (N, …). extra: arguments after ROWS.
    body(leaves, rows, extra) computes it; rows: the arguments of ROWS by name.
    """
    count, of_rows = leaves.count(",") + 1, [part.split()[-1] for part in ROWS.split(", ")]

    def split(arguments: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any], Sequence[Any]]:
        end = count + len(of_rows)
        return arguments[:count], dict(zip(of_rows, arguments[count:end], strict=True)), arguments[end:]

    def run(*arguments: Any) -> tuple[Tensor, ...]:
        tensors, rows, more = split(arguments)
        loss, logprobs_N, entropy_N, metrics, gradients = body(tensors, rows, more)
        found = [tensors[0].new_empty(0) if gradient is None else gradient for gradient in gradients]
        return loss, logprobs_N, entropy_N, torch.stack(list(metrics.values())), *found

    def fake(*arguments: Any) -> tuple[Tensor, ...]:
        tensors, rows, (dtype, *_) = split(arguments)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        objective = unpacked(rows["numbers"], rows["importance"], rows["kl"])
        given = {name: rows[name] is not None for name in ("sampler", "ref")}
        shapes: list[Any] = [(), tensors[0].shape[:1], tensors[0].shape[:1], (len(metric_names(objective, **given)),)]
        gradients = [
            leaf.new_empty(leaf.shape, dtype=leaf.dtype if place == 0 else wide) if needed else tensors[0].new_empty(0)
            for place, (leaf, needed) in enumerate(zip(tensors, rows["needs"], strict=True))
        ]
        return *(tensors[0].new_empty(shape, dtype=wide) for shape in shapes), *gradients

    def keep(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
        tensors, rows, _ = split(inputs)
        ctx.save_for_backward(*output[4:])
        ctx.kept = [leaf.dtype if needed else None for leaf, needed in zip(tensors, rows["needs"], strict=True)]

    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        scale_1 = upstream.reshape(1)  # a 0-dim tensor would be rounded to the gradient's dtype first
        pairs = zip(ctx.saved_tensors, ctx.kept, strict=True)
        scaled = (None if dtype is None else (gradient * scale_1).to(dtype) for gradient, dtype in pairs)
        return *scaled, *(None for _ in of_rows), *(None for _ in extra.split(", "))

    schema = f"({leaves}, {ROWS}, {extra}) -> ({', '.join(['Tensor'] * (4 + count))})"
    made = torch.library.custom_op(f"mgrpo::{name}", run, mutates_args=(), schema=schema)
    made.register_fake(fake)
    made.register_autograd(backward, setup_context=keep)
    return made


def call(
    made: Any,
    leaves: tuple[Tensor | None, ...],
    targets_N: Tensor,
    vectors_N: tuple[Tensor | None, ...],
    cu_seqlens: Tensor | None,
    temperature: float | Tensor,
    objective: Objective,
    softcap: float | None,
    *extra: Any,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Put an operation into the graph that is being traced; return loss, log-probs, entropies and metrics."""
    of_rows = temperature if isinstance(temperature, Tensor) else None
    number = 1.0 if of_rows is not None else float(temperature)
    needs = [leaf is not None and torch.is_grad_enabled() and leaf.requires_grad for leaf in leaves]
    loss, logprobs_N, entropy_N, metrics_M, *_ = made(
        *leaves, targets_N, *vectors_N, cu_seqlens, of_rows, number, *packed(objective), softcap, needs, *extra
    )
    names = metric_names(objective, sampler=vectors_N[3] is not None, ref=vectors_N[4] is not None)
    metrics_M = metrics_M.detach()
    metrics = {name: metrics_M[place] for place, name in enumerate(names)}
    return loss, logprobs_N.detach(), entropy_N.detach(), metrics
