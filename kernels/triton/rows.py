# mypy: allow-untyped-defs, allow-incomplete-defs
"""The row kernel in Triton, one program per row of logits: log-prob, entropy, objective and gradient; and its launch.

This differs from the standard method in two ways. Every lane keeps its own running maximum and sums, which are combined
once at the row's end: the loop over the vocabulary then has no reduction, and one exponential per element, as both
cases of a rescaling use the exponential of the same distance. And the temperature divides distances from the maximum
instead of logits, so that large logits lose no precision to it.

Memory traffic per row of V logits: one read for the log-prob; for the gradient one more read, from the row's end back
so that what is still in the L2 cache comes first, and one write. Where `launch_settings` leaves few enough rows in
flight for that cache, the second read costs the memory nothing: 4 bytes an element in bf16. The registers of an SM
cannot hold a row of 151936 numbers instead: that is 304 KB in bf16, and they are 256 KB.

An SM's 1024 threads load ahead: 3 blocks of 2-byte logits are in flight, or 2 of float32, which is 48 or 64 KB. Memory
of 4.8 TB/s (H200) or 8 TB/s (B200) that answers after 0.8 us is kept busy by 29 or 43 KB an SM. With a cap, and for the
gradient with a bias, there are no registers for it.

Logits and gradient may be one buffer. No program reads another's row; the threads of a program wait for each other
between the two reads, and in the second each element is read by the thread that then writes it.

Legend: N rows of the logits, L live rows, C rows of a buffer, V vocabulary.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..objective import Objective
from ..terms import Coefficients, uses_sampler_weight
from ..vocab_parallel import Statistics

# 8 elements a thread: at most 64 registers, so two programs of 16 warps fit on an SM and one computes while one loads.
WIDEST_BLOCK = 4096
ELEMENTS_PER_WARP = 256
MOST_WARPS = 16

KL_KINDS = {"k1": 1, "k2": 2, "k3": 3}
_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2))
_LEAST = tl.constexpr(-3.4028234663852886e38)  # the lowest float32, from which a running maximum begins
_FAR = tl.constexpr(1e4)  # exp2(-_FAR) is 0, and so is _FAR times 0, unlike inf times 0
_NAN_WINS = tl.constexpr(tl.PropagateNan.ALL)  # a NaN among the logits must reach the loss
# Slices of these begin at any address, so one compiled kernel must serve all alignments.
_VECTORS = [
    *("bias_V", "index_L", "targets_L", "temperature_L", "logprobs_L", "entropy_L", "top_L", "log_sum_L"),
    *("by_logprob_L", "by_entropy_L", "advantages_L", "weights_L", "old_L", "sampler_L", "ref_L"),
]


@triton.jit
def _cap(x, softcap):
    """Return softcap * tanh(x / softcap): by its series near 0, where the other formula would cancel."""
    u = x / softcap
    square = u * u
    series = ((1.72414902e-2 * square - 5.30454936e-2) * square + 1.33258789e-1) * square - 3.33331439e-1
    e = tl.exp2(tl.abs(u) * (-2 * _LOG2_E))
    far = softcap * (1 - 2 * e / (1 + e))
    return tl.where(tl.abs(u) < 0.5, x + x * (square * series), tl.where(u < 0, -far, far))


@triton.jit
def _cap_slope(x, softcap):
    """Return the derivative of `_cap`, 1 - tanh(x / softcap)^2, without the subtraction, which would cancel."""
    e = tl.exp2(tl.abs(x / softcap) * (-2 * _LOG2_E))
    return 4 * e / ((1 + e) * (1 + e))


@triton.jit
def _load(row, stride, start, vocabulary, BLOCK: tl.constexpr):
    """Load a block of a row, with -inf past the vocabulary and in front of the row, where nothing is read."""
    columns = start + tl.arange(0, BLOCK)
    inside = (columns >= 0) & (columns < vocabulary)
    return tl.load(row + columns.to(tl.int64) * stride, mask=inside, other=float("-inf"))


@triton.jit
def _first_loads(row, stride, start, step, vocabulary, BLOCK: tl.constexpr):
    """Load the block at `start` and, of 2-byte logits, the next one, too."""
    now = _load(row, stride, start, vocabulary, BLOCK)
    soon = now
    if row.dtype.element_ty.primitive_bitwidth < 32:
        soon = _load(row, stride, start + step, vocabulary, BLOCK)
    return now, soon


@triton.jit
def _next_loads(row, stride, soon, start, step, vocabulary, BLOCK: tl.constexpr):
    """Load ahead, while the block at `start` is computed: the next block or, of 2-byte logits, the one after it."""
    now = soon
    if row.dtype.element_ty.primitive_bitwidth < 32:
        soon = _load(row, stride, start + 2 * step, vocabulary, BLOCK)
    else:
        now = _load(row, stride, start + step, vocabulary, BLOCK)
    return now, soon


@triton.jit
def _logits(loaded, bias_V, start, vocabulary, softcap, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """Return a loaded block of a row as float32, with its bias, and capped if asked for."""
    columns = start + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    x = loaded.to(tl.float32)
    if bias_V is not None:
        x += tl.load(bias_V + columns, mask=inside, other=0.0).to(tl.float32)
    if CAP:
        x = tl.where(inside, _cap(x, softcap), float("-inf"))
    return x


@triton.jit
def _softmax(row, stride, bias_V, vocabulary, to_log2, softcap, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """Return the row's maximum x, Z = sum e^z and sum e^z z (in units of log 2), where z = (x - max) / temperature."""
    top = tl.full((BLOCK,), _LEAST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    now, soon = _first_loads(row, stride, 0, BLOCK, vocabulary, BLOCK)
    for start in range(0, vocabulary, BLOCK):
        if CAP:  # with so much to compute there are no registers for loads ahead, and less need of them
            now = _load(row, stride, start, vocabulary, BLOCK)
        x = _logits(now, bias_V, start, vocabulary, softcap, CAP, BLOCK)
        if not CAP:
            now, soon = _next_loads(row, stride, soon, start, BLOCK, vocabulary, BLOCK)
        distance = tl.minimum(tl.abs(x - top) * to_log2, _FAR, propagate_nan=_NAN_WINS)
        e = tl.exp2(-distance)
        higher = x > top
        weighted = tl.where(higher, (weighted - distance * total) * e, weighted - distance * e)
        total = tl.where(higher, total * e + 1, total + e)
        top = tl.where(higher, x, top)
    highest = tl.max(top, 0)
    distance = tl.minimum((highest - top) * to_log2, _FAR, propagate_nan=_NAN_WINS)
    e = tl.exp2(-distance)
    return highest, tl.sum(total * e, 0), tl.sum((weighted - distance * total) * e, 0)


@triton.jit
def _write_gradient(
    row,
    stride,
    bias_V,
    gradient,
    gradient_stride,
    target,
    vocabulary,
    to_log2,
    top,
    log2_sum,
    at_target,
    per_p,
    per_p_log2_p,
    softcap,
    ENTROPY: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write at_target * [j = target] + p_j * (per_p + per_p_log2_p * log2 p_j), from the row's end to its start.

    With a cap, that is the gradient with respect to the capped logits, and is multiplied by their derivative.
    """
    blocks = tl.cdiv(vocabulary, BLOCK)
    now, soon = _first_loads(row, stride, (blocks - 1) * BLOCK, -BLOCK, vocabulary, BLOCK)
    for block in range(0, blocks):
        start = (blocks - 1 - block) * BLOCK
        if CAP or bias_V is not None:
            now = _load(row, stride, start, vocabulary, BLOCK)
        x = _logits(now, bias_V, start, vocabulary, softcap, False, BLOCK)
        if not CAP and bias_V is None:
            now, soon = _next_loads(row, stride, soon, start, -BLOCK, vocabulary, BLOCK)
        if CAP:
            slope = _cap_slope(x, softcap)
            x = _cap(x, softcap)
        log2_p = tl.maximum((x - top) * to_log2 - log2_sum, -_FAR, propagate_nan=_NAN_WINS)
        if ENTROPY:
            value = tl.exp2(log2_p) * (per_p + per_p_log2_p * log2_p)
        else:
            value = tl.exp2(log2_p) * per_p
        columns = start + tl.arange(0, BLOCK)
        value += tl.where(columns == target, at_target, 0.0)
        if CAP:
            value *= slope
        where = gradient + columns.to(tl.int64) * gradient_stride
        tl.store(where, value.to(gradient.dtype.element_ty), mask=columns < vocabulary)


@triton.jit
def _policy_slope(logprob, at, advantages_L, weights_L, old_L, sampler_L, log_low, log_high, log_dual, sampler_cap):
    """Return slope_L of `terms.policy_terms` for one row whose ratio is not shared."""
    advantage = tl.load(advantages_L + at)
    weight = -tl.load(weights_L + at)
    old = logprob
    if old_L is not None:
        old = tl.load(old_L + at)
    log_ratio = logprob - old
    below = tl.minimum(tl.maximum(log_ratio, log_low), log_dual)
    clipped = tl.where(advantage < 0, below, tl.minimum(log_ratio, log_high))
    if sampler_L is not None:
        weight *= tl.minimum(tl.exp(old - tl.load(sampler_L + at)), sampler_cap)
    return tl.where(clipped == log_ratio, weight * advantage * tl.exp(clipped), 0.0)


@triton.jit
def kl_slope(delta, KL: tl.constexpr):
    """Return the derivative of the estimator k1, k2 or k3 with respect to delta = logp - ref."""
    slope = tl.full((), 1.0, tl.float32)
    if KL == 2:
        slope = delta
    if KL == 3:  # 1 - exp(-delta), by its series where the subtraction would cancel
        series = delta * (1 - delta / 2 * (1 - delta / 3 * (1 - delta / 4)))
        slope = tl.where(tl.abs(delta) < 0.05, series, 1 - tl.exp(-delta))
    return slope


@triton.jit(do_not_specialize=["start"], do_not_specialize_on_alignment=_VECTORS)
def row_kernel(
    logits_CV,
    row_stride,
    column_stride,
    gradient_CV,
    gradient_row_stride,
    gradient_column_stride,
    bias_V,
    index_L,
    targets_L,
    temperature_L,
    logprobs_L,
    entropy_L,
    top_L,
    log_sum_L,
    by_logprob_L,
    by_entropy_L,
    advantages_L,
    weights_L,
    old_L,
    sampler_L,
    ref_L,
    start,
    vocabulary,
    temperature,
    log_low,
    log_high,
    log_dual,
    sampler_cap,
    kl_coef,
    entropy_coef,
    softcap,
    KNOWN: tl.constexpr,
    KL: tl.constexpr,
    ENTROPY: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Process one row.  KNOWN: read its log-prob, entropy, maximum and log Z; otherwise compute and write them."""
    at = start + tl.program_id(0).to(tl.int64)
    place = tl.program_id(0).to(tl.int64)
    if index_L is not None:
        place = tl.load(index_L + at)
    if temperature_L is not None:
        temperature = tl.load(temperature_L + at).to(tl.float32)
    target = tl.load(targets_L + at)
    row = logits_CV + place * row_stride
    to_log2 = _LOG2_E / temperature
    if KNOWN:
        logprob, entropy = tl.load(logprobs_L + at), tl.load(entropy_L + at)
        top, log_sum = tl.load(top_L + at), tl.load(log_sum_L + at)
    else:
        here = (target >= 0) & (target < vocabulary)  # otherwise another rank's shard has it
        chosen = tl.load(row + target * column_stride, mask=here, other=float("-inf")).to(tl.float32)
        top, total, weighted = _softmax(row, column_stride, bias_V, vocabulary, to_log2, softcap, CAP, BLOCK)
        log_sum = tl.log(total)
        if bias_V is not None:
            chosen += tl.load(bias_V + target, mask=here, other=0.0).to(tl.float32)
        if CAP:
            chosen = tl.where(here, _cap(chosen, softcap), float("-inf"))
        logprob = (chosen - top) / temperature - log_sum
        entropy = log_sum - weighted / total * _LN_2
        tl.store(logprobs_L + at, logprob)
        tl.store(entropy_L + at, entropy)
        if top_L is not None:
            tl.store(top_L + at, top)
            tl.store(log_sum_L + at, log_sum)
    if gradient_CV is not None:
        if by_logprob_L is not None:
            by_logprob = tl.load(by_logprob_L + at)
        else:
            by_logprob = _policy_slope(
                logprob, at, advantages_L, weights_L, old_L, sampler_L, log_low, log_high, log_dual, sampler_cap
            )
        if KL:
            by_logprob += kl_coef * tl.load(weights_L + at) * kl_slope(logprob - tl.load(ref_L + at), KL)
        by_entropy = tl.full((), 0.0, tl.float32)
        if by_entropy_L is not None:
            by_entropy = tl.load(by_entropy_L + at)
        elif ENTROPY:
            by_entropy = -entropy_coef * tl.load(weights_L + at)
        if not KNOWN:
            tl.debug_barrier()  # the gradient may lie over logits that other threads of this program have yet to read
        _write_gradient(
            row,
            column_stride,
            bias_V,
            gradient_CV + place * gradient_row_stride,
            gradient_column_stride,
            target,
            vocabulary,
            to_log2,
            top,
            log_sum * _LOG2_E,
            by_logprob / temperature,
            -(by_logprob + by_entropy * entropy) / temperature,
            -by_entropy / temperature * _LN_2,
            softcap,
            ENTROPY,
            CAP,
            BLOCK,
        )


def launch_settings(vocabulary: int, *, alone: bool = False) -> tuple[int, int]:
    """Return (BLOCK, warps) for rows of that length.  alone: a program has an SM's 1024 threads for itself."""
    most = 2 if alone else 1
    block = min(most * WIDEST_BLOCK, triton.next_power_of_2(vocabulary))
    return block, min(most * MOST_WARPS, max(1, block // ELEMENTS_PER_WARP))


def rows_stay_cached(row_bytes: int, processors: int, cache_bytes: int) -> bool:
    """Return whether the L2 cache still holds a row when it is read again, with two programs on each SM.

    What they write takes part of the cache, and lines are evicted before it is full: a quarter is left for both.
    """
    return 2 * processors * row_bytes <= 3 * cache_bytes // 4


def _alone(logits_CV: Tensor, *, twice: bool) -> bool:
    """Return whether programs should not share an SM, so that fewer rows, which are read twice, are in flight."""
    if not (twice and logits_CV.is_cuda):
        return False
    device = torch.cuda.get_device_properties(logits_CV.device)
    row_bytes = logits_CV.shape[1] * logits_CV.element_size()
    return not rows_stay_cached(row_bytes, device.multi_processor_count, device.L2_cache_size)


def run_rows(
    logits_CV: Tensor,
    bias_V: Tensor | None,
    targets_L: Tensor,
    temperature: float | Tensor,
    rows: slice,
    statistics: Statistics,
    *,
    coefficients: Coefficients | None = None,
    gradient_CV: Tensor | None = None,
    index_L: Tensor | None = None,
    known: bool = False,
    softcap: float | None = None,
) -> None:
    """Compute the statistics of the live rows `rows` and, if there is a buffer for it, the gradient of their logits.

    Live row rows.start + i is row i of both buffers or, with index_L, row index_L[rows.start + i].
    known: the statistics are read instead of computed. The two buffers may be one (see the module's docstring).
    softcap: the bound of the logits, as in `HeadPlan`.
    """
    if rows.stop <= rows.start:
        return
    temperature_L = temperature if isinstance(temperature, Tensor) else None
    twice = gradient_CV is not None and not known
    block, warps = launch_settings(logits_CV.shape[1], alone=_alone(logits_CV, twice=twice))
    with torch.cuda.device_of(logits_CV):
        row_kernel[(rows.stop - rows.start,)](
            logits_CV,
            *logits_CV.stride(),
            gradient_CV,
            *(gradient_CV.stride() if gradient_CV is not None else (0, 0)),
            *(vector(values) for values in (bias_V, index_L, targets_L, temperature_L)),
            statistics.logprobs_L,
            statistics.entropy_L,
            statistics.top_L,
            statistics.log_sum_L,
            *_row_inputs(coefficients),
            rows.start,
            logits_CV.shape[1],
            float(temperature) if temperature_L is None else 1.0,
            *_scalars(coefficients),
            1.0 if softcap is None else float(softcap),
            KNOWN=known,
            KL=_kl_kind(coefficients),
            ENTROPY=_uses_entropy(coefficients),
            CAP=softcap is not None,
            BLOCK=block,
            num_warps=warps,
            enable_fp_fusion=True,
        )


def vector(values_L: Tensor | None) -> Tensor | None:
    """Return the vector with stride 1; if it has another stride this copies it, at most one number per row."""
    return None if values_L is None else values_L.contiguous()


def _row_inputs(coefficients: Coefficients | None) -> tuple[Tensor | None, ...]:
    """Return by_logprob_L, by_entropy_L, advantages_L, weights_L, old_L, sampler_L, ref_L; None if not used."""
    if coefficients is None:
        return (None,) * 7
    rows, objective = coefficients.rows, coefficients.objective
    if rows is None or objective is None:
        return *_upstream(coefficients.by_logprob_L, coefficients.by_entropy_L), *(None,) * 5
    given = (rows.advantages_L, rows.weights_L, rows.old_L, rows.sampler_L, rows.ref_L)
    used = (True, True, True, uses_sampler_weight(rows, objective), objective.kl_coef != 0)
    vectors = (vector(values_L) if use else None for values_L, use in zip(given, used, strict=True))
    return vector(coefficients.by_logprob_L), None, *vectors


def _upstream(by_logprob_L: Tensor | None, by_entropy_L: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the upstream gradients; one of them is None if the caller did not use that result."""
    if by_logprob_L is None:
        assert by_entropy_L is not None
        by_logprob_L = torch.zeros_like(by_entropy_L)
    return by_logprob_L.contiguous(), vector(by_entropy_L)


def _scalars(coefficients: Coefficients | None) -> tuple[float, ...]:
    """Return log_low, log_high, log_dual, sampler_cap, kl_coef, entropy_coef."""
    objective = (coefficients and coefficients.objective) or Objective()
    cap = math.inf if objective.sampler_cap is None else objective.sampler_cap
    logs = (objective.log_low, objective.log_high, objective.log_dual)
    return tuple(float(x) for x in (*logs, cap, objective.kl_coef, objective.entropy_coef))


def _kl_kind(coefficients: Coefficients | None) -> int:
    """Return the kernel's KL switch, 0 for no KL term."""
    objective = coefficients and coefficients.objective
    return KL_KINDS[objective.kl] if objective and objective.kl_coef != 0 else 0


def _uses_entropy(coefficients: Coefficients | None) -> bool:
    """Return whether the loss depends on the entropies."""
    if coefficients is None or coefficients.objective is None:
        return coefficients is not None and coefficients.by_entropy_L is not None
    return coefficients.objective.entropy_coef != 0


def new_statistics(like: Tensor, count: int, *, for_gradient: bool) -> Statistics:
    """Allocate statistics of `count` rows on the tensor's device."""
    vectors = [like.new_empty(count, dtype=torch.float32) for _ in range(4 if for_gradient else 2)]
    return Statistics(*vectors)
