"""Check the tensors that a caller hands in; a ValueError says what was given and what was expected.

Values are checked only in rows that count (weight not 0): a masked row's label, advantage or log-prob is never read.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from .objective import Objective

BadRows = Callable[[Tensor], Tensor]
FLOATS = (torch.bfloat16, torch.float32, torch.float64)
WHOLE = (torch.int32, torch.int64)


def require(holds: bool, name: str, given: object, expected: str) -> None:
    """Raise ValueError "name: got {given}, expected {expected}" unless `holds`."""
    if not holds:
        raise ValueError(f"{name}: got {given}, expected {expected}")


def require_device(name: str, tensor: Tensor, device: torch.device) -> None:
    require(tensor.device == device, name, f"a tensor on {tensor.device}", f"one on {device}")


def require_whole(name: str, tensor: Tensor) -> None:
    """Refuse a DTensor: its rows may lie on other ranks, so only a part of a head sharded by FSDP would be read."""
    module = sys.modules.get("torch.distributed.tensor")  # importing it takes long, and without it no DTensor exists
    sharded = module is not None and isinstance(tensor, module.DTensor)
    require(not sharded, name, "a DTensor", "the full tensor: call unshard() on its module, or full_tensor()")


def check_logits(logits_NV: Tensor, *, inplace: bool) -> None:
    """Check shape and dtype of logits and, with `inplace`, that their gradient may be written over them."""
    require_whole("logits_NV", logits_NV)
    require(logits_NV.ndim == 2 and logits_NV.shape[1] > 0, "logits_NV", tuple(logits_NV.shape), "shape (N, V), V > 0")
    require(logits_NV.is_floating_point(), "logits_NV", logits_NV.dtype, "a float dtype")
    if inplace:
        leaf = logits_NV.is_leaf and logits_NV.requires_grad
        require(not leaf, "logits_NV", "a leaf that needs a gradient", "an operation's output, with inplace=True")
        repeated = any(step == 0 and size > 1 for step, size in zip(logits_NV.stride(), logits_NV.shape, strict=True))
        require(not repeated, "logits_NV", f"strides {logits_NV.stride()}", "no number twice, with inplace=True")


def check_softcap(softcap: float | None) -> None:
    """Check the bound of the logits."""
    holds = softcap is None or 0 < softcap < float("inf")
    require(holds, "softcap", softcap, "a finite number > 0 or None")


def check_head(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, *, may_be_empty: bool = False
) -> torch.dtype:
    """Check shapes and dtypes of the head; return the dtype of its matmuls (autocast's, where that is on)."""
    for name, tensor in (("hidden_NH", hidden_NH), ("weight_VH", weight_VH), ("bias_V", bias_V)):
        if tensor is not None:
            require_whole(name, tensor)
    require(hidden_NH.ndim == 2, "hidden_NH", tuple(hidden_NH.shape), "shape (N, H)")
    expected = f"shape (V, {hidden_NH.shape[1]}), V {'>=' if may_be_empty else '>'} 0"
    fits = weight_VH.ndim == 2 and weight_VH.shape[1] == hidden_NH.shape[1]
    fits = fits and (may_be_empty or weight_VH.shape[0] > 0)
    require(fits, "weight_VH", tuple(weight_VH.shape), expected)
    require_device("weight_VH", weight_VH, hidden_NH.device)
    if bias_V is not None:
        require(bias_V.shape == weight_VH.shape[:1], "bias_V", tuple(bias_V.shape), f"shape ({len(weight_VH)},)")
    device = hidden_NH.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden_NH.dtype, weight_VH.dtype):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = hidden_NH.dtype
        require(weight_VH.dtype == dtype, "weight_VH", weight_VH.dtype, f"hidden_NH's dtype {dtype} (or autocast)")
    # float16 is refused: the gradient is computed before any loss scale is known, and small loss weights underflow.
    require(dtype in FLOATS, "hidden_NH", dtype, f"matmuls in one of {FLOATS}")
    return dtype


