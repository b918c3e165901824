# mypy: allow-untyped-defs, allow-incomplete-defs
"""The row kernel in Triton: log-prob, entropy, objective and gradient of a row of logits, one program per row.

Departs from the standard method in two ways. Every lane keeps its own running maximum and sums, combined once at the
row's end, so that the loop over the vocabulary has no reduction and, by rescaling with the one exponential of the
distance, one exponential per element. And distances are tempered after they are taken, so that large logits lose
nothing to the temperature.

Bytes moved per row of V logits: one read for the log-prob; for the gradient one more read, from the row's end back, so
that what is still in the L2 cache is met first, and one write. Logits and gradient lie in different buffers, since a
warp that has finished the first read may not overwrite what another has yet to read. With KNOWN statistics they may be
one: a row is read once, each element by the very thread that then writes it, and no program looks at another's row.

Legend: N rows of the logits, L live rows, C rows of a buffer, V vocabulary.
"""

import math

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2))
_LEAST = tl.constexpr(-3.4028234663852886e38)  # the least float32: a running maximum to begin with
_FAR = tl.constexpr(1e4)  # exp2(-_FAR) is 0, and _FAR times 0 is too, which inf times 0 is not
_NAN_WINS = tl.constexpr(tl.PropagateNan.ALL)  # a NaN among the logits must reach the loss
# Slices of these come at any address: one compiled kernel must do for all.
_VECTORS = [
    *("bias_V", "index_L", "targets_L", "temperature_L", "logprobs_L", "entropy_L", "top_L", "log_sum_L"),
    *("by_logprob_L", "by_entropy_L", "advantages_L", "weights_L", "old_L", "sampler_L", "ref_L"),
]


@triton.jit
def _logits(row, stride, bias_V, start, vocabulary, BLOCK: tl.constexpr):
    """A block of a row in float32, -inf past the vocabulary."""
    columns = start + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    x = tl.load(row + columns.to(tl.int64) * stride, mask=inside, other=float("-inf")).to(tl.float32)
    if bias_V is not None:
        x += tl.load(bias_V + columns, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def _softmax(row, stride, bias_V, vocabulary, to_log2, BLOCK: tl.constexpr):
    """Maximum x of the row, Z = sum e^z and sum e^z z (in units of log 2) with z = (x - maximum) / temperature."""
    top = tl.full((BLOCK,), _LEAST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        x = _logits(row, stride, bias_V, start, vocabulary, BLOCK)
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
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """at_target * [j = target] + p_j * (per_p + per_p_log2_p * log2 p_j), from the row's end to its start."""
    blocks = tl.cdiv(vocabulary, BLOCK)
    for block in range(0, blocks):
        start = (blocks - 1 - block) * BLOCK
        x = _logits(row, stride, bias_V, start, vocabulary, BLOCK)
        log2_p = tl.maximum((x - top) * to_log2 - log2_sum, -_FAR, propagate_nan=_NAN_WINS)
        if ENTROPY:
            value = tl.exp2(log2_p) * (per_p + per_p_log2_p * log2_p)
        else:
            value = tl.exp2(log2_p) * per_p
        columns = start + tl.arange(0, BLOCK)
        value += tl.where(columns == target, at_target, 0.0)
        where = gradient + columns.to(tl.int64) * gradient_stride
        tl.store(where, value.to(gradient.dtype.element_ty), mask=columns < vocabulary)


@triton.jit
def _policy_slope(logprob, at, advantages_L, weights_L, old_L, sampler_L, log_low, log_high, log_dual, sampler_cap):
    """`rows.policy_terms` of one row with a ratio of its own: derivative of its loss with respect to its log-prob."""
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
def _kl_slope(delta, KL: tl.constexpr):
    """Derivative of the estimator k1, k2 or k3 with respect to delta = logp - ref."""
    slope = tl.full((), 1.0, tl.float32)
    if KL == 2:
        slope = delta
    if KL == 3:  # 1 - exp(-delta), by its series where the difference would cancel
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
    KNOWN: tl.constexpr,
    KL: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row.  KNOWN: its log-prob, entropy, maximum and log Z are read, else they are found and written."""
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
        top, total, weighted = _softmax(row, column_stride, bias_V, vocabulary, to_log2, BLOCK)
        log_sum = tl.log(total)
        here = (target >= 0) & (target < vocabulary)  # else in another rank's part of the vocabulary
        chosen = tl.load(row + target * column_stride, mask=here, other=float("-inf")).to(tl.float32)
        if bias_V is not None:
            chosen += tl.load(bias_V + target, mask=here, other=0.0).to(tl.float32)
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
            by_logprob += kl_coef * tl.load(weights_L + at) * _kl_slope(logprob - tl.load(ref_L + at), KL)
        by_entropy = tl.full((), 0.0, tl.float32)
        if by_entropy_L is not None:
            by_entropy = tl.load(by_entropy_L + at)
        elif ENTROPY:
            by_entropy = -entropy_coef * tl.load(weights_L + at)
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
            ENTROPY,
            BLOCK,
        )
