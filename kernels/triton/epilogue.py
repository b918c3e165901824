"""Launches the row kernel: its settings by arithmetic, and what it needs of an objective.

Legend: N rows of the logits, L live rows, C rows of a buffer, V vocabulary.
"""

import math

import torch
import triton
from torch import Tensor

from ..objective import Objective
from ..terms import Coefficients, uses_sampler_weight
from ..vocab_parallel import Statistics
from .rows import row_kernel

# 8 elements a thread: at most 64 registers, so two programs of 16 warps fit on an SM and one computes while one loads.
WIDEST_BLOCK = 4096
ELEMENTS_PER_WARP = 256
MOST_WARPS = 16

_KL_KINDS = {"k1": 1, "k2": 2, "k3": 3}


def launch_settings(vocabulary: int) -> tuple[int, int]:
    """(BLOCK, warps) for rows of that length."""
    block = min(WIDEST_BLOCK, triton.next_power_of_2(vocabulary))
    return block, min(MOST_WARPS, max(1, block // ELEMENTS_PER_WARP))


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
) -> None:
    """Statistics of the live rows `rows`, and the gradient with respect to their logits if there is a buffer for it.

    Live row rows.start + i is row i of both buffers, or row index_L[rows.start + i].
    known: the statistics are read, and the two buffers may be one (see `row_kernel.py`).
    """
    if rows.stop <= rows.start:
        return
    assert known or gradient_CV is None or gradient_CV.data_ptr() != logits_CV.data_ptr()
    temperature_L = temperature if isinstance(temperature, Tensor) else None
    block, warps = launch_settings(logits_CV.shape[1])
    with torch.cuda.device_of(logits_CV):
        row_kernel[(rows.stop - rows.start,)](
            logits_CV,
            *logits_CV.stride(),
            gradient_CV,
            *(gradient_CV.stride() if gradient_CV is not None else (0, 0)),
            *(_vector(values) for values in (bias_V, index_L, targets_L, temperature_L)),
            statistics.logprobs_L,
            statistics.entropy_L,
            statistics.top_L,
            statistics.log_sum_L,
            *_row_inputs(coefficients),
            rows.start,
            logits_CV.shape[1],
            float(temperature) if temperature_L is None else 1.0,
            *_scalars(coefficients),
            KNOWN=known,
            KL=_kl_kind(coefficients),
            ENTROPY=_uses_entropy(coefficients),
            BLOCK=block,
            num_warps=warps,
            enable_fp_fusion=True,
        )


def _vector(values_L: Tensor | None) -> Tensor | None:
    """The same with stride 1: a copy, of one number a row at most, if it has another."""
    return None if values_L is None else values_L.contiguous()


def _row_inputs(coefficients: Coefficients | None) -> tuple[Tensor | None, ...]:
    """by_logprob_L, by_entropy_L, advantages_L, weights_L, old_L, sampler_L, ref_L."""
    if coefficients is None:
        return (None,) * 7
    rows, objective = coefficients.rows, coefficients.objective
    if rows is None or objective is None:
        return *_given(coefficients.by_logprob_L, coefficients.by_entropy_L), *(None,) * 5
    given = (rows.advantages_L, rows.weights_L, rows.old_L, rows.sampler_L, rows.ref_L)
    used = (True, True, True, uses_sampler_weight(rows, objective), objective.kl_coef != 0)
    vectors = (_vector(values_L) if use else None for values_L, use in zip(given, used, strict=True))
    return _vector(coefficients.by_logprob_L), None, *vectors


def _given(by_logprob_L: Tensor | None, by_entropy_L: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Upstream gradients: one of the two results may be unused."""
    if by_logprob_L is None:
        assert by_entropy_L is not None
        by_logprob_L = torch.zeros_like(by_entropy_L)
    return by_logprob_L.contiguous(), _vector(by_entropy_L)


def _scalars(coefficients: Coefficients | None) -> tuple[float, ...]:
    """log_low, log_high, log_dual, sampler_cap, kl_coef, entropy_coef."""
    objective = (coefficients and coefficients.objective) or Objective()
    cap = math.inf if objective.sampler_cap is None else objective.sampler_cap
    logs = (objective.log_low, objective.log_high, objective.log_dual)
    return tuple(float(x) for x in (*logs, cap, objective.kl_coef, objective.entropy_coef))


def _kl_kind(coefficients: Coefficients | None) -> int:
    objective = coefficients and coefficients.objective
    return _KL_KINDS[objective.kl] if objective and objective.kl_coef != 0 else 0


def _uses_entropy(coefficients: Coefficients | None) -> bool:
    if coefficients is None or coefficients.objective is None:
        return coefficients is not None and coefficients.by_entropy_L is not None
    return coefficients.objective.entropy_coef != 0


def new_statistics(like: Tensor, count: int, *, for_gradient: bool) -> Statistics:
    """Empty ones on the tensor's device."""
    vectors = [like.new_empty(count, dtype=torch.float32) for _ in range(4 if for_gradient else 2)]
    return Statistics(*vectors)
