"""Check a loss's inputs and plan which rows reach the LM head.

Legend: N rows, L live rows, D rows left out, S sequences.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .dispatch import takes_kernels, triton_module
from .linear_head import HeadPlan
from .objective import Objective
from .terms import LossRows, live_rows
from .vocab_parallel import Shard

ROW_VECTORS = ("advantages_N", "loss_weights_N", "old_logprobs_N", "sampler_logprobs_N", "ref_logprobs_N")
OPTIONAL_VECTORS = ROW_VECTORS[2:]
SCORES = ("logprobs_N", "entropies_N")


@dataclass(frozen=True)
class GivenRows:
    """Hold a loss's inputs of all rows as the caller gave them; `dtype` is that of the loss.

    vectors_N: the tensors named in ROW_VECTORS, in that order; the last three may be None. scores_N: log-probs and
    entropies, where these are inputs too. Only shapes and dtypes have been checked.
    """

    vectors_N: tuple[Tensor | None, ...]
    cu_seqlens: Tensor | None
    count: int
    objective: Objective
    dtype: torch.dtype
    device: torch.device
    scores_N: tuple[Tensor, Tensor] | None = None

    @property
    def sequences(self) -> int:
        return 0 if self.cu_seqlens is None else max(1, len(self.cu_seqlens) - 1)

    def named(self) -> dict[str, Tensor]:
        """Return the tensors by name, without those that are None."""
        pairs = zip(ROW_VECTORS, self.vectors_N, strict=True)
        return {name: values_N for name, values_N in pairs if values_N is not None}

    def rows(self, segment_N: Tensor | None) -> LossRows:
        """Return all rows in the loss's dtype."""
        wide = (None if values_N is None else values_N.detach().to(self.dtype) for values_N in self.vectors_N)
        return LossRows(*wide, segment_N, self.sequences)  # type: ignore[arg-type, call-arg]


class LiveRows(NamedTuple):
    """Hold the rows that can add to the gradient, the numbers of these and of the rest; index_L None: all rows.

    targets_L and temperature are those of these rows: (L,), or a number, or None where they were not given.
    """

    rows: LossRows
    index_L: Tensor | None
    rest_D: Tensor | None
    targets_L: Tensor | None
    temperature: float | Tensor


def given_rows(
    vectors_N: tuple[Tensor | None, ...],
    cu_seqlens: Tensor | None,
    count: int,
    objective: Objective,
    dtype: torch.dtype,
    device: torch.device,
    scores_N: tuple[Tensor, Tensor] | None = None,
) -> GivenRows:
    """Check shapes, dtypes and devices of a loss's inputs."""
    given = GivenRows(vectors_N, cu_seqlens, count, objective, dtype, device, scores_N)
    checks.check_needed(objective, vectors_N[-1], cu_seqlens)
    for name, values_N in (given.named() | dict(zip(SCORES, scores_N or (), strict=False))).items():
        checks.check_row_vector(name, values_N, count)
        checks.require_device(name, values_N, device)
    if cu_seqlens is not None:
        checks.check_offsets("cu_seqlens", cu_seqlens)
        checks.require_device("cu_seqlens", cu_seqlens, device)
    return given


def find_live(
    given: GivenRows, targets_N: Tensor | None = None, temperature: float | Tensor = 1.0, vocabulary: int = 0
) -> LiveRows:
    """Check all values, and leave out the rows that add nothing to the gradient; the host waits for the device once."""
    if targets_N is not None:
        checks.check_targets(targets_N, given.count)
        checks.require_device("targets_N", targets_N, given.device)
    temperature = checks.check_temperature(temperature, given.count)
    if isinstance(temperature, Tensor):
        checks.require_device("temperature", temperature, given.device)
    weights_N = given.vectors_N[1]
    assert weights_N is not None
    some = given.cu_seqlens is None or len(given.cu_seqlens) > 1
    if some and given.count and takes_kernels(weights_N, given.dtype):
        live = _launch_live(given, targets_N, temperature, vocabulary)
        if live is not None:
            return live
        # Otherwise a value is bad, and the checks below name it.
    return _find_live(given, targets_N, temperature, vocabulary)


