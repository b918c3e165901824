"""Checks of what a caller hands in: one line each, ValueError with what was given and what was expected.

Values are looked at only in rows that count (weight not 0): a masked row's label, advantage or log-prob is never read.
"""

import torch
from torch import Tensor

from .objective import Objective

FLOATS = (torch.bfloat16, torch.float32, torch.float64)


def require(holds: bool, name: str, given: object, expected: str) -> None:
    """ValueError "name: got given, expected expected" unless it holds."""
    if not holds:
        raise ValueError(f"{name}: got {given}, expected {expected}")


def check_logits(logits_NV: Tensor) -> None:
    require(logits_NV.ndim == 2 and logits_NV.shape[1] > 0, "logits_NV", tuple(logits_NV.shape), "shape (N, V), V > 0")
    require(logits_NV.is_floating_point(), "logits_NV", logits_NV.dtype, "a float dtype")


def check_head(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, *, may_be_empty: bool = False
) -> torch.dtype:
    """Check shapes and dtypes of the head; the dtype its matmuls run in (autocast's, where that is on)."""
    require(hidden_NH.ndim == 2, "hidden_NH", tuple(hidden_NH.shape), "shape (N, H)")
    expected = f"shape (V, {hidden_NH.shape[1]}), V {'>=' if may_be_empty else '>'} 0"
    fits = weight_VH.ndim == 2 and weight_VH.shape[1] == hidden_NH.shape[1]
    fits = fits and (may_be_empty or weight_VH.shape[0] > 0)
    require(fits, "weight_VH", tuple(weight_VH.shape), expected)
    if bias_V is not None:
        require(bias_V.shape == weight_VH.shape[:1], "bias_V", tuple(bias_V.shape), f"shape ({len(weight_VH)},)")
    device = hidden_NH.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden_NH.dtype, weight_VH.dtype):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = hidden_NH.dtype
        require(weight_VH.dtype == dtype, "weight_VH", weight_VH.dtype, f"hidden_NH's dtype {dtype} (or autocast)")
    # float16 is out: the gradient is formed before any loss scale is known, and small loss weights underflow.
    require(dtype in FLOATS, "hidden_NH", dtype, f"matmuls in one of {FLOATS}")
    return dtype


def check_targets(targets_N: Tensor, count: int, vocabulary: int, counted_N: Tensor | None = None) -> None:
    require(targets_N.shape == (count,), "targets_N", tuple(targets_N.shape), f"shape ({count},)")
    require(targets_N.dtype == torch.int64, "targets_N", targets_N.dtype, "torch.int64")
    _require_rows(
        "targets_N", targets_N, (targets_N >= 0) & (targets_N < vocabulary), f"in [0, {vocabulary})", counted_N
    )


def check_temperature(temperature: float | Tensor, count: int, counted_N: Tensor | None = None) -> float | Tensor:
    """A positive number as a float, or a positive tensor (N,), detached."""
    if not isinstance(temperature, Tensor):
        require(0 < temperature < float("inf"), "temperature", temperature, "a finite number > 0")
        return float(temperature)
    require(temperature.shape in ((), (count,)), "temperature", tuple(temperature.shape), f"shape () or ({count},)")
    if temperature.ndim == 0:
        return check_temperature(float(temperature), count)
    good_N = torch.isfinite(temperature) & (temperature > 0)
    _require_rows("temperature", temperature, good_N, "a finite number > 0", counted_N)
    return temperature.detach()


def check_row_vector(name: str, values_N: Tensor, count: int) -> None:
    require(values_N.shape == (count,), name, tuple(values_N.shape), f"shape ({count},)")
    require(values_N.is_floating_point(), name, values_N.dtype, "a float dtype")


def check_finite(name: str, values_N: Tensor, counted_N: Tensor | None = None) -> None:
    _require_rows(name, values_N, torch.isfinite(values_N), "a finite number", counted_N)


def check_not_nan(name: str, values_N: Tensor, counted_N: Tensor | None = None) -> None:
    _require_rows(name, values_N, ~torch.isnan(values_N), "not NaN", counted_N)


def _require_rows(name: str, values_N: Tensor, good_N: Tensor, expected: str, counted_N: Tensor | None) -> None:
    bad_N = ~good_N if counted_N is None else ~good_N & counted_N
    if bool(bad_N.any()):
        row = int(bad_N.nonzero()[0, 0])
        raise ValueError(f"{name}: got {values_N[row].item()} at row {row}, expected {expected}")


def check_offsets(name: str, offsets: Tensor, count: int) -> None:
    """Bounds of ragged groups: whole numbers that rise (not strictly) from 0 to count."""
    whole = not offsets.is_floating_point() and offsets.dtype != torch.bool
    require(whole, name, offsets.dtype, "an integer dtype")
    require(offsets.ndim == 1 and len(offsets) > 0, name, tuple(offsets.shape), "shape (groups + 1,)")
    ends = (int(offsets[0]), int(offsets[-1]))
    require(ends == (0, count), name, f"first and last {ends}", f"(0, {count})")
    falls = (offsets[1:] < offsets[:-1]).nonzero()[:1, 0].tolist()
    require(not falls, name, f"a fall after position {falls}", "no falls")


def check_needed(objective: Objective, ref_logprobs_N: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Inputs that the objective cannot do without."""
    require(objective.kl_coef == 0 or ref_logprobs_N is not None, "ref_logprobs_N", None, "a tensor, as kl_coef > 0")
    shared = objective.importance != "token"
    require(not shared or cu_seqlens is not None, "cu_seqlens", None, f"a tensor, for {objective.importance} ratios")
