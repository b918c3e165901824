"""Compare from_lists with tests/support/naive_packing.py, and test what it refuses."""

from __future__ import annotations

import enum
import sys
from collections import namedtuple
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import naive_packing as naive
from mgrpo import _packing as packing

tokens = st.one_of(st.integers(0, 300), st.integers(-(2**63), 2**63 - 1))


@given(st.lists(st.one_of(st.lists(tokens), st.lists(tokens).map(tuple))))
def test_from_lists_is_the_naive_one(lists):
    for given_as in (lists, tuple(lists)):
        values_T, offsets_N1 = packing.from_lists(given_as)
        assert values_T.dtype == offsets_N1.dtype == np.int64
        assert (values_T.tolist(), offsets_N1.tolist()) == naive.from_lists(lists)


def test_a_list_within_itself_is_no_int():
    lists: list[Any] = [[1]]
    lists.append(lists)
    with pytest.raises(ValueError, match=r"lists\[1\]\[0\] must be an int, got list"):
        packing.from_lists(lists)


def test_a_subclass_is_read_as_the_list_that_it_is():
    """Check that none of its code runs: it could change what is being read."""

    class Other(list):
        def forbidden(self, *_):
            raise AssertionError("was called")

        __iter__ = __getitem__ = __len__ = forbidden  # type: ignore[assignment]

    pair = namedtuple("pair", "a b")
    values_T, offsets_N1 = packing.from_lists(Other([Other([1, 2]), pair(3, 4)]))
    assert (values_T.tolist(), offsets_N1.tolist()) == ([1, 2, 3, 4], [0, 2, 4])


def test_the_reference_counts_stay_as_they_are():
    token = 123_456_789
    inner = [1, 2, token]
    wrong: Any = [inner, [token, None]]
    before = sys.getrefcount(token), sys.getrefcount(inner)
    packing.from_lists([inner, inner])
    with pytest.raises(ValueError, match="must be an int"):
        packing.from_lists(wrong)
    assert (sys.getrefcount(token), sys.getrefcount(inner)) == before


class Odd(int):
    """Stand for an integer of another type, which may run its own code when it is converted."""

    def __index__(self) -> int:
        raise AssertionError("was called")


Color = enum.IntEnum("Color", "RED")

MISTAKES = [
    (None, r"lists must be a list or tuple of lists, got NoneType"),
    ({1: 2}, r"lists must be a list or tuple of lists, got dict"),
    (np.ones((2, 2), np.int64), r"lists must be a list or tuple of lists, got numpy\.ndarray"),
    ((each for each in [[1]]), r"lists must be a list or tuple of lists, got generator"),
    ([[1], 2], r"lists\[1\] must be a list or tuple of int, got int"),
    ([[1], "ab"], r"lists\[1\] must be a list or tuple of int, got str"),
    ([[1], b"ab"], r"lists\[1\] must be a list or tuple of int, got bytes"),
    ([[1], None], r"lists\[1\] must be a list or tuple of int, got NoneType"),
    ([[1], np.ones(2, np.int64)], r"lists\[1\] must be a list or tuple of int, got numpy\.ndarray"),
    ([[1], [2, True]], r"lists\[1\]\[1\] must be an int, got bool"),
    ([[1, 2.0]], r"lists\[0\]\[1\] must be an int, got float"),
    ([["1"]], r"lists\[0\]\[0\] must be an int, got str"),
    ([[[1]]], r"lists\[0\]\[0\] must be an int, got list"),
    ([[1], [], [None]], r"lists\[2\]\[0\] must be an int, got NoneType"),
    ([[np.int64(1)]], r"lists\[0\]\[0\] must be an int, got numpy\.int64"),
    ([[Odd(1)]], r"lists\[0\]\[0\] must be an int, got Odd"),
    ([[Color.RED]], r"lists\[0\]\[0\] must be an int, got Color"),
    ([[0, 2**63]], r"lists\[0\]\[1\] does not fit in int64"),
    ([[-(2**63) - 1]], r"lists\[0\]\[0\] does not fit in int64"),
    ([[-(10**5000)]], r"lists\[0\]\[0\] does not fit in int64"),
]


@pytest.mark.parametrize(("lists", "message"), MISTAKES, ids=[message[:60] for _, message in MISTAKES])
def test_mistakes_are_named(lists, message):
    with pytest.raises(ValueError, match=message):
        packing.from_lists(lists)
