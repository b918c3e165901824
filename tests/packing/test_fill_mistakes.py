"""Test trainable_rows and fill with every mistake of a caller: a ValueError names it, and nothing crashes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fill_cases import assert_same, fill, ints, large
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import naive_packing as naive
from mgrpo import _packing as packing


def bad_rows(**changes: Any) -> Callable[[], Any]:
    named = {"offsets": ints([0, 2, 4]), "sampled": np.ones(4, np.bool_)} | changes
    return lambda: packing.trainable_rows(*named.values())


def bad_fill(**changes: Any) -> Callable[[], Any]:
    columns = {
        "tokens": ints([1, 2, 3, 4, 5]),
        "offsets": ints([0, 2, 5]),
        "sampled": np.ones(5, np.bool_),
        "ids": ints([1, 0]),
        "rows": ints([1, 2]),
        "advantages": np.ones(2),
        "weights": np.ones(2),
    }
    named = {key: value for key, value in changes.items() if key not in columns}
    return lambda: packing.fill(*(columns | {k: v for k, v in changes.items() if k in columns}).values(), **named)


def misaligned() -> NDArray[np.int64]:
    return np.frombuffer(bytes(41), np.uint8)[1:].view(np.int64)


HUGE = np.broadcast_to(np.int64(0), 2**31)  # takes no memory: every entry is the same
HALVES = [ints([1, 2]), ints([3, 4, 5])]

MISTAKES = [
    (bad_rows(offsets=ints([])), r"offsets is empty"),
    (bad_rows(offsets=ints([1, 4])), r"offsets\[0\] is 1, expected 0"),
    (bad_rows(offsets=ints([0, 3, 2, 4])), r"offsets\[2\] is 2, below offsets\[1\] = 3"),
    (bad_rows(offsets=ints([0, -3])), r"offsets\[1\] is -3, below offsets\[0\] = 0"),
    (bad_rows(offsets=ints([0, 2**62])), r"sampled has 4 entries, expected 4611686018427387904, where offsets ends"),
    (bad_rows(offsets=ints([0, 3])), r"sampled has 4 entries, expected 3, where offsets ends"),
    (bad_rows(sampled=np.ones(4)), r"sampled must be a .* array of bool or uint8, got a float64"),
    (bad_rows(sampled=[np.ones(2, np.bool_)]), r"sampled has 1 entries, expected one for each of the 2 trajectories"),
    (bad_rows(sampled=[np.ones(2, np.bool_), np.ones(3, np.bool_)]), r"sampled\[1\] has 3 entries, expected the 2"),
    (bad_rows(sampled=[np.ones(2, np.bool_), [True, True]]), r"sampled\[1\] must be .*, got <class 'list'>"),
    (bad_fill(tokens=np.ones(5)), r"tokens must be a .* array of int32 or int64, all alike, got a float64"),
    (bad_fill(tokens=misaligned()), r"tokens must be .* got a int64 array of shape \(5,\), not aligned"),
    (bad_fill(tokens=np.array(5)), r"tokens must be a one-dimensional .* got a int64 array of shape \(\)"),
    (bad_fill(tokens=np.ones((5, 1), np.int64)), r"tokens must be a one-dimensional .* array of shape \(5, 1\)"),
    (bad_fill(tokens=np.broadcast_to(np.int64(1), 5)), r"tokens must be .* not contiguous"),
    (bad_fill(tokens=np.ones(5, np.uint64)), r"tokens must be .* got a uint64 array"),
    (bad_fill(tokens=np.ones(5, "M8[s]")), r"tokens must be .* got a datetime64\[s\] array"),
    (bad_fill(tokens=range(5)), r"tokens must be .*, got <class 'range'>"),
    (bad_fill(tokens=ints([1, 2, 3, 4, 5])[::-1]), r"tokens must be .* not contiguous"),
    (bad_fill(tokens=np.ones(5, ">i8")), r"tokens must be .* got a >i8 array"),
    (bad_fill(tokens=ints([1])), r"tokens has 1 entries, expected 5, where offsets ends"),
    (bad_fill(tokens=[ints([1, 2]), ints([3])]), r"tokens\[1\] has 1 entries, expected the 3 tokens that offsets"),
    (bad_fill(tokens=[HALVES[0], HALVES[1].astype(np.int32)]), r"tokens\[1\] must be .* all alike, got a int32"),
    (bad_fill(tokens=[HALVES[0].astype(np.int32), HALVES[1]]), r"tokens\[1\] must be .* int32, as the first is, got"),
    (bad_fill(tokens=[HALVES[0], HALVES[1][::-1]]), r"tokens\[1\] must be .* not contiguous"),
    (bad_fill(offsets=ints([0, 6, 5])), r"offsets\[2\] is 5, below offsets\[1\] = 6"),
    (bad_fill(offsets=ints([0, 2, 6])), r"sampled has 5 entries, expected 6, where offsets ends"),
    (bad_fill(offsets=ints([0, 2, 2**63 - 1])), r"sampled has 5 entries, expected 9223372036854775807, where"),
    (
        bad_fill(offsets=ints([0, 2**63 - 1, -(2**63)])),
        r"offsets\[2\] is -9223372036854775808, below",
    ),
    (bad_fill(offsets=ints([0, 5])), r"rows has 2 entries, expected one for each of the 1 trajectories"),
    (bad_fill(offsets=ints([0, 5]).astype(np.int32)), r"offsets must be .* of int64, got a int32 array"),
    (bad_fill(ids=ints([0, 2])), r"ids\[1\] is 2, expected from 0 to below 2"),
    (bad_fill(ids=ints([-1])), r"ids\[0\] is -1, expected from 0 to below 2"),
    (bad_fill(ids=ints([0, 2**63 - 1])), r"ids\[1\] is 9223372036854775807, expected from 0 to below 2"),
    (bad_fill(ids=HUGE), r"ids must be .* not contiguous"),
    (bad_fill(rows=ints([1, 3])), r"rows\[1\] is 3, expected from 0 to below the trajectory's 3 tokens"),
    (bad_fill(rows=ints([-1, 2])), r"rows\[0\] is -1, expected from 0 to below the trajectory's 2 tokens"),
    (bad_fill(offsets=ints([0, 0, 5])), r"rows\[0\] is 1, expected from 0 to below the trajectory's 0 tokens"),
    (bad_fill(advantages=np.ones(1)), r"advantages has 1 entries, expected one for each of the 2 trajectories"),
    (bad_fill(advantages=np.array([np.nan, 1])), r"advantages\[0\] is nan, expected a finite float32"),
    (bad_fill(weights=np.array([1, 1e39])), r"weights\[1\] is 1e\+39, expected a finite float32"),
    (bad_fill(weights=np.ones(2, np.float16)), r"weights must be a .* array of float64 or float32, got a float16"),
    (bad_fill(old_logprobs_T=np.ones(5)), r"old_logprobs must be a .* array of float32, got a float64"),
    (bad_fill(ref_logprobs_T=np.ones(4, np.float32)), r"ref_logprobs has 4 entries, expected 5, where offsets ends"),
    (bad_fill(bins_M1=ints([])), r"bins is empty"),
    (bad_fill(bins_M1=ints([0, 2, 1, 2])), r"bins\[2\] is 1, below bins\[1\] = 2"),
    (bad_fill(bins_M1=ints([0, 3])), r"bins ends at 3, expected the 2 entries that ids has"),
    (bad_fill(bins_M1=ints([1, 2])), r"bins\[0\] is 1, expected 0"),
    (bad_fill(bins_M1=ints([0, 2**63 - 1])), r"bins ends at 9223372036854775807, expected the 2 entries that ids has"),
    (bad_fill(bins_M1=[0, 2]), r"bins must be .*, got <class 'list'>"),
    (bad_fill(live="loss"), r"live must be 'weight', 'advantage' or None, got 'loss'"),
    (bad_fill(live=np.zeros(2, "i8,i8")), r"live must be 'weight', 'advantage' or None, got array"),
    (bad_fill(live=0), r"live must be 'weight', 'advantage' or None, got 0"),
    (bad_fill(narrow=True), r"narrow needs tokens of int32, got int64"),
    (bad_fill(arena=3), r"arena must be an Arena or None, got <class 'int'>"),
    (bad_fill(threads=-1), r"threads must be from 0 to 1024, got -1"),
    (bad_fill(threads=1025), r"threads must be from 0 to 1024, got 1025"),
    (bad_fill(threads=10**9), r"threads must be from 0 to 1024, got 1000000000"),
    (bad_fill(threads=1.5), r"threads must be a 64-bit integer, got 1.5"),
    (bad_fill(threads=None), r"threads must be a 64-bit integer, got None"),
    (bad_fill(threads=2**70), r"threads must be a 64-bit integer"),
]


@pytest.mark.parametrize(("call", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def repeated(times: int, **options: Any) -> Any:
    """Repeat the same 2**22 rows so often that the call is refused before any memory is allocated."""
    length = 2**22 + 1
    columns = (np.zeros(length, np.int32), ints([0, length]), np.ones(length, np.bool_), np.zeros(times, np.int64))
    return packing.fill(*columns, ints([length - 1]), np.ones(1), np.ones(1), **options)


def test_fill_counts_the_rows_of_a_micro_batch_in_int32():
    with pytest.raises(ValueError, match=r"ids\[511\] = 0 brings the batch to 2143289344 \+ 4194304 rows"):
        repeated(512)


def test_fill_counts_all_rows_below_the_limit():
    with pytest.raises(ValueError, match=r"micro-batch 32 brings all of them to \d+ rows, expected below 68719476736"):
        repeated(40 * 511, bins_M1=np.arange(0, 41 * 511, 511))


EXTREMES = [-(2**63), -1, 0, 1, 2, 3, 7, 2**31, 2**63 - 1]
scalars = st.sampled_from([*EXTREMES, 2**64, 1.5, float("nan"), None, "x", "weight", (1.0, 1.0), True, []])
dtypes = st.sampled_from([np.int64, np.int64, np.int32, np.bool_, np.uint8, np.float32, np.float64, ">i4", "O"])
arrays = st.builds(
    lambda values, dtype, step: np.array(values, np.int64).astype(dtype)[::step],
    st.lists(st.sampled_from(EXTREMES), max_size=4),
    dtypes,
    st.sampled_from([1, 1, 1, -1, 2]),
)
anything = st.one_of(arrays, arrays, scalars, st.lists(st.one_of(arrays, scalars), max_size=3))
OPTIONS = ["old_logprobs_T", "bins_M1", "live", "narrow", "arena", "threads"]


@settings(max_examples=500)
@given(st.sampled_from([(packing.trainable_rows, 2), (packing.fill, 7), (packing.from_lists, 1)]), st.data())
def test_hostile_arguments_are_refused(function, data):
    """Check that any arguments lead to a result or a Python error, never to a crash."""
    call, arity = function
    arguments = data.draw(st.lists(anything, min_size=arity, max_size=arity))
    options = data.draw(st.dictionaries(st.sampled_from(OPTIONS), anything, max_size=2)) if call is packing.fill else {}
    try:
        call(*arguments, **options)
    except (ValueError, TypeError):
        return


def column(size: int, usual: int) -> st.SearchStrategy[NDArray[np.int64]]:
    """Draw mostly small numbers, and some extreme ones."""
    number = st.one_of(st.integers(0, usual), st.integers(0, usual), st.sampled_from(EXTREMES))
    return st.lists(number, min_size=size, max_size=size).map(ints)


@settings(max_examples=500)
@given(st.data())
def test_hostile_numbers_are_refused_or_filled_right(data):
    small = st.integers(0, 4)
    batch = large(ints([3, 4])) | {
        "offsets": data.draw(column(3, 7).map(np.sort)),
        "ids": data.draw(small.flatmap(lambda size: column(size, 1))),
        "rows": data.draw(column(2, 3)),
        "live": None,
    }
    bins_M1 = data.draw(small.flatmap(lambda size: column(size, 4)))
    try:
        filled = fill(batch, bins_M1=bins_M1)
    except ValueError:
        return
    for made, (a, b) in zip(filled, itertools.pairwise(bins_M1), strict=True):
        expected = naive.fill(**batch | {"ids": batch["ids"][a:b]})
        assert_same(made, expected | {"weight_sum": made["weight_sum"]})
