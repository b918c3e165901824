# mypy: allow-untyped-defs, allow-incomplete-defs
"""The vectors of a loss's rows in three Triton kernels: their checks, the live rows put together, and their sums.

Plain PyTorch does the same with some sixty small operations, each a launch of a few microseconds whatever its length.
The checks only flag bad input: the host reads two numbers, and only if one says so does the plain path look for what
is wrong, and name it.

Legend: N all rows, L live rows, D rows left out, S sequences, B rows of a program, M metrics.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..objective import Objective
from ..terms import LossRows, uses_sampler_weight
from .rows import KL_KINDS, kl_slope, vector

BLOCK, WARPS = 1024, 4
# The sums are one program's: 8192 rows are 8 steps, and a second launch to add up programs would take longer than them.
SUMS_BLOCK, SUMS_WARPS = 1024, 8
METRICS = (
    *("rows", "clip_low", "clip_high", "ratio_sum", "ratio_max", "entropy_sum", "logprob_sum", "kl_sum"),
    *("gap_sum", "gap_max", "sampler_weight_sum", "sampler_capped"),
)
_INFINITE = tl.constexpr(float("inf"))
_NAN_WINS = tl.constexpr(tl.PropagateNan.ALL)
_INPUTS = [
    *("targets_N", "temperature_N", "advantages_N", "weights_N", "old_N", "sampler_N", "ref_N", "segment_N"),
    *("logprobs_N", "entropy_N", "bounds_S1"),
]
_LIVE = [f"{name}_L" for name in ("targets", "temperature", "advantages", "weights", "old", "sampler", "ref")]


@triton.jit
def _nan_rows(values_N, row_B, counted_B):
    """Return whether each row that counts holds NaN in an optional vector."""
    if values_N is None:
        return counted_B & False
    value_B = tl.load(values_N + row_B, mask=counted_B, other=0.0)
    return value_B != value_B


@triton.jit
def _weighed(advantages_N, weights_N, row_B, inside_B):
    """Return of each row whether it counts, whether it has an advantage too, and whether either number is bad."""
    if weights_N is None:
        return inside_B, inside_B, inside_B & False
    weight_B = tl.load(weights_N + row_B, mask=inside_B, other=0.0).to(tl.float32)
    counted_B = weight_B != 0
    advantage_B = tl.load(advantages_N + row_B, mask=counted_B, other=0.0).to(tl.float32)
    bad_B = ~((tl.abs(weight_B) < _INFINITE) & (tl.abs(advantage_B) < _INFINITE))
    return counted_B, counted_B & (advantage_B != 0), bad_B


@triton.jit
def _bad_values(targets_N, temperature_N, row_B, counted_B, vocabulary):
    """Return whether a row that counts has a target outside the vocabulary, or a temperature that is none."""
    bad_B = counted_B & False
    if targets_N is not None:
        target_B = tl.load(targets_N + row_B, mask=counted_B, other=0)
        bad_B |= (target_B < 0) | (target_B >= vocabulary)
    if temperature_N is not None:
        temperature_B = tl.load(temperature_N + row_B, mask=counted_B, other=1.0).to(tl.float32)
        bad_B |= ~((temperature_B > 0) & (temperature_B < _INFINITE))
    return bad_B


@triton.jit(do_not_specialize=["count", "sequences", "vocabulary"], do_not_specialize_on_alignment=_INPUTS)
def check_kernel(
    targets_N,
    temperature_N,
    advantages_N,
    weights_N,
    old_N,
    sampler_N,
    ref_N,
    logprobs_N,
    entropy_N,
    bounds_S1,
    live_N,
    segment_N,
    found_2,
    count,
    sequences,
    vocabulary,
    EVERY: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Check the rows of a sequence, or BLOCK rows without bounds; write which are live, and each row's sequence.

    Set found_2[0] to 1 if a value is bad, and add the number of live rows to found_2[1].
    """
    program = tl.program_id(0).to(tl.int64)
    if bounds_S1 is None:
        first = program * BLOCK
        last = tl.minimum(first + BLOCK, count)
        wrong = False
    else:
        first = tl.load(bounds_S1 + program).to(tl.int64)
        last = tl.load(bounds_S1 + program + 1).to(tl.int64)
        wrong = (first > last) | (first < 0) | (last > count) | ((program == 0) & (first != 0))
        wrong |= (program == sequences - 1) & (last != count)
        last = tl.where(wrong, first, last)
    bad_B = tl.zeros((BLOCK,), tl.int32)
    useful_B = tl.zeros((BLOCK,), tl.int32)
    alive_B = tl.zeros((BLOCK,), tl.int32)
    for start in range(first, last, BLOCK):
        row_B = start + tl.arange(0, BLOCK)
        inside_B = row_B < last
        counted_B, has_advantage_B, wrong_B = _weighed(advantages_N, weights_N, row_B, inside_B)
        wrong_B |= _bad_values(targets_N, temperature_N, row_B, counted_B, vocabulary)
        wrong_B |= _nan_rows(old_N, row_B, counted_B) | _nan_rows(sampler_N, row_B, counted_B)
        wrong_B |= _nan_rows(ref_N, row_B, counted_B) | _nan_rows(logprobs_N, row_B, counted_B)
        wrong_B |= _nan_rows(entropy_N, row_B, counted_B)
        bad_B |= wrong_B.to(tl.int32)
        useful_B |= has_advantage_B.to(tl.int32)
        live_B = counted_B if EVERY or SHARED else has_advantage_B
        alive_B += live_B.to(tl.int32)
        if live_N is not None:
            tl.store(live_N + row_B, live_B.to(tl.uint8), mask=inside_B)
        if segment_N is not None:
            tl.store(segment_N + row_B, program, mask=inside_B)
    alive = tl.sum(alive_B, 0)
    if SHARED:  # a sequence in which no row has an advantage adds nothing
        useful = tl.max(useful_B, 0)
        alive *= useful
        for start in range(first, tl.where(useful > 0, first, last), BLOCK):
            row_B = start + tl.arange(0, BLOCK)
            tl.store(live_N + row_B, tl.zeros((BLOCK,), tl.uint8), mask=row_B < last)
    if wrong or tl.max(bad_B, 0) > 0:
        tl.atomic_max(found_2, 1)
    if alive > 0:
        tl.atomic_add(found_2 + 1, alive)


