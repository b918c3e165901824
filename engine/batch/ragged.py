"""Ragged columns as the packer takes them, whatever library made them: numpy views of where the values lie.

A copy is never made silently. What would need one is refused, with the call that makes it; lists of lists of int are
the one form that is copied, because they lie nowhere. Offsets, one number for each trajectory, are copied freely.

Legend: N trajectories of T values in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from mgrpo import _packing

Offsets = NDArray[np.int64]
Flat = tuple[NDArray[Any], Offsets]
Values = NDArray[Any] | list[NDArray[Any]]  # one array (T,), or one of each trajectory

TAKEN = (
    "a pair (values, offsets) of numpy arrays, a list of numpy arrays or of lists of int, a pyarrow list array, a "
    "jagged torch tensor or an awkward array"
)


def ragged(values: Any, name: str = "values") -> tuple[Values, Offsets]:
    """Ragged values as (values_T, offsets_N1), not copied: trajectory n is values_T[offsets_N1[n]:offsets_N1[n + 1]].

    values is one of:
    * a tuple (values_T, offsets_N1) of one-dimensional numpy arrays, offsets of any integer dtype, rising;
    * a list of N one-dimensional numpy arrays, which stays a list, as `_packing.fill` takes it;
    * a list of N lists (or tuples) of int: copied, to int64;
    * a pyarrow ListArray or LargeListArray of numbers, a slice of one too, or a ChunkedArray of at most one chunk;
    * a nested torch tensor of layout torch.jagged on a CPU, of two dimensions and without holes;
    * an awkward array of type N * var * number that is stored as one run (a ListOffsetArray).

    offsets_N1 is int64 and begins at 0: of a slice, values_T is the part that it shows.
    Raises ValueError, naming `name`: a null (with its row), what can only be had by a copy, anything else.
    """
    if isinstance(values, tuple):
        return _pair(values, name)
    if isinstance(values, list):
        return _list(values, name)
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return _arrow(values, name)
    if isinstance(values, torch.Tensor):
        return _torch(values, name)
    if type(values).__module__.startswith("awkward."):
        return _awkward(values, name)
    raise ValueError(f"{name}: {_kind(values)} given: expected {TAKEN}")


def _pair(values: tuple[Any, ...], name: str) -> Flat:
    if len(values) != 2 or not all(isinstance(part, np.ndarray) and part.ndim == 1 for part in values):
        given = ", ".join(map(_kind, values))
        raise ValueError(f"{name}: a tuple ({given}) given: expected (values, offsets), two one-dimensional arrays")
    return _shown(*values, name)


def _list(values: list[Any], name: str) -> tuple[Values, Offsets]:
    if values and not isinstance(values[0], np.ndarray):
        return _lists(values, name)
    for n, each in enumerate(values):
        if not isinstance(each, np.ndarray) or each.ndim != 1:
            raise ValueError(f"{name}[{n}]: {_kind(each)} given: expected a one-dimensional numpy array, as [0] is")
    return values, _offsets(list(map(len, values)))


def _lists(values: list[Any], name: str) -> Flat:
    try:
        return _packing.from_lists(values)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _arrow(values: Any, name: str) -> Flat:
    if isinstance(values, pa.ChunkedArray):
        if values.num_chunks > 1:
            raise ValueError(f"{name}: {values.num_chunks} chunks given: expected one; combine_chunks() copies them")
        values = values.chunk(0) if values.num_chunks else pa.array([], values.type)
    if not _is_ragged(values.type):
        raise ValueError(
            f"{name}: a pyarrow array of {values.type} given: expected list or large_list of integers or floats (bools "
            "are bits there: use uint8)"
        )
    if values.null_count:
        raise ValueError(f"{name}: row {_first_null(values)} is null: expected a list in every row")
    offsets_N1 = values.offsets.to_numpy()
    shown = values.values.slice(offsets_N1[0], offsets_N1[-1] - offsets_N1[0])
    if shown.null_count:
        row = int(np.searchsorted(offsets_N1, offsets_N1[0] + _first_null(shown), side="right")) - 1
        raise ValueError(f"{name}: row {row} holds a null: expected numbers only")
    return shown.to_numpy(zero_copy_only=True), (offsets_N1 - offsets_N1[0]).astype(np.int64)


def _is_ragged(kind: pa.DataType) -> bool:
    if not pa.types.is_list(kind) and not pa.types.is_large_list(kind):
        return False
    return pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type)


def _first_null(values: Any) -> int:
    return int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])


def _torch(values: Any, name: str) -> Flat:
    if values.layout != torch.jagged or values.dim() != 2 or values.device.type != "cpu":
        raise ValueError(
            f"{name}: {_kind(values)} given: expected a nested one of layout torch.jagged and (N, *) on a CPU"
        )
    if values.lengths() is not None:
        raise ValueError(f"{name}: a jagged tensor with holes given: expected one run; contiguous() copies it into one")
    try:
        flat_T = values.values().detach().numpy()
    except TypeError as error:  # bfloat16, float8
        raise ValueError(f"{name}: {values.dtype} given: expected a dtype that numpy has") from error
    return _shown(flat_T, values.offsets().numpy(), name)


def _awkward(values: Any, name: str) -> Flat:
    """By the names of awkward's classes, so that it is not imported where it is not used."""
    outer = _unmasked(values.layout) if hasattr(values, "layout") else values
    layers = [outer]
    if type(outer).__name__ == "ListOffsetArray":
        layers.append(_unmasked(outer.content))
    kind = " of ".join(type(layer).__name__ for layer in layers)
    if kind != "ListOffsetArray of NumpyArray":
        raise ValueError(
            f"{name}: awkward's {kind} given: expected a ListOffsetArray of NumpyArray; ak.to_packed copies a "
            "rearranged array into one, and ak.drop_none leaves out what is missing"
        )
    return _pair((layers[1].data, outer.offsets.data), name)


def _unmasked(layout: Any) -> Any:
    """awkward's wrapper of what could be missing but is not."""
    return layout.content if type(layout).__name__ == "UnmaskedArray" else layout


def _shown(values: NDArray[Any], offsets: NDArray[Any], name: str) -> Flat:
    """The part of the values that the offsets span."""
    if len(offsets) == 0 or offsets.dtype.kind not in "iu":
        raise ValueError(
            f"{name}: offsets are {_kind(offsets)}: expected integers, one more than there are trajectories"
        )
    offsets_N1 = offsets.astype(np.int64, copy=False)
    if offsets_N1[0] < 0 or offsets_N1[-1] > len(values) or (offsets_N1[1:] < offsets_N1[:-1]).any():
        raise ValueError(f"{name}: offsets do not rise, or not within 0 to {len(values)}, the number of values")
    if offsets_N1[0] == 0:
        return values[: offsets_N1[-1]], offsets_N1
    return values[offsets_N1[0] : offsets_N1[-1]], offsets_N1 - offsets_N1[0]


def _offsets(lengths: Sequence[int]) -> Offsets:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _kind(given: Any) -> str:
    if isinstance(given, np.ndarray | torch.Tensor):
        where = f" on {given.device}" if isinstance(given, torch.Tensor) else ""
        return f"a {given.dtype} array of shape {tuple(given.shape)}{where}"
    return f"{type(given).__module__}.{type(given).__qualname__}".removeprefix("builtins.")