def _launch_live(
    given: GivenRows, targets_N: Tensor | None, temperature: float | Tensor, vocabulary: int
) -> LiveRows | None:
    """Compute `find_live` in one launch, or two if rows are left out; None if a value is bad."""
    kernels, objective = triton_module("vectors"), given.objective
    temperature_N = temperature if isinstance(temperature, Tensor) else None
    shared = objective.importance != "token"
    good, live, live_N, segment_N = kernels.check_rows(
        targets_N if targets_N is not None else given.vectors_N[1],
        given.count,
        targets_N,
        temperature_N,
        vocabulary,
        (*given.vectors_N, *(given.scores_N or (None, None))),
        given.cu_seqlens,
        every=objective.needs_every_row,
        shared=shared,
        segments=given.cu_seqlens is not None and (shared or objective.rule is not None),
    )
    if not good:
        return None
    rows = given.rows(segment_N)
    if live == given.count:
        return LiveRows(rows, None, None, targets_N, temperature)
    index_L, rest_D, targets_L, temperature_L, rows = kernels.pick_rows(live_N, live, targets_N, temperature_N, rows)
    return LiveRows(rows, index_L, rest_D, targets_L, temperature if temperature_L is None else temperature_L)


def _find_live(given: GivenRows, targets_N: Tensor | None, temperature: float | Tensor, vocabulary: int) -> LiveRows:
    """Compute `find_live` in plain PyTorch."""
    values = checks.ValueChecks(given.device)
    rows = _checked_rows(values, given)
    counted_N = rows.weights_L != 0
    if targets_N is not None:
        values.targets(targets_N, given.count, vocabulary, counted_N)
    temperature = values.temperature(temperature, given.count, counted_N)
    for name, values_N in zip(SCORES, given.scores_N or (), strict=False):
        values.not_nan(name, values_N, counted_N)
    live_N = live_rows(rows, given.objective)
    (live,) = values.settle(live_N.sum())
    if live == given.count:
        return LiveRows(rows, None, None, targets_N, temperature)
    # The host knows the number of live rows, so unlike nonzero() this does not wait for the device again.
    index_L, rest_D = torch.argsort(~live_N, stable=True).tensor_split([live])
    temperature = temperature[index_L] if isinstance(temperature, Tensor) else temperature
    targets_L = None if targets_N is None else targets_N[index_L]
    return LiveRows(rows.select(index_L), index_L, rest_D, targets_L, temperature)


def _checked_rows(values: checks.ValueChecks, given: GivenRows) -> LossRows:
    """Return all rows; checks of their values, as the loss's dtype holds them, are added to `values`."""
    rows = given.rows(_segments(values, given))
    counted_N = rows.weights_L != 0
    values.finite("loss_weights_N", rows.weights_L)
    values.finite("advantages_N", rows.advantages_L, counted_N)
    for name, values_N in zip(OPTIONAL_VECTORS, (rows.old_L, rows.sampler_L, rows.ref_L), strict=True):
        if values_N is not None:
            values.not_nan(name, values_N, counted_N)
    return rows


def _segments(values: checks.ValueChecks, given: GivenRows) -> Tensor | None:
    """Return each row's sequence; arbitrary but in range if cu_seqlens is invalid (checked later)."""
    if given.cu_seqlens is None:
        return None
    values.offsets("cu_seqlens", given.cu_seqlens, given.count)
    ends_S = given.cu_seqlens[1:].to(torch.int64).contiguous()
    row_N = torch.arange(given.count, device=given.device)
    return torch.searchsorted(ends_S, row_N, right=True).clamp_(max=given.sequences - 1)


def plan_rows(
    given: GivenRows,
    targets_N: Tensor,
    temperature: float | Tensor,
    vocabulary: int,
    dtype: torch.dtype,
    chunk_rows: int | None = None,
    shard: Shard | None = None,
    softcap: float | None = None,
) -> tuple[HeadPlan, LossRows]:
    """Check all values; return the plan of the head's sweep over the rows that can add to the gradient, and these."""
    live = find_live(given, targets_N, temperature, vocabulary)
    targets_L = targets_N if live.targets_L is None else live.targets_L
    local_L = targets_L - shard.first if shard else targets_L
    plan = HeadPlan(local_L, live.index_L, live.temperature, dtype, chunk_rows, shard, live.rest_D, softcap)
    return plan, live.rows
