"""Take ragged columns of any library without a copy, as numpy views of their values.

A copy is never made silently. A form that would need one is refused, and the error names the call that makes it. Lists
of lists of Python's numbers are the one form that is copied, because their values do not lie side by side anywhere.
Offsets are copied freely: they are one number per trajectory.

Legend: N trajectories of T values in all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from mgrpo import _packing

Offsets = NDArray[np.int64]
Flat = tuple[NDArray[Any], Offsets]
Values = NDArray[Any] | list[NDArray[Any]]  # one array (T,), or one array per trajectory

LOGPROBS = ("old_logprobs", "sampler_logprobs", "ref_logprobs")  # by their names in `_packing.fill`
TAKEN = (
    "a pair (values, offsets) of numpy arrays, a list of numpy arrays or of lists of numbers, a pyarrow list array, a "
    "jagged torch tensor or an awkward array"
)


@dataclass(frozen=True)
class Columns:
    """Hold N trajectories as the packer takes them.

    rows_N: how many leading tokens of each trajectory are computed, 0 for one that is left out.
    """

    tokens_T: Values
    offsets_N1: Offsets
    sampled_T: Values
    rows_N: NDArray[np.int64]
    advantages_N: NDArray[np.float64]
    weights_N: NDArray[np.float64]
    logprobs: dict[str, Values]


def columns(tokens: Any, sampled: Any, advantages: Any, weights: Any, logprobs: Mapping[str, Any]) -> Columns:
    """Return the arguments of `pack` as the packer takes them, without log-probs that are None.

    Raises ValueError if they do not describe the same trajectories.
    """
    tokens_T, offsets_N1 = ragged(tokens, "tokens")
    sampled_T = _like_tokens("sampled", sampled, offsets_N1, flags_of_lists)
    rows_N = _packing.trainable_rows(offsets_N1, sampled_T)
    weights_N = one_each("weights", weights, len(rows_N), np.float64)
    return Columns(
        tokens_T,
        offsets_N1,
        sampled_T,
        np.where(weights_N == 0, 0, rows_N),
        one_each("advantages", advantages, len(rows_N), np.float64),
        weights_N,
        {
            name: _like_tokens(name, values, offsets_N1, floats_of_lists)
            for name, values in logprobs.items()
            if values is not None
        },
    )


def _like_tokens(name: str, values: Any, offsets_N1: Offsets, of_lists: Callable[[Any, str], Flat]) -> Values:
    """Return a column that must have as many entries in each row as tokens has."""
    column, found_N1 = ragged(values, name, of_lists)
    if len(found_N1) != len(offsets_N1):
        raise ValueError(f"{name}: {len(found_N1) - 1} rows given: expected {len(offsets_N1) - 1}, as tokens has")
    if (found_N1 != offsets_N1).any():
        row = int(np.flatnonzero(np.diff(found_N1) != np.diff(offsets_N1))[0])
        lengths = (int(np.diff(o)[row]) for o in (found_N1, offsets_N1))
        raise ValueError("{}: row {} has {} entries: expected {}, as tokens has".format(name, row, *lengths))
    return column


def one_each(name: str, values: Any, count: int, dtype: Any = None) -> NDArray[Any]:
    """Return an array of one number per trajectory. Raises ValueError, naming it, if it has another shape."""
    found_N = np.asarray(values, dtype)
    if found_N.shape != (count,):
        raise ValueError(
            f"{name}: an array of shape {found_N.shape} given: expected ({count},), one for each trajectory"
        )
    return found_N


def integers(name: str, values: Any) -> NDArray[np.int64]:
    """Return a one-dimensional array of int64. Raises ValueError, naming it, for anything else, such as floats."""
    found = np.asarray(values)
    if found.ndim != 1 or (found.dtype.kind not in "iu" and len(found)):
        raise ValueError(f"{name}: {found.dtype} of shape {found.shape} given: expected integers, in one dimension")
    return found.astype(np.int64)


def ints_of_lists(values: list[Any], name: str) -> Flat:
    """Copy lists of int to int64. Raises ValueError, naming `name`, for anything else in them."""
    try:
        return _packing.from_lists(values)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def flags_of_lists(values: list[Any], name: str) -> Flat:
    """Copy lists of bool, or of 0 and 1, to bool. Raises ValueError, naming `name`, for anything else in them."""
    flags, offsets_N1 = _one_run(values, name, "True, False, 0 or 1", (bool, int, np.bool_, np.integer))
    if not {0, 1}.issuperset(flags):
        n, i = _first(values, lambda flag: flag not in (0, 1))
        raise ValueError(f"{name}[{n}][{i}]: {values[n][i]!r} given: expected True, False, 0 or 1")
    return np.array(flags, bool), offsets_N1


def floats_of_lists(values: list[Any], name: str) -> Flat:
    """Copy lists of float or int to float32. Raises ValueError, naming `name`, for anything else in them."""
    numbers, offsets_N1 = _one_run(values, name, "a number", (float, int, np.floating, np.integer), no=bool)
    return np.array(numbers, np.float32), offsets_N1


def _one_run(
    values: list[Any], name: str, expected: str, kinds: tuple[type, ...], no: type | None = None
) -> tuple[list[Any], Offsets]:
    """Return all entries of lists (or tuples) in one list, and offsets. no: a type to refuse although `kinds` has it.

    Raises ValueError, naming `name` and the place, for an entry of another type.
    """
    for n, row in enumerate(values):
        if not isinstance(row, list | tuple):
            raise ValueError(f"{name}[{n}]: {_kind(row)} given: expected a list or tuple, as [0] is")
    entries = list(chain.from_iterable(values))
    wrong = {kind for kind in set(map(type, entries)) if kind is no or not issubclass(kind, kinds)}
    if wrong:
        n, i = _first(values, lambda entry: type(entry) in wrong)
        raise ValueError(f"{name}[{n}][{i}]: {_kind(values[n][i])} given: expected {expected}")
    return entries, _offsets(list(map(len, values)))


def _first(values: list[Any], odd: Callable[[Any], bool]) -> tuple[int, int]:
    """Return the row and the place in it of the first entry that is odd; there must be one."""
    return next((n, i) for n, row in enumerate(values) for i, entry in enumerate(row) if odd(entry))


def ragged(
    values: Any, name: str = "values", of_lists: Callable[[Any, str], Flat] = ints_of_lists
) -> tuple[Values, Offsets]:
    """Return ragged values as (values_T, offsets_N1), not copied.

    Trajectory n is values_T[offsets_N1[n]:offsets_N1[n + 1]]. values is one of:
    * a tuple (values_T, offsets_N1) of one-dimensional numpy arrays, offsets of any integer dtype, not falling;
    * a list of N one-dimensional numpy arrays, which stays a list, as `_packing.fill` takes it;
    * a list of N lists (or tuples), which `of_lists` copies: for tokens of int, to int64;
    * a pyarrow ListArray or LargeListArray of numbers, also a slice of one, or a ChunkedArray of at most one chunk;
    * a nested torch tensor of layout torch.jagged on a CPU, of two dimensions and without holes;
    * an awkward array of type N * var * number that is stored as one run (a ListOffsetArray).

    offsets_N1 is int64 and begins at 0: for a slice, values_T is the part that it shows.
    Raises ValueError, naming `name`, for a null (with its row), for a form that needs a copy, and for anything else.
    """
    if isinstance(values, tuple):
        return _pair(values, name)
    if isinstance(values, list):
        return _list(values, name, of_lists)
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


def _list(values: list[Any], name: str, of_lists: Callable[[Any, str], Flat]) -> tuple[Values, Offsets]:
    if values and not isinstance(values[0], np.ndarray):
        return of_lists(values, name)
    for n, each in enumerate(values):
        if not isinstance(each, np.ndarray) or each.ndim != 1:
            raise ValueError(f"{name}[{n}]: {_kind(each)} given: expected a one-dimensional numpy array, as [0] is")
    return values, _offsets(list(map(len, values)))


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
    except TypeError as error:  # bfloat16 and float8
        raise ValueError(f"{name}: {values.dtype} given: expected a dtype that numpy has") from error
    return _shown(flat_T, values.offsets().numpy(), name)


def _awkward(values: Any, name: str) -> Flat:
    """Recognise awkward's classes by their names, so that awkward is not imported where it is not used."""
    outer = _unmasked(values.layout) if hasattr(values, "layout") else values
    layers = [outer]
    if type(outer).__name__ == "ListOffsetArray":
        layers.append(_unmasked(outer.content))
    kind = " of ".join(type(layer).__name__ for layer in layers)
    if kind != "ListOffsetArray of NumpyArray":
        raise ValueError(
            f"{name}: awkward's {kind} given: expected a ListOffsetArray of NumpyArray; ak.to_packed copies a "
            "rearranged array into one, and ak.drop_none leaves out missing values"
        )
    return _pair((layers[1].data, outer.offsets.data), name)