@triton.jit
def _pick(from_N, to_L, row_B, place_B, live_B):
    """Copy the live rows of an optional vector to their places."""
    if from_N is not None:
        value_B = tl.load(from_N + row_B, mask=live_B, other=0)
        tl.store(to_L + place_B, value_B.to(to_L.dtype.element_ty), mask=live_B)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=[*_INPUTS, "rest_D"])
def pick_kernel(
    live_N,
    index_L,
    rest_D,
    targets_N,
    targets_L,
    temperature_N,
    temperature_L,
    advantages_N,
    advantages_L,
    weights_N,
    weights_L,
    old_N,
    old_L,
    sampler_N,
    sampler_L,
    ref_N,
    ref_L,
    segment_N,
    segment_L,
    count,
    BLOCK: tl.constexpr,
):
    """Put the live rows among BLOCK rows together, in order; write their numbers and those of the rows left out."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    before_B = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, first, BLOCK):
        before_B += tl.load(live_N + start + tl.arange(0, BLOCK)).to(tl.int32)
    row_B = first + tl.arange(0, BLOCK)
    inside_B = row_B < count
    alive_B = tl.load(live_N + row_B, mask=inside_B, other=0).to(tl.int32)
    live_B = alive_B > 0
    place_B = tl.sum(before_B, 0) + tl.cumsum(alive_B, 0) - alive_B
    tl.store(index_L + place_B, row_B, mask=live_B)
    tl.store(rest_D + row_B - place_B, row_B, mask=inside_B & (alive_B == 0))
    _pick(targets_N, targets_L, row_B, place_B, live_B)
    _pick(temperature_N, temperature_L, row_B, place_B, live_B)
    _pick(advantages_N, advantages_L, row_B, place_B, live_B)
    _pick(weights_N, weights_L, row_B, place_B, live_B)
    _pick(old_N, old_L, row_B, place_B, live_B)
    _pick(sampler_N, sampler_L, row_B, place_B, live_B)
    _pick(ref_N, ref_L, row_B, place_B, live_B)
    _pick(segment_N, segment_L, row_B, place_B, live_B)


@triton.jit
def _kl(delta_B, KL: tl.constexpr):
    """Return the estimate k1, k2 or k3 of each row from delta = logp - ref; k3 by its series where it would cancel."""
    value_B = delta_B
    if KL == 2:
        value_B = delta_B * delta_B / 2
    if KL == 3:
        series_B = delta_B * delta_B / 2 * (1 - delta_B / 3 * (1 - delta_B / 4 * (1 - delta_B / 5)))
        value_B = tl.where(tl.abs(delta_B) < 0.05, series_B, delta_B - kl_slope(delta_B, 3))
    return value_B


@triton.jit
def _largest(values_B):
    """Return the largest value, or NaN if one is NaN."""
    return tl.max(values_B, 0) + tl.sum(tl.where(values_B != values_B, values_B, 0.0), 0)


@triton.jit(
    do_not_specialize=["count"],
    do_not_specialize_on_alignment=[*_LIVE[2:], "logprobs_L", "entropy_L", "log_ratio_L"],
)
def sums_kernel(
    logprobs_L,
    entropy_L,
    log_ratio_L,
    advantages_L,
    weights_L,
    old_L,
    sampler_L,
    ref_L,
    loss,
    metrics_M,
    by_logprob_L,
    by_entropy_L,
    count,
    log_low,
    log_high,
    log_dual,
    sampler_cap,
    kl_coef,
    entropy_coef,
    KL: tl.constexpr,
    PENALTY: tl.constexpr,
    ENTROPY: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up the loss and the metrics of all rows, and write the slopes if there is a place for them.

    log_ratio_L: that of shared ratios, whose slopes are not written.
    """
    zero_B = tl.zeros((BLOCK,), tl.float32)
    loss_B, ratio_B, entropy_B, logprob_B, kl_B, gap_B, sampler_B = (zero_B,) * 7
    low_B, high_B, capped_B, most_B, widest_B = (zero_B,) * 5
    for start in range(0, count, BLOCK):
        row_B = start + tl.arange(0, BLOCK)
        inside_B = row_B < count
        logp_B = tl.load(logprobs_L + row_B, mask=inside_B, other=0.0)
        surprise_B = tl.load(entropy_L + row_B, mask=inside_B, other=0.0)
        advantage_B = tl.load(advantages_L + row_B, mask=inside_B, other=0.0)
        weight_B = tl.load(weights_L + row_B, mask=inside_B, other=0.0)
        before_B = logp_B
        if old_L is not None:
            before_B = tl.load(old_L + row_B, mask=inside_B, other=0.0)
        log_B = logp_B - before_B
        if log_ratio_L is not None:
            log_B = tl.load(log_ratio_L + row_B, mask=inside_B, other=0.0)
        below_B = tl.minimum(tl.maximum(log_B, log_low, propagate_nan=_NAN_WINS), log_dual, propagate_nan=_NAN_WINS)
        above_B = tl.minimum(log_B, log_high, propagate_nan=_NAN_WINS)
        clipped_B = tl.where(advantage_B < 0, below_B, above_B)
        gain_B = -weight_B * advantage_B * tl.exp(clipped_B)
        if sampler_L is not None:
            distance_B = tl.where(inside_B, before_B - tl.load(sampler_L + row_B, mask=inside_B, other=0.0), 0.0)
            gap_B += tl.abs(distance_B)
            widest_B = tl.maximum(widest_B, tl.abs(distance_B), propagate_nan=_NAN_WINS)
            if CAPPED:
                share_B = tl.minimum(tl.exp(distance_B), sampler_cap, propagate_nan=_NAN_WINS)
                sampler_B += tl.where(inside_B, share_B, 0.0)
                capped_B += (inside_B & (share_B == sampler_cap)).to(tl.float32)
                gain_B *= share_B
        loss_B += gain_B
        slope_B = tl.where(clipped_B == log_B, gain_B, 0.0)
        if ref_L is not None:
            delta_B = logp_B - tl.load(ref_L + row_B, mask=inside_B, other=0.0)
            estimate_B = _kl(delta_B, KL)
            kl_B += estimate_B
            if PENALTY:
                loss_B += kl_coef * weight_B * estimate_B
                slope_B += kl_coef * weight_B * kl_slope(delta_B, KL)
        if ENTROPY:
            loss_B -= entropy_coef * weight_B * surprise_B
            if by_entropy_L is not None:
                tl.store(by_entropy_L + row_B, -entropy_coef * weight_B, mask=inside_B)
        if by_logprob_L is not None:
            tl.store(by_logprob_L + row_B, slope_B, mask=inside_B)
        real_B = tl.where(inside_B, tl.exp(log_B), 0.0)
        ratio_B += real_B
        most_B = tl.maximum(most_B, real_B, propagate_nan=_NAN_WINS)
        entropy_B += surprise_B
        logprob_B += logp_B
        low_B += ((log_B < log_low) & (advantage_B < 0)).to(tl.float32)
        high_B += ((log_B > log_high) & (advantage_B > 0)).to(tl.float32)
    tl.store(loss, tl.sum(loss_B, 0))
    tl.store(metrics_M, count.to(tl.float32))
    tl.store(metrics_M + 1, tl.sum(low_B, 0))
    tl.store(metrics_M + 2, tl.sum(high_B, 0))
    tl.store(metrics_M + 3, tl.sum(ratio_B, 0))
    tl.store(metrics_M + 4, _largest(most_B))
    tl.store(metrics_M + 5, tl.sum(entropy_B, 0))
    tl.store(metrics_M + 6, tl.sum(logprob_B, 0))
    if ref_L is not None:
        tl.store(metrics_M + 7, tl.sum(kl_B, 0))
    if sampler_L is not None:
        tl.store(metrics_M + 8, tl.sum(gap_B, 0))
        tl.store(metrics_M + 9, _largest(widest_B))
        if CAPPED:
            tl.store(metrics_M + 10, tl.sum(sampler_B, 0))
            tl.store(metrics_M + 11, tl.sum(capped_B, 0))


