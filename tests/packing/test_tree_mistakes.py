"""Test prefix trees with every mistake of a caller: a ValueError names it, and nothing crashes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cases.tree import ints
from mgrpo import _packing as packing


def bad_plan(**changes: Any) -> Callable[[], Any]:
    named = {"tokens": ints([1, 2, 3, 4, 5]), "offsets": ints([0, 2, 5]), "rows": ints([2, 3]), "cap": 9} | changes
    return lambda: packing.tree_plan(*named.values())


def bad_fill(**changes: Any) -> Callable[[], Any]:
    columns = {
        "tokens": ints([1, 2, 1, 2, 3]),
        "offsets": ints([0, 2, 5]),
        "sampled": np.ones(5, np.bool_),
        "ids": ints([0, 1]),
        "shared": ints([0, 2]),
        "rows": ints([2, 3]),
        "advantages": np.ones(2),
        "weights": np.ones(2),
    }
    named = {key: value for key, value in changes.items() if key not in columns}
    return lambda: packing.tree_fill(*(columns | {k: v for k, v in changes.items() if k in columns}).values(), **named)


MISTAKES = [
    (bad_plan(tokens=np.ones(5)), r"tokens must be a .* array of int32 or int64, got a float64"),
    (bad_plan(tokens=ints([1, 2])), r"offsets ends at 5, expected the 2 tokens"),
    (bad_plan(tokens=np.arange(10)[::2]), r"tokens must be .* not contiguous"),
    (bad_plan(offsets=ints([])), r"offsets is empty"),
    (bad_plan(offsets=ints([1, 2, 5])), r"offsets\[0\] is 1, expected 0"),
    (bad_plan(offsets=ints([0, -2, 5])), r"offsets\[1\] is -2, below offsets\[0\] = 0"),
    (bad_plan(offsets=ints([0, 2, 2**63 - 1])), r"offsets ends at 9223372036854775807, expected the 5 tokens"),
    (bad_plan(offsets=[0, 2, 5]), r"offsets must be a .* array of int64, got <class 'list'>"),
    (bad_plan(rows=ints([2])), r"rows has 1 entries, expected one for each of the 2 trajectories"),
    (bad_plan(rows=ints([0, 3])), r"rows\[0\] is 0, expected from 1 to the trajectory's 2 tokens"),
    (bad_plan(rows=ints([2, 4])), r"rows\[1\] is 4, expected from 1 to the trajectory's 3 tokens"),
    (bad_plan(offsets=ints([0, 0, 5])), r"rows\[0\] is 2, expected from 1 to the trajectory's 0 tokens"),
    (bad_plan(cap=2), r"rows\[1\] is 3, more than cap 2"),
    (bad_plan(cap=0), r"cap must be at least 1, got 0"),
    (bad_plan(cap=2**63), r"cap must be a 64-bit integer, got 9223372036854775808"),
    (bad_plan(groups=ints([1])), r"groups has 1 entries, expected one for each of the 2"),
    (bad_plan(groups=ints([])), r"groups has 0 entries, expected one for each of the 2"),
    (bad_plan(groups=np.ones(2)), r"groups must be a .* array of int64, got a float64"),
    (bad_fill(tokens=ints([1])), r"sampled has 5 entries, expected one for each of the 1 tokens"),
    (bad_fill(sampled=np.ones(4, np.bool_)), r"sampled has 4 entries, expected one for each of the 5 tokens"),
    (bad_fill(sampled=np.ones(5)), r"sampled must be a .* array of bool or uint8, got a float64"),
    (bad_fill(offsets=ints([])), r"offsets is empty"),
    (bad_fill(offsets=ints([0, 2, 6])), r"offsets\[1\] and offsets\[2\] are 2 and 6, expected .* the 5 tokens"),
    (bad_fill(offsets=ints([-1, 2, 5])), r"offsets\[0\] and offsets\[1\] are -1 and 2"),
    (bad_fill(offsets=ints([0, 2, -(2**63)])), r"offsets\[1\] and offsets\[2\] are 2 and -9223372036854775808"),
    (bad_fill(ids=ints([0, 2])), r"ids\[1\] is 2, expected from 0 to below 2"),
    (bad_fill(ids=ints([-1, 0])), r"ids\[0\] is -1, expected from 0 to below 2"),
    (bad_fill(shared=ints([0])), r"shared has 1 entries, expected one for each of the 2 ids"),
    (bad_fill(shared=ints([1, 2])), r"shared\[0\] is 1, expected 0"),
    (bad_fill(shared=ints([0, 3])), r"shared\[1\] is 3, expected from 0 to the 2 rows of trajectories 0 and 1"),
    (bad_fill(shared=ints([0, -1])), r"shared\[1\] is -1, expected from 0"),
    (bad_fill(tokens=ints([1, 2, 1, 7, 3])), r"shared\[1\] is 2, but trajectories 0 and 1 part after 1 tokens"),
    (bad_fill(rows=ints([2, 4])), r"rows\[1\] is 4, expected from 1 to the trajectory's 3 tokens"),
    (bad_fill(advantages=np.array([np.nan, 1])), r"advantages\[0\] is nan, expected a finite float32"),
    (bad_fill(advantages=np.ones(2, np.float16)), r"advantages must be .* of float64 or float32, got a float16"),
    (bad_fill(weights=ints([1, 1])), r"weights must be a .* array of float64 or float32, got a int64"),
    (bad_fill(weights=np.array([1, np.nan])), r"weights\[1\] is nan, expected a finite float32"),
    (bad_fill(weights=np.array([3e38, 3e38])), r"that trajectories share sum to 6e\+38, expected a finite float32"),
    (bad_fill(weights=np.array([1, 1e39])), r"weights\[1\] is 1e\+39, expected a finite float32"),
    (bad_fill(weights=np.array([1, -0.5])), r"weights\[1\] is -0.5, expected at least 0"),
    (bad_fill(weights=np.ones(3)), r"weights has 3 entries, expected one for each of the 2 trajectories"),
    (bad_fill(old_logprobs_T=np.ones(5)), r"old_logprobs must be a .* array of float32, got a float64"),
    (bad_fill(ref_logprobs_T=np.ones(4, np.float32)), r"ref_logprobs has 4 entries, .* each of the 5 tokens"),
    (bad_fill(bins_M1=ints([])), r"bins is empty, expected one entry more than there are micro-batches"),
    (bad_fill(bins_M1=ints([1, 2])), r"bins\[0\] is 1, expected 0"),
    (bad_fill(bins_M1=ints([0, 2, 1, 2])), r"bins\[2\] is 1, below bins\[1\] = 2"),
    (bad_fill(bins_M1=ints([0, 1])), r"bins ends at 1, expected the 2 entries that ids has"),
    (bad_fill(bins_M1=ints([0, 3])), r"bins ends at 3, expected the 2 entries that ids has"),
    (bad_fill(bins_M1=ints([0, 2]), shared=ints([0])), r"shared has 1 entries, expected one for each of the 2 ids"),
    (bad_fill(bins_M1=ints([0, 1, 2])), r"shared\[1\] is 2, expected 0: there is no trajectory before it in its micr"),
    (bad_fill(bins_M1=[0, 2]), r"bins must be a .* array of int64, got <class 'list'>"),
    (bad_fill(bins_M1=np.zeros(2)), r"bins must be a .* array of int64, got a float64"),
    (bad_fill(arena=3), r"arena must be an Arena or None, got <class 'int'>"),
    (bad_fill(arena=packing.Arena(lambda size: bytearray(1))), r"allocate returned a buffer of 1 bytes, expected at l"),
    (bad_fill(threads=-1), r"threads must be from 0 to 1024, got -1"),
    (bad_fill(threads=1025), r"threads must be from 0 to 1024, got 1025"),
    (bad_fill(threads=None), r"threads must be a 64-bit integer, got None"),
    (bad_plan(rows=np.frombuffer(bytes(17), np.uint8)[1:].view(np.int64)), r"rows must be a one-dimensional contig"),
]


@pytest.mark.parametrize(("call", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_fill_counts_in_int32():
    """Use 512 copies of a long trajectory: unshared they have too many tokens for int32; sharing all, they fit."""
    length, copies = 2**22, 2**9
    columns = (np.zeros(length, np.int32), ints([0, length]), np.zeros(length, np.bool_), np.zeros(copies, np.int64))
    with pytest.raises(ValueError, match=r"ids\[511\] = 0 brings the batch to 2143289344 \+ 4194304 tokens"):
        packing.tree_fill(*columns, np.zeros(copies, np.int64), ints([length]), np.ones(1), np.ones(1))


EXTREMES = [-(2**63), -1, 0, 1, 2, 3, 7, 2**31, 2**63 - 1]
scalars = st.sampled_from([*EXTREMES, 2**64, 1.5, float("nan"), None, "x", True])
dtypes = st.sampled_from([np.int64, np.int64, np.int64, np.int32, np.bool_, np.uint8, np.float32, np.float64])
arrays = st.builds(
    lambda values, dtype: np.array(values, np.int64).astype(dtype),
    st.lists(st.sampled_from(EXTREMES), max_size=4),
    dtypes,
)


@settings(max_examples=300)
@given(st.sampled_from([(packing.tree_plan, 5), (packing.tree_fill, 8)]), st.data())
def test_hostile_arguments_are_refused(function, data):
    """Check that any arguments lead to a result or a Python error, never to a crash."""
    call, arity = function
    arguments = data.draw(st.lists(st.one_of(arrays, arrays, scalars), min_size=arity, max_size=arity))
    try:
        call(*arguments)
    except (ValueError, TypeError):
        return


@settings(max_examples=300)
@given(st.data())
def test_hostile_numbers_are_refused(data):
    """Check the same with every dtype right, so that the numbers are checked."""

    def column(size: int, values: Any = EXTREMES) -> NDArray[np.int64]:
        return ints(data.draw(st.lists(st.sampled_from(values), min_size=size, max_size=size)))

    tokens, offsets, small = column(4, [0, 1]), column(3, [0, 0, 1, 2, 4, *EXTREMES]), [0, 1, 1, 2, 2, 3, *EXTREMES]
    rows, ids = column(2, small), column(3, small)
    for call in (
        lambda: packing.tree_plan(tokens, offsets, rows, 3),
        lambda: packing.tree_fill(tokens, offsets, tokens == 1, ids, column(3, small), rows, np.ones(2), np.ones(2)),
    ):
        try:
            call()
        except ValueError:
            continue