def _unmasked(layout: Any) -> Any:
    """Unwrap a layout whose values could be missing but are not."""
    return layout.content if type(layout).__name__ == "UnmaskedArray" else layout


def _shown(values: NDArray[Any], offsets: NDArray[Any], name: str) -> Flat:
    """Return the part of the values that the offsets span, with offsets from 0."""
    if len(offsets) == 0 or offsets.dtype.kind not in "iu":
        raise ValueError(
            f"{name}: offsets are {_kind(offsets)}: expected integers, one more than there are trajectories"
        )
    offsets_N1 = offsets.astype(np.int64, copy=False)
    if offsets_N1[0] < 0 or offsets_N1[-1] > len(values) or (offsets_N1[1:] < offsets_N1[:-1]).any():
        raise ValueError(f"{name}: offsets fall, or leave the range from 0 to {len(values)}, the number of values")
    if offsets_N1[0] == 0:
        return values[: offsets_N1[-1]], offsets_N1
    return values[offsets_N1[0] : offsets_N1[-1]], offsets_N1 - offsets_N1[0]


def _offsets(lengths: Sequence[int]) -> Offsets:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _kind(given: Any) -> str:
    """Describe a value for an error message."""
    if isinstance(given, np.ndarray | torch.Tensor):
        where = f" on {given.device}" if isinstance(given, torch.Tensor) else ""
        return f"a {given.dtype} array of shape {tuple(given.shape)}{where}"
    return f"{type(given).__module__}.{type(given).__qualname__}".removeprefix("builtins.")
