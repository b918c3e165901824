"""Test `tree_fill` of several micro-batches in one call: each as if alone, in an arena's memory, with any threads."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from fill_cases import Filled, assert_same, snapshot
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cases.tree import LOGPROBS, fill, forests, ints, random_batch
from mgrpo import _packing as packing

Plan = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]  # bins_M1, ids_B, shared_B


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], Plan]:
    """Draw columns of a forest and a plan of it, with some empty micro-batches inserted."""
    names, dtype = draw(st.sets(st.sampled_from(LOGPROBS))), draw(st.sampled_from([np.int32, np.int64]))
    batch = random_batch(draw(forests()), draw(st.integers(0, 2**32)), names, dtype)
    cap = int(batch["rows"].max(initial=1)) + draw(st.integers(0, 30))
    bins_M1, ids_B, shared_B = packing.tree_plan(batch["tokens"], batch["offsets"], batch["rows"], cap)
    again = draw(st.lists(st.sampled_from(bins_M1.tolist()), max_size=3))
    return batch, (ints(sorted([*bins_M1, *again])), ids_B, shared_B)


def fill_all(batch: dict[str, Any], plan: Plan, **options: Any) -> list[Filled]:
    bins_M1, ids_B, shared_B = plan
    return fill(batch, ids_B, shared_B, bins_M1=bins_M1, **options)


def one_by_one(batch: dict[str, Any], plan: Plan, merge: bool = True) -> list[Filled]:
    bins_M1, ids_B, shared_B = plan
    return [fill(batch, ids_B[a:b], shared_B[a:b], merge) for a, b in itertools.pairwise(bins_M1)]


def large(seed: int, queries: int = 40) -> tuple[dict[str, Any], Plan]:
    """Make queries of 8 trajectories that share half their tokens, planned into about a tenth as many micro-batches."""
    random = np.random.default_rng(seed)
    stems = random.integers(0, 2**31, (queries, 150)).repeat(8, axis=0)
    sequences = np.concatenate([stems, random.integers(0, 2**31, stems.shape)], axis=1)
    batch = random_batch(sequences.tolist(), seed)
    return batch, packing.tree_plan(batch["tokens"], batch["offsets"], batch["rows"], 15_000)


@given(cases(), st.booleans(), st.sampled_from([None, packing.Arena()]), st.sampled_from([0, 1, 2, 7, 1024]))
def test_each_is_as_if_alone(case, merge, arena, threads):
    batch, plan = case
    made = fill_all(batch, plan, merge=merge, arena=arena, threads=threads)
    for filled, expected in zip(made, one_by_one(batch, plan, merge), strict=True):
        assert_same(filled, expected)


def test_many_at_once_are_as_if_alone():
    batch, plan = large(0)
    expected = one_by_one(batch, plan)
    assert len(expected) > 3
    for threads in (1, 2, 5, 0):
        for filled, alone in zip(fill_all(batch, plan, threads=threads), expected, strict=True):
            assert_same(filled, alone)


def test_arrays_are_for_the_caller_to_write_to_and_none_overlaps_another():
    batch, plan = large(1, queries=4)
    arrays = [array for filled in fill_all(batch, plan) for array in filled.values()]
    for number, array in enumerate(arrays):
        array.fill(number % 100)
    assert [set(array.tolist()) for array in arrays] == [{n % 100} for n in range(len(arrays))]


def test_of_no_micro_batch():
    batch = random_batch([], 0)
    assert fill(batch, [], [], bins_M1=ints([0])) == []


# ---- arena


@given(st.lists(st.tuples(cases(), st.integers(0, 3)), max_size=6), st.data())
def test_a_living_array_is_never_overwritten(steps, data):
    """Keep one array of each fill, and of those kept before as many as the step says."""
    arena, kept = packing.Arena(), list[tuple[NDArray[Any], NDArray[Any]]]()
    for (batch, plan), latest in steps:
        made = fill_all(batch, plan, arena=arena)
        for filled, expected in zip(made, one_by_one(batch, plan), strict=True):
            assert_same(filled, expected)
        for array, before in kept:
            np.testing.assert_array_equal(array, before)
        del kept[: len(kept) - latest]
        if made:
            array = data.draw(st.sampled_from(made))[data.draw(st.sampled_from(sorted(made[0])))]
            kept.append((array, array.copy()))
        del made


def test_the_same_memory_comes_again_once_nothing_refers_to_it():
    asked: list[int] = []

    def allocate(size: int) -> bytearray:
        asked.append(size)
        return bytearray(size)

    arena = packing.Arena(allocate)
    batch, plan = large(2)
    first = fill_all(batch, plan, arena=arena)
    address, leaf, expected = first[0]["input_ids"].ctypes.data, first[-1]["leaf"], snapshot(first[0])
    del first
    other = fill_all(batch, plan, arena=arena)
    assert len(asked) == 2 and other[0]["input_ids"].ctypes.data != address  # one array keeps all of them
    del leaf
    again = fill_all(batch, plan, arena=arena)
    assert len(asked) == 2 and again[0]["input_ids"].ctypes.data == address
    assert_same(again[0], expected)
    assert_same(other[0], expected)


def test_one_arena_serves_both_fills():
    arena = packing.Arena()
    batch, plan = large(3)
    tree = fill_all(batch, plan, arena=arena)
    expected = list(map(snapshot, tree))
    columns = [batch[name] for name in ("tokens", "offsets", "sampled")]
    rest = [batch[name] for name in ("advantages", "weights")]
    flat = packing.fill(*columns, plan[1], np.diff(batch["offsets"]) - 1, *rest, arena=arena)
    for filled, before in zip(tree, expected, strict=True):
        assert_same(filled, before)
    assert flat["sequences"] == len(plan[1])


# ---- mistakes


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_the_first_mistake_is_named_by_its_place_among_all_ids(threads):
    batch, (bins_M1, ids_B, shared_B) = large(4)
    for place in (-1, int(bins_M1[2])):
        ids_B[place] = 10**6 + place
    with pytest.raises(ValueError, match=rf"ids\[{bins_M1[2]}\] is {10**6 + bins_M1[2]}, expected from 0 to below 320"):
        fill_all(batch, (bins_M1, ids_B, shared_B), threads=threads)


def test_the_first_of_a_micro_batch_shares_nothing():
    batch, (bins_M1, ids_B, shared_B) = large(4)
    shared_B[bins_M1[3]] = 1
    with pytest.raises(ValueError, match=rf"shared\[{bins_M1[3]}\] is 1, expected 0: .* before it in its micro-batch"):
        fill_all(batch, (bins_M1, ids_B, shared_B))
