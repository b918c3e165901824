"""Report a loss's metrics as sums over live rows, so that those of micro-batches and ranks simply add up.

Every entry is a 0-dim tensor. Entries are added, except those that end in `_max`, of which the maximum is taken:
* `rows`: live rows. Rows left out before the head (see `terms.py`) are in no entry;
* `clip_low`, `clip_high`: rows held by the lower (A < 0) or upper (A > 0) clip;
* `sampler_weight_sum`, `sampler_capped`: the truncated sampler weights, and how many of them reached the cap;
* `ratio_sum`, `ratio_max`, `entropy_sum`, `logprob_sum` (nats);
* `kl_sum`, if reference log-probs are given; `gap_sum` and `gap_max` of |old - sampler|, if the sampler's are given.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import takes_kernels, triton_module
from .objective import Objective
from .terms import LossRows, kl_terms, policy_terms, rule_slopes, shared_log_ratio, slopes, total_loss

Slopes = tuple[Tensor | None, Tensor | None]


def loss_and_metrics(
    logprobs_L: Tensor, entropy_L: Tensor, rows: LossRows, objective: Objective, *, with_slopes: bool = False
) -> tuple[Tensor, dict[str, Tensor], Slopes]:
    """Return the loss of one micro-batch, 0-dim, its metrics and, if wanted, its `terms.slopes` (otherwise None).

    On a GPU this is one launch if each token has a ratio of its own. Shared ratios are plain PyTorch, a rule too.
    """
    launched = len(logprobs_L) > 0 and objective.rule is None and takes_kernels(logprobs_L, logprobs_L.dtype)
    return (_launch if launched else _plain)(logprobs_L, entropy_L, rows, objective, with_slopes)


def _launch(
    logprobs_L: Tensor, entropy_L: Tensor, rows: LossRows, objective: Objective, with_slopes: bool
) -> tuple[Tensor, dict[str, Tensor], Slopes]:
    """Compute `loss_and_metrics` on a GPU."""
    kernels = triton_module("vectors")
    if objective.importance == "token":
        found: tuple[Tensor, dict[str, Tensor], Slopes] = kernels.add_up(
            logprobs_L, entropy_L, None, rows, objective, with_slopes=with_slopes
        )
        return found
    log_ratio_L = shared_log_ratio(logprobs_L, rows, objective)
    loss, metrics, none = kernels.add_up(logprobs_L, entropy_L, log_ratio_L, rows, objective)
    return loss, metrics, slopes(logprobs_L, rows, objective) if with_slopes else none


def _plain(
    logprobs_L: Tensor, entropy_L: Tensor, rows: LossRows, objective: Objective, with_slopes: bool
) -> tuple[Tensor, dict[str, Tensor], Slopes]:
    """Compute `loss_and_metrics` in plain PyTorch."""
    terms = policy_terms(logprobs_L, rows, objective)
    found: Slopes = (None, None)
    if with_slopes and objective.rule is not None:
        found = rule_slopes(logprobs_L, entropy_L, rows, objective)
    elif with_slopes:
        found = slopes(logprobs_L, rows, objective, terms.slope_L)
    loss = total_loss(logprobs_L, entropy_L, rows, objective, terms)
    return loss, row_metrics(logprobs_L, entropy_L, terms.log_ratio_L, rows, objective), found


@torch.no_grad()
def row_metrics(
    logprobs_L: Tensor, entropy_L: Tensor, log_ratio_L: Tensor, rows: LossRows, objective: Objective
) -> dict[str, Tensor]:
    """Return the metrics of one micro-batch. log_ratio_L: that of `terms.policy_terms`."""
    ratio_L = log_ratio_L.exp()
    metrics = {
        "rows": ratio_L.new_full((), len(ratio_L)),
        "clip_low": ((log_ratio_L < objective.log_low) & (rows.advantages_L < 0)).sum(dtype=ratio_L.dtype),
        "clip_high": ((log_ratio_L > objective.log_high) & (rows.advantages_L > 0)).sum(dtype=ratio_L.dtype),
        "ratio_sum": ratio_L.sum(),
        "ratio_max": _max(ratio_L),
        "entropy_sum": entropy_L.sum(),
        "logprob_sum": logprobs_L.sum(),
    }
    if rows.ref_L is not None:
        metrics["kl_sum"] = kl_terms(logprobs_L, rows, objective)[0].sum()
    if rows.sampler_L is not None:
        gap_L = (logprobs_L if rows.old_L is None else rows.old_L) - rows.sampler_L
        metrics |= {"gap_sum": gap_L.abs().sum(), "gap_max": _max(gap_L.abs())}
        if (cap := objective.sampler_cap) is not None:
            weight_L = gap_L.exp().clamp(max=cap)
            metrics |= {
                "sampler_weight_sum": weight_L.sum(),
                "sampler_capped": (weight_L == cap).sum(dtype=weight_L.dtype),
            }
    return metrics


def _max(values_L: Tensor) -> Tensor:
    return values_L.max() if len(values_L) else values_L.new_zeros(())


def merge_metrics(parts: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Merge the metrics of several micro-batches into means and maxima over their rows.

    `rows` is the total, `*_max` the maximum; `clip_low` and `clip_high` become fractions of the rows, and `x_sum`
    becomes `x_mean`. An entry that some parts lack is averaged over the rows of the others; a mean over no rows is 0.
    """
    merged: dict[str, float] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        reporting = [part for part in parts if name in part]
        values = [float(part[name]) for part in reporting]
        if name.endswith("_max"):
            merged[name] = max(values)
        elif name == "rows":
            merged[name] = sum(values)
        else:
            rows = sum(float(part["rows"]) for part in reporting)
            merged[name.replace("_sum", "_mean")] = sum(values) / rows if rows else 0.0
    return merged