def check_rows(
    like: Tensor,
    count: int,
    targets_N: Tensor | None,
    temperature_N: Tensor | None,
    vocabulary: int,
    vectors: Sequence[Tensor | None] = (None,) * 7,
    bounds_S1: Tensor | None = None,
    *,
    every: bool = True,
    shared: bool = False,
    segments: bool = False,
) -> tuple[bool, int, Tensor | None, Tensor | None]:
    """Return whether all values are good, how many rows are live, which (N,), and each row's sequence, if asked for.

    vectors: advantages, weights, old, sampler and reference log-probs, log-probs and entropies, (N,) or None. Without
    weights every row counts, and which are live is not asked. bounds_S1: of at least one sequence. every: rows of
    advantage 0 are live too. shared: so are those whose sequence has another advantage. The host waits once.
    """
    sequences = 0 if bounds_S1 is None else len(bounds_S1) - 1
    live_N = None if vectors[1] is None else like.new_empty(count, dtype=torch.uint8)
    segment_N = like.new_empty(count, dtype=torch.int64) if segments else None
    found_2 = like.new_zeros(2, dtype=torch.int32)
    with torch.cuda.device_of(like):
        check_kernel[(sequences or max(1, triton.cdiv(count, BLOCK)),)](
            *(vector(values) for values in (targets_N, temperature_N, *vectors, bounds_S1)),
            live_N,
            segment_N,
            found_2,
            count,
            sequences,
            vocabulary,
            EVERY=every,
            SHARED=shared and not every,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    bad, live = found_2.tolist()
    return not bad, live, live_N, segment_N


def pick_rows(
    live_N: Tensor, live: int, targets_N: Tensor | None, temperature_N: Tensor | None, rows: LossRows
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, LossRows]:
    """Return the numbers of the live rows and of the others, and targets, temperatures and inputs of the live rows."""
    count, new = len(live_N), live_N.new_empty
    index_L, rest_D = new(live, dtype=torch.int64), new(count - live, dtype=torch.int64)
    given = [targets_N, temperature_N, *vars(rows).values()][:-1]  # the last is the number of sequences
    picked = [None if values_N is None else new(live, dtype=values_N.dtype) for values_N in given]
    pairs = (values for pair in zip(map(vector, given), picked, strict=True) for values in pair)
    with torch.cuda.device_of(live_N):
        pick_kernel[(triton.cdiv(count, BLOCK),)](live_N, index_L, rest_D, *pairs, count, BLOCK=BLOCK, num_warps=WARPS)
    return index_L, rest_D, picked[0], picked[1], LossRows(*picked[2:], rows.sequences)  # type: ignore[arg-type, call-arg]


def add_up(
    logprobs_L: Tensor,
    entropy_L: Tensor,
    log_ratio_L: Tensor | None,
    rows: LossRows,
    objective: Objective,
    *,
    with_slopes: bool = False,
) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor | None, Tensor | None]]:
    """Return loss and metrics, 0-dim float32 each, and the slopes by log-prob and entropy (None: zero, or not wanted).

    log_ratio_L: that of shared ratios, whose slopes this cannot give.
    """
    assert log_ratio_L is None or not with_slopes
    loss = logprobs_L.new_empty((), dtype=torch.float32)
    by_logprob_L = torch.empty_like(logprobs_L) if with_slopes else None
    by_entropy_L = torch.empty_like(logprobs_L) if with_slopes and objective.entropy_coef != 0 else None
    metrics_M = logprobs_L.new_empty(len(METRICS), dtype=torch.float32)
    cap = objective.sampler_cap
    vectors = (rows.advantages_L, rows.weights_L, rows.old_L, rows.sampler_L, rows.ref_L)
    numbers = (objective.log_low, objective.log_high, objective.log_dual, 0.0 if cap is None else cap)
    with torch.cuda.device_of(logprobs_L):
        sums_kernel[(1,)](
            *(vector(values) for values in (logprobs_L, entropy_L, log_ratio_L, *vectors)),
            loss,
            metrics_M,
            by_logprob_L,
            by_entropy_L,
            len(logprobs_L),
            *(float(x) for x in (*numbers, objective.kl_coef, objective.entropy_coef)),
            KL=KL_KINDS[objective.kl],
            PENALTY=objective.kl_coef != 0,
            ENTROPY=objective.entropy_coef != 0,
            CAPPED=cap is not None,
            BLOCK=SUMS_BLOCK,
            num_warps=SUMS_WARPS,
        )
    given = dict.fromkeys(METRICS, True) | dict.fromkeys(METRICS[7:8], rows.ref_L is not None)
    given |= dict.fromkeys(METRICS[8:10], rows.sampler_L is not None)
    given |= dict.fromkeys(METRICS[10:], uses_sampler_weight(rows, objective))
    metrics = {name: metrics_M[place] for place, name in enumerate(METRICS) if given[name]}
    return loss, metrics, (by_logprob_L, by_entropy_L)
