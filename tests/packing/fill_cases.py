"""Make batches for the tests of `fill`, in every form of their columns, and compare results."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mgrpo import _packing as packing

Filled = dict[str, Any]
Batch = dict[str, Any]  # the arguments of naive_packing.fill


def ints(values: Any) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def offsets_of(lists: list[list[Any]]) -> NDArray[np.int64]:
    return np.cumsum([0, *map(len, lists)], dtype=np.int64)


def assert_same(filled: Filled, expected: Filled) -> None:
    """Check that results are equal to the bit, including their types."""
    assert filled.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, np.ndarray):
            assert filled[key].dtype == value.dtype, key
            np.testing.assert_array_equal(filled[key], value, key)
        else:
            assert type(filled[key]) is type(value) and filled[key] == value, key


def snapshot(filled: Filled) -> Filled:
    return {key: value.copy() if isinstance(value, np.ndarray) else value for key, value in filled.items()}


Form = Callable[[NDArray[Any], NDArray[np.int64]], Any]


def flat(column_T: NDArray[Any], _: NDArray[np.int64]) -> NDArray[Any]:
    return column_T


def split(column_T: NDArray[Any], offsets_N1: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Split a column into one array per trajectory, each in its own memory."""
    return [column_T[a:b].copy() for a, b in itertools.pairwise(offsets_N1)]


def fill(batch: Batch, form: Form = flat, **options: Any) -> Any:
    """Call packing.fill with the columns in a form, and its further options."""
    columns = {name: form(batch[name], batch["offsets"]) for name in ("tokens", "sampled")}
    logprobs = {f"{name}_T": form(values, batch["offsets"]) for name, values in batch["logprobs"].items()}
    rest = [batch[name] for name in ("ids", "rows", "advantages", "weights")]
    options |= {name: batch[name] for name in ("live", "narrow")}
    return packing.fill(columns["tokens"], batch["offsets"], columns["sampled"], *rest, **logprobs, **options)


def one(rows: int, value: int, arena: Any = None) -> Filled:
    """Make a batch of one trajectory, with `value` everywhere."""
    columns = (np.full(rows + 1, value, np.int32), ints([0, rows + 1]), np.ones(rows + 1, np.bool_))
    return packing.fill(*columns, ints([0]), ints([rows]), np.full(1, float(value)), np.ones(1), arena=arena)


def large(lengths: NDArray[np.int64]) -> Batch:
    """Make trajectories of these lengths in any order; half of the tokens are sampled, a third have no advantage."""
    random = np.random.default_rng(5)
    count, total = len(lengths), int(lengths.sum())
    return {
        "tokens": random.integers(0, 150_000, total, np.int32),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]),
        "sampled": random.random(total) < 0.5,
        "ids": random.permutation(count),
        "rows": lengths - 1,
        "advantages": random.integers(-1, 2, count).astype(np.float64),
        "weights": random.random(count),
        "logprobs": {"old_logprobs": random.normal(size=total).astype(np.float32)},
        "live": "advantage",
        "narrow": False,
    }


def ragged_lengths() -> NDArray[np.int64]:
    """Make some 600,000 rows whose pieces end within sequences: one long sequence, some without rows, many short."""
    return ints([300_000, 2, 1, *np.random.default_rng(6).integers(1, 700, 900), 1, 1])
