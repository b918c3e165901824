"""ragged: every library's ragged arrays as numpy views of the same memory, and what is refused."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mgrpo.engine.batch.ragged import columns, flags_of_lists, floats_of_lists, ragged

try:
    import awkward as ak
except ImportError:
    ak = None

needs_awkward = pytest.mark.skipif(ak is None, reason="awkward is not installed")

lists = st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5), max_size=6)
dtypes = st.sampled_from([np.int32, np.int64, np.uint8, np.float32])


def seen(values: Any, offsets_N1: Any) -> list[list[Any]]:
    """Return the rows as lists, after checking the offsets."""
    assert offsets_N1.dtype == np.int64 and offsets_N1[0] == 0 and (np.diff(offsets_N1) >= 0).all()
    if isinstance(values, list):
        assert [len(each) for each in values] == np.diff(offsets_N1).tolist()
        return [each.tolist() for each in values]
    assert values.ndim == 1 and len(values) == offsets_N1[-1]
    return [values[a:b].tolist() for a, b in itertools.pairwise(offsets_N1)]


def flat(given: list[list[int]], dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    values = np.array(list(itertools.chain(*given)), np.int64).astype(dtype)
    return values, np.cumsum([0, *map(len, given)])


def sliced(data: st.DataObject, count: int) -> slice:
    a, b = sorted(data.draw(st.integers(0, count)) for _ in range(2))
    return slice(a, b)


def assert_is_view(values: np.ndarray, of: np.ndarray) -> None:
    assert np.shares_memory(values, of) or not len(values)


# ---- what is taken


@given(lists, dtypes, st.sampled_from([np.int32, np.int64, np.uint16]), st.data())
def test_pairs_are_views(given, dtype, width, data):
    values, offsets = flat(given, dtype)
    part = sliced(data, len(given))
    got, offsets_N1 = ragged((values, offsets[part.start : part.stop + 1].astype(width)))
    assert seen(got, offsets_N1) == [values[a:b].tolist() for a, b in itertools.pairwise(offsets)][part]
    assert got.dtype == dtype
    assert_is_view(got, values)


def test_offsets_that_need_nothing_are_handed_on():
    values, offsets = flat([[1, 2], [], [3]], np.int32)
    got, offsets_N1 = ragged((values, offsets))
    assert offsets_N1 is offsets and got.base is values


@given(lists, dtypes)
def test_lists_of_arrays_stay_as_they_are(given, dtype):
    each_N = [np.array(row).astype(dtype) for row in given]
    values, offsets_N1 = ragged(each_N)
    assert seen(values, offsets_N1) == [each.tolist() for each in each_N]
    assert values is each_N


@given(lists, st.booleans())
def test_lists_of_int_are_copied_to_int64(given, tuples):
    values, offsets_N1 = ragged([tuple(row) for row in given] if tuples else given)
    assert seen(values, offsets_N1) == given
    assert values == [] if not given else values.dtype == np.int64


@given(lists, st.sampled_from([bool, int, np.bool_, np.uint8]), st.booleans())
def test_lists_of_flags_are_copied_to_bool(given, kind, tuples):
    flags = [[kind(number % 2) for number in row] for row in given]
    values, offsets_N1 = ragged([tuple(row) for row in flags] if tuples else flags, "sampled", flags_of_lists)
    if given:
        assert values.dtype == bool
    assert seen(values, offsets_N1) == [[number % 2 == 1 for number in row] for row in given]


@given(lists, st.sampled_from([float, int, np.float32, np.float64]))
def test_lists_of_numbers_are_copied_to_float32(given, kind):
    values, offsets_N1 = ragged([[kind(number) for number in row] for row in given], "old_logprobs", floats_of_lists)
    if given:
        assert values.dtype == np.float32
    assert seen(values, offsets_N1) == [np.array(row, np.float32).tolist() for row in given]


@pytest.mark.parametrize(
    ("name", "rows", "match"),
    [
        ("sampled", [[1, 0], [0, 2]], r"sampled\[1\]\[1\]: 2 given: expected True, False, 0 or 1"),
        ("sampled", [[1, 0], [0.0, 1]], r"sampled\[1\]\[0\]: float given: expected True, False, 0 or 1"),
        ("sampled", [[1, 0], "ab"], r"sampled\[1\]: str given: expected a list or tuple"),
        ("sampled", [[1, 0], np.array([True])], r"sampled\[1\]: a bool array of shape \(1,\) given"),
        ("sampled", [[1, 0], [1]], "sampled: row 1 has 1 entries: expected 2, as tokens has"),
        ("ref_logprobs", [[0.0, -1], [True, 0.0]], r"ref_logprobs\[1\]\[0\]: bool given: expected a number"),
        ("ref_logprobs", [[0.0, -1], [0.0, None]], r"ref_logprobs\[1\]\[1\]: NoneType given: expected a number"),
    ],
)
def test_lists_of_other_things_are_refused_by_row_and_place(name, rows, match):
    given = {"sampled": [[0, 1]] * 2, "ref_logprobs": [[0.0, -1.0]] * 2}
    columns([[5, 6]] * 2, given["sampled"], [1.0] * 2, [1.0] * 2, {"ref_logprobs": given["ref_logprobs"]})
    given[name] = rows
    with pytest.raises(ValueError, match=match):
        columns([[5, 6]] * 2, given["sampled"], [1.0] * 2, [1.0] * 2, {"ref_logprobs": given["ref_logprobs"]})


@given(lists, st.sampled_from([pa.int32(), pa.int64(), pa.float64()]), st.booleans(), st.data())
def test_arrow_arrays_and_their_slices_are_views(given, kind, large, data):
    whole = pa.array(given, (pa.large_list if large else pa.list_)(kind))
    part = sliced(data, len(given))
    column = whole[part.start : part.stop]
    if data.draw(st.booleans()):
        column = pa.chunked_array([column])
    values, offsets_N1 = ragged(column)
    assert seen(values, offsets_N1) == given[part] and values.dtype == kind.to_pandas_dtype()
    assert_is_view(values, whole.values.to_numpy())


def test_an_arrow_column_of_no_chunk_is_empty():
    values, offsets_N1 = ragged(pa.chunked_array([], pa.list_(pa.int32())))
    assert values.dtype == np.int32 and offsets_N1.tolist() == [0]


def test_a_slice_of_arrow_that_shows_no_null_is_taken():
    whole = pa.array([None, [1, None], [2, 3], [4], None], pa.list_(pa.int64()))
    values, offsets_N1 = ragged(whole[2:4])
    assert seen(values, offsets_N1) == [[2, 3], [4]]


def test_arrow_lists_over_a_slice_of_values():
    values = pa.array(range(10), pa.int32())[3:]
    got, offsets_N1 = ragged(pa.ListArray.from_arrays(pa.array([0, 2, 5], pa.int32()), values))
    assert seen(got, offsets_N1) == [[3, 4], [5, 6, 7]]
    assert_is_view(got, values.to_numpy())


@given(lists.filter(len), st.sampled_from([torch.int32, torch.int64, torch.float32]), st.booleans())
def test_jagged_tensors_are_views(given, dtype, of_part):
    values, offsets = torch.tensor(list(itertools.chain(*given))).to(dtype), flat(given, np.int64)[1]
    first = len(given) // 2 if of_part else 0
    jagged = torch.nested.nested_tensor_from_jagged(values, torch.from_numpy(offsets[first:]))
    got, offsets_N1 = ragged(jagged)
    assert seen(got, offsets_N1) == [values[a:b].tolist() for a, b in itertools.pairwise(offsets)][first:]
    assert_is_view(got, values.numpy())


def test_jagged_tensors_with_a_gradient_are_taken_as_numbers():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    values, _ = ragged(torch.nested.nested_tensor_from_jagged(logprobs, torch.tensor([0, 2])))
    assert values.tolist() == [-1, -2]


@needs_awkward
@given(lists, dtypes, st.data())
def test_awkward_arrays_and_their_slices_are_views(given, dtype, data):
    values, offsets = flat(given, dtype)
    whole = ak.unflatten(values, np.diff(offsets))
    part = sliced(data, len(given))
    got, offsets_N1 = ragged(whole[part])
    assert seen(got, offsets_N1) == [values[a:b].tolist() for a, b in itertools.pairwise(offsets)][part]
    assert_is_view(got, values)


@needs_awkward
def test_awkward_arrays_that_could_have_missing_values_but_have_none_are_taken():
    values, offsets_N1 = ragged(ak.from_arrow(pa.array([[1, 2], [3]])))
    assert seen(values, offsets_N1) == [[1, 2], [3]]


# ---- what is refused


def refused(match: str, values: Any) -> None:
    with pytest.raises(ValueError, match=match):
        ragged(values, "tokens")


NUMBERS = np.arange(5)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (
            NUMBERS,
            r"tokens: a int64 array of shape \(5,\) given: expected a pair \(values, offsets\) of numpy arrays, a",
        ),
        ("abc", "tokens: str given: expected a pair"),
        (None, "tokens: NoneType given"),
        ((NUMBERS,), r"a tuple \(a int64 array of shape \(5,\)\) given: expected \(values, offsets\), two"),
        ((NUMBERS, [0, 5]), r"a tuple \(a int64 array of shape \(5,\), list\) given"),
        ((NUMBERS.reshape(5, 1), np.array([0, 5])), r"shape \(5, 1\)"),
        ((NUMBERS, np.array([], np.int64)), r"offsets are a int64 array of shape \(0,\): expected integers, one more"),
        ((NUMBERS, np.array([0.0, 5.0])), "offsets are a float64 array"),
        ((NUMBERS, np.array([0, 6])), "offsets fall, or leave the range from 0 to 5"),
        ((NUMBERS, np.array([-1, 5])), "offsets fall"),
        ((NUMBERS, np.array([0, 3, 2, 5])), "offsets fall"),
        ((NUMBERS, np.array([0, 2**63, 5], np.uint64)), "offsets fall"),
        ([NUMBERS, [1]], r"tokens\[1\]: list given: expected a one-dimensional numpy array, as \[0\] is"),
        ([NUMBERS, NUMBERS.reshape(5, 1)], r"tokens\[1\]: a int64 array of shape \(5, 1\) given"),
        ([[1], [2, 0.5]], r"tokens: lists\[1\]\[1\] must be an int, got float"),
        ([[True]], r"tokens: lists\[0\]\[0\] must be an int, got bool"),
        ([[1], NUMBERS], r"tokens: lists\[1\] must be a list or tuple of int, got numpy.ndarray"),
        ([torch.ones(2)], r"tokens: lists\[0\] must be a list or tuple of int, got Tensor"),
        (pa.array([1, 2]), "a pyarrow array of int64 given: expected list or large_list"),
        (
            pa.array([[True]]),
            "list<item: bool> given: expected list or large_list of integers or floats .bools are bits",
        ),
        (pa.array([[[1]]]), "a pyarrow array of list<item: list"),
        (pa.array([[1]], pa.list_(pa.int64(), 1)), "fixed_size_list"),
        (pa.array([[(1, 2)]], pa.map_(pa.int64(), pa.int64())), "map<int64"),
        (pa.array([[1], None, [2], None]), "row 1 is null: expected a list in every row"),
        (pa.array([[1], None, [2], None])[2:], "row 1 is null"),
        (pa.array([[9, None], [], [1], [], [2, None], [3]])[1:], "row 3 holds a null: expected numbers only"),
        (pa.chunked_array([[[1]], [[2]]]), r"2 chunks given: expected one; combine_chunks\(\) copies them"),
        (
            torch.arange(5),
            r"a torch.int64 array of shape \(5,\) on cpu given: expected a nested one of layout torch.jagged",
        ),
        (
            torch.nested.narrow(
                torch.arange(8).view(2, 4), 1, torch.tensor([0, 1]), torch.tensor([2, 2]), layout=torch.jagged
            ),
            r"a jagged tensor with holes given: expected one run; contiguous\(\) copies it into one",
        ),
        (
            torch.nested.nested_tensor_from_jagged(torch.ones(3, 2), torch.tensor([0, 3])),
            r"expected a nested one of layout torch.jagged and \(N, \*\) on a CPU",
        ),
        (
            torch.nested.nested_tensor_from_jagged(torch.ones(3, dtype=torch.bfloat16), torch.tensor([0, 3])),
            "torch.bfloat16 given: expected a dtype that numpy has",
        ),
        (torch.nested.nested_tensor_from_jagged(torch.ones(3), torch.tensor([0, 9])), "range from 0 to 3"),
    ],
)
def test_what_is_no_ragged_array_or_takes_a_copy_is_refused(values, match):
    refused(match, values)


@needs_awkward
@pytest.mark.parametrize(
    ("make", "kinds"),
    [
        (lambda: ak.Array([[1, 2], [3]])[[1, 0]], "ListArray"),
        (lambda: ak.Array([[1, None], [3]]), "ListOffsetArray of IndexedOptionArray"),
        (lambda: ak.Array([None, [3]]), "IndexedOptionArray"),
        (lambda: ak.Array([1, 2]), "NumpyArray"),
        (lambda: ak.Array([[], []]), "ListOffsetArray of EmptyArray"),
        (lambda: ak.Array([[[1]]]), "ListOffsetArray of ListOffsetArray"),
        (lambda: ak.to_regular(ak.Array([[1], [2]])), "RegularArray"),
        (lambda: ak.Array([{"x": [1]}]), "RecordArray"),
    ],
)
def test_awkward_arrays_that_take_a_copy_are_refused(make, kinds):
    refused(
        f"awkward's {re.escape(kinds)} given: expected a ListOffsetArray of NumpyArray; ak.to_packed copies", make()
    )


@needs_awkward
def test_what_the_refusal_of_a_rearranged_array_says_helps():
    values, offsets_N1 = ragged(ak.to_packed(ak.Array([[1, 2], [3]])[[1, 0]]))
    assert seen(values, offsets_N1) == [[3], [1, 2]]
