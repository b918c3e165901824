"""Check a loss's inputs and plan which rows reach the LM head.

Legend: N rows, L live rows, D rows left out, S sequences.
"""

import torch
from torch import Tensor

from . import checks
from .linear_head import HeadPlan
from .objective import Objective
from .terms import LossRows, live_rows
from .vocab_parallel import Shard

ROW_VECTORS = ("advantages_N", "loss_weights_N", "old_logprobs_N", "sampler_logprobs_N", "ref_logprobs_N")
OPTIONAL_VECTORS = ROW_VECTORS[2:]


def checked_rows(
    values: checks.ValueChecks,
    vectors_N: tuple[Tensor | None, ...],
    cu_seqlens: Tensor | None,
    count: int,
    objective: Objective,
    dtype: torch.dtype,
) -> LossRows:
    """Return all N rows in the given dtype.  Shapes are checked here; checks of values are added to `values`.

    vectors_N: the tensors named in ROW_VECTORS, in that order; the last three may be None.
    """
    given = {name: values_N for name, values_N in zip(ROW_VECTORS, vectors_N, strict=True) if values_N is not None}
    checks.check_needed(objective, given.get("ref_logprobs_N"), cu_seqlens)
    for name, values_N in given.items():
        checks.check_row_vector(name, values_N, count)
    values.finite("loss_weights_N", given["loss_weights_N"])
    counted_N = given["loss_weights_N"] != 0
    values.finite("advantages_N", given["advantages_N"], counted_N)
    for name in OPTIONAL_VECTORS:
        if name in given:
            values.not_nan(name, given[name], counted_N)
    old_N, sampler_N, ref_N = (given[name].detach().to(dtype) if name in given else None for name in OPTIONAL_VECTORS)
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
    """Return each row's sequence and their number; arbitrary but in range if cu_seqlens is invalid (checked later)."""
    if cu_seqlens is None:
        return None, 0
    values.offsets("cu_seqlens", cu_seqlens, count)
    sequences = max(1, len(cu_seqlens) - 1)
    ends_S = cu_seqlens[1:].to(torch.int64).contiguous()
    row_N = torch.arange(count, device=cu_seqlens.device)
    return torch.searchsorted(ends_S, row_N, right=True).clamp_(max=sequences - 1), sequences


def plan_rows(
    values: checks.ValueChecks,
    targets_N: Tensor,
    temperature: float | Tensor,
    rows: LossRows,
    objective: Objective,
    vocabulary: int,
    dtype: torch.dtype,
    chunk_rows: int | None = None,
    shard: Shard | None = None,
    softcap: float | None = None,
) -> tuple[HeadPlan, LossRows]:
    """Check targets and temperature, settle all checks, and leave out the rows that add nothing to the gradient.

    Return the plan of the head's sweep and the live rows.
    """
    count, counted_N = len(rows.weights_L), rows.weights_L != 0
    values.targets(targets_N, count, vocabulary, counted_N)
    temperature = values.temperature(temperature, count, counted_N)
    live_N = live_rows(rows, objective)
    (live_count,) = values.settle(live_N.sum())
    local_N = targets_N - shard.first if shard else targets_N
    if live_count == count:
        return HeadPlan(local_N, None, temperature, dtype, chunk_rows, shard, softcap=softcap), rows
    # The host knows the number of live rows, so unlike nonzero() this does not wait for the device again.
    index_L, rest_D = torch.argsort(~live_N, stable=True).tensor_split([live_count])
    if isinstance(temperature, Tensor):
        temperature = temperature[index_L]
    plan = HeadPlan(local_N[index_L], index_L, temperature, dtype, chunk_rows, shard, rest_D, softcap)
    return plan, rows.select(index_L)
