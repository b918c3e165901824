"""Make numbers from random bytes, hostile objects, and one mistake in an argument, for fuzz_inputs.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

EXTREMES = [-(2**63), -(2**31), -2, -1, 0, 1, 2, 63, 64, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1]
FLOATS = [np.nan, np.inf, -np.inf, -1.0, -0.0, 5e-324, 1e-40, 3e38, 1e39, 1e308]
DTYPES = ["i8", "i4", "u8", "u1", "?", "f4", "f8", "f2", "O", ">i8", ">f4", "c16", "M8[s]", "U3", "i8,i8"]


class Refused(ValueError):
    """Stand for a caller's own error, raised by the hostile objects below; it must come back unchanged."""


class Hostile:
    """Raise an error in every operation."""

    def refuse(self, *_: Any) -> Any:
        raise Refused

    __index__ = __int__ = __float__ = __len__ = __getitem__ = __iter__ = __eq__ = __repr__ = __call__ = refuse
    __hash__ = object.__hash__

    def __str__(self) -> str:
        return "Hostile()"


class Fleeting(tuple):
    """Iterate over copies of its items, which nothing else keeps alive."""

    def __iter__(self) -> Iterator[Any]:
        return (each.copy() if isinstance(each, np.ndarray) else each for each in super().__iter__())


class Source:
    """Turn bytes into numbers; zeros when the bytes run out."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def below(self, bound: int) -> int:
        size = ((bound - 1).bit_length() + 7) // 8
        taken = self.data[self.at : self.at + size]
        self.at += size
        return int.from_bytes(taken, "little") % bound

    def chance(self, one_in: int) -> bool:
        return self.below(one_in) == 1  # 1 and not 0, which is drawn when the bytes have run out

    def pick(self, choices: Sequence[Any]) -> Any:
        return choices[self.below(len(choices))]

    def ints(self, size: int, low: int, high: int) -> NDArray[np.int64]:
        return np.array([low + self.below(high - low + 1) for _ in range(size)], np.int64)

    def random(self) -> np.random.Generator:
        """Return a generator for choices that need no bytes of their own."""
        return np.random.default_rng(self.below(2**16))


def scalar(source: Source) -> Any:
    others = [2**63, 2**64, -(2**70), 1.5, float("nan"), None, "x", "\ud800", b"", (1.0, 1.0), (), [], True, Hostile()]
    return source.pick([*EXTREMES, *others, np.int32(3), np.float64(2.0), np.array(2), range(3), {}, len])


def hostile_array(source: Source) -> Any:
    values = np.array([source.pick(EXTREMES) for _ in range(source.below(6))], np.int64)
    return values.astype(source.pick(DTYPES))


def misaligned(array: NDArray[Any]) -> NDArray[Any]:
    moved = np.ndarray(array.shape, array.dtype, np.empty(array.nbytes + 1, np.uint8).data, offset=1)
    moved[...] = array
    return moved


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    view = array.view()
    view.flags.writeable = False
    return view


def replaced(source: Source, array: NDArray[Any]) -> NDArray[Any]:
    """Make one entry extreme, slightly wrong, or that of another place."""
    changed = array.copy()
    if changed.size and changed.dtype.kind in "iufb":
        at = np.unravel_index(source.below(changed.size), changed.shape)
        extreme = np.array(source.pick(FLOATS if changed.dtype.kind == "f" else EXTREMES)).astype(changed.dtype)
        step = np.array(source.pick([1, -1])).astype(changed.dtype)
        changed[at] = source.pick([extreme, changed[at] + step, changed[at] + step, changed.flat[0]])
    return changed


def wrong_array(source: Source, array: NDArray[Any]) -> Any:
    ways: list[Callable[[], Any]] = [
        *[lambda: replaced(source, array)] * 12,
        lambda: array[: array.size // 2],
        lambda: array[1:],
        lambda: array[:0],
        lambda: np.append(array, array[-1:]),
        lambda: array[::-1],
        lambda: array[::2],
        lambda: np.repeat(array, 2)[::2],
        lambda: np.broadcast_to(array[:1], (len(array) if array.size else 0,)),
        lambda: array.reshape(1, -1),
        lambda: array.reshape(-1, 1).T,
        lambda: np.array(array.size and array[0]),
        lambda: array.astype(array.dtype.newbyteorder()),
        lambda: misaligned(array),
        lambda: read_only(array),
        lambda: array.astype(source.pick(DTYPES)),
        lambda: array.tolist(),
        lambda: np.sort(array),
    ]
    return source.pick(ways)()


def wrong(source: Source, value: Any, named: dict[str, Any]) -> Any:
    """Return something else in place of one argument."""
    if isinstance(value, bool):  # another type would be a TypeError, as for any function
        return not value
    if source.chance(4):
        return source.pick([hostile_array(source), scalar(source), named[source.pick(sorted(named))]])
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iufb":
        return wrong_array(source, value)
    if isinstance(value, (list, tuple)) and len(value) and source.chance(2):
        members = list(value)
        at = source.below(len(members))
        members[at] = wrong(source, members[at], named)
        return type(value)(members)
    if isinstance(value, (list, tuple)):
        return source.pick([value[1:], (*value, *value[:1]), list(value), iter(value), Fleeting(value)])
    return scalar(source)
