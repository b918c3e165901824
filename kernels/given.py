"""The M-GRPO loss of log-probs that exist already: for trainers whose models hand over log-probs, never logits.

Rows that add nothing are left out, as in `loss.py`; their log-probs get a gradient of 0.

Legend: N rows, L live rows.
"""

import torch
from torch import Tensor

from . import checks
from .loss import Loss, RowLoss, checked_rows
from .metrics import row_metrics
from .objective import Objective
from .terms import live_rows


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
    """`linear_grpo_loss` of log-probs (N,) float32 or float64, in nats; differentiable in them and in the entropies.

    entropies_N (N,): needed if entropy_coef is not 0; a rule sees zeros in their place.
    ValueError for a wrong shape or dtype, NaN in a row that counts (naming it), or a missing input.
    """
    dtype, count = logprobs_N.dtype, logprobs_N.numel()
    checks.require(dtype in (torch.float32, torch.float64), "logprobs_N", dtype, "torch.float32 or torch.float64")
    needed = objective.entropy_coef != 0 and entropies_N is None
    checks.require(not needed, "entropies_N", None, "a tensor, as entropy_coef is not 0")
    entropies_N = torch.zeros_like(logprobs_N) if entropies_N is None else entropies_N
    values = checks.ValueChecks(logprobs_N.device)
    vectors = (advantages_N, loss_weights_N, old_logprobs_N, sampler_logprobs_N, ref_logprobs_N)
    rows = checked_rows(values, vectors, cu_seqlens, count, objective, dtype)
    for name, values_N in (("logprobs_N", logprobs_N), ("entropies_N", entropies_N)):
        checks.check_row_vector(name, values_N, count)
        values.not_nan(name, values_N, rows.weights_L != 0)
    live_N = live_rows(rows, objective)
    (live_count,) = values.settle(live_N.sum())
    index_L = torch.argsort(~live_N, stable=True)[:live_count]  # nonzero() would wait for the device once more
    live = rows.select(index_L)
    logprobs_L, entropies_L = logprobs_N[index_L], entropies_N[index_L].to(dtype)
    loss = RowLoss.apply(logprobs_L, entropies_L, live, objective)
    metrics = row_metrics(logprobs_L.detach(), entropies_L.detach(), live, objective)
    put_N, put_entropies_N = (torch.where(live_N, values_N.detach(), 0) for values_N in (logprobs_N, entropies_N))
    return Loss(loss, put_N, put_entropies_N, metrics)