class ValueChecks:
    """Collect checks of values on one device; the host reads all of them at once, as each read waits for the device.

    A check of rows is written with as few operations as can be: on a GPU each is a launch, and there are many checks.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._bad: list[Tensor] = []
        self._messages: list[Callable[[], str]] = []

    def add(self, bad: Tensor, message: Callable[[], str]) -> None:
        """Add a flag, or a flag for each row, and the function that makes the error message if one is true."""
        self._bad.append(bad)
        self._messages.append(message)

    def settle(self, *numbers: Tensor) -> list[int]:
        """Raise ValueError for the first check that failed; if none did, return these 0-dim whole numbers as ints."""
        if not self._bad and not numbers:
            return []
        read = torch.stack([*self._flags(), *(number.to(torch.int64) for number in numbers)]).tolist()
        for bad, message in zip(read, self._messages, strict=False):
            if bad:
                raise ValueError(message())
        return read[len(self._bad) :]

    def _flags(self) -> list[Tensor]:
        """Return the flag of each check, 0-dim int64; those of as many rows are made of their rows together."""
        found: dict[int, Tensor] = {}
        for shape in {bad.shape for bad in self._bad}:
            places = [place for place, bad in enumerate(self._bad) if bad.shape == shape]
            flags_K = torch.stack([self._bad[place] for place in places])
            flags_K = flags_K.any(1) if flags_K.ndim == 2 else flags_K
            found |= zip(places, flags_K.to(torch.int64).unbind(), strict=True)
        return [found[place] for place in range(len(self._bad))]

    def rows(self, name: str, values_N: Tensor, bad: BadRows, expected: str, counted_N: Tensor | None = None) -> None:
        """Add the check that the value of no row, or of no row that counts, is bad."""
        self.require_here(name, values_N)
        bad_N = bad(values_N) if counted_N is None else bad(values_N) & counted_N

        def message() -> str:
            row = int(bad_N.nonzero()[0, 0])
            return f"{name}: got {values_N[row].item()} at row {row}, expected {expected}"

        self.add(bad_N, message)

    def finite(self, name: str, values_N: Tensor, counted_N: Tensor | None = None) -> None:
        self.rows(name, values_N, lambda x_N: (x_N - x_N) != 0, "a finite number", counted_N)  # inf - inf is NaN

    def not_nan(self, name: str, values_N: Tensor, counted_N: Tensor | None = None) -> None:
        self.rows(name, values_N, lambda x_N: x_N != x_N, "not NaN", counted_N)

    def targets(self, targets_N: Tensor, count: int, vocabulary: int, counted_N: Tensor | None = None) -> None:
        check_targets(targets_N, count)
        self.rows(
            "targets_N", targets_N, lambda x_N: x_N.clamp(0, vocabulary - 1) != x_N, f"in [0, {vocabulary})", counted_N
        )

    def temperature(self, temperature: float | Tensor, count: int, counted_N: Tensor | None = None) -> float | Tensor:
        """Check a temperature; return it as a float, or detached as a tensor (N,)."""
        temperature = check_temperature(temperature, count)
        if isinstance(temperature, float):
            return temperature
        self.rows(
            "temperature",
            temperature,
            lambda x_N: ~((x_N > 0) & (x_N < float("inf"))),
            "a finite number > 0",
            counted_N,
        )
        return temperature

    def offsets(self, name: str, offsets: Tensor, count: int) -> None:
        """Check bounds of ragged groups: whole numbers from 0 to count that never fall."""
        check_offsets(name, offsets)
        self.require_here(name, offsets)
        ends_2 = offsets[[0, -1]]
        self.add(
            (offsets[0] != 0) | (offsets[-1] != count),
            lambda: f"{name}: got first and last {tuple(ends_2.tolist())}, expected {(0, count)}",
        )
        falls = offsets[1:] < offsets[:-1]
        self.add(
            falls.any(),
            lambda: f"{name}: got a fall after position {falls.nonzero()[:1, 0].tolist()}, expected no falls",
        )

    def require_here(self, name: str, values: Tensor) -> None:
        require_device(name, values, self.device)


def check_row_vector(name: str, values_N: Tensor, count: int) -> None:
    require(values_N.shape == (count,), name, tuple(values_N.shape), f"shape ({count},)")
    require(values_N.is_floating_point(), name, values_N.dtype, "a float dtype")


def check_needed(objective: Objective, ref_logprobs_N: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Check that the inputs which the objective needs are there."""
    require(objective.kl_coef == 0 or ref_logprobs_N is not None, "ref_logprobs_N", None, "a tensor, as kl_coef > 0")
    shared = objective.importance != "token"
    require(not shared or cu_seqlens is not None, "cu_seqlens", None, f"a tensor, for {objective.importance} ratios")


def check_targets(targets_N: Tensor, count: int) -> None:
    require(targets_N.shape == (count,), "targets_N", tuple(targets_N.shape), f"shape ({count},)")
    require(targets_N.dtype == torch.int64, "targets_N", targets_N.dtype, "torch.int64")


def check_temperature(temperature: float | Tensor, count: int) -> float | Tensor:
    """Check a number, or a tensor's shape; return it as a float, or detached as a tensor (N,)."""
    if isinstance(temperature, Tensor):
        require(temperature.shape in ((), (count,)), "temperature", tuple(temperature.shape), f"shape () or ({count},)")
        if temperature.ndim > 0 or temperature.device.type != "cpu":
            return temperature.detach().expand(count)
        temperature = float(temperature)
    require(0 < temperature < float("inf"), "temperature", temperature, "a finite number > 0")
    return float(temperature)


def check_offsets(name: str, offsets: Tensor) -> None:
    """Check dtype and shape of bounds of ragged groups."""
    whole = not offsets.is_floating_point() and offsets.dtype != torch.bool
    require(whole, name, offsets.dtype, "an integer dtype")
    require(offsets.ndim == 1 and len(offsets) > 0, name, tuple(offsets.shape), "shape (groups + 1,)")
