"""Test Arena: memory is reused, memory that is still held is never overwritten, and allocators of any kind work."""

from __future__ import annotations

import gc
import threading
from typing import Any

import numpy as np
import pytest
import torch
from fill_cases import Filled, assert_same, fill, large, one, ragged_lengths, snapshot, split
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mgrpo import _packing as packing

ROW_BYTES = 37  # three columns of int64, one of bool, three of four bytes


def address(filled: Filled) -> int:
    return filled["input_ids"].__array_interface__["data"][0]


def test_the_same_memory_comes_again_once_nothing_refers_to_it():
    arena = packing.Arena()
    first = one(1000, 1, arena)
    before, held = address(first), arena.held
    assert held >= 1000 * ROW_BYTES
    del first
    assert address(one(900, 2, arena)) == before and arena.held == held


@pytest.mark.parametrize(
    "keep",
    [
        lambda filled: filled["input_ids"],
        lambda filled: filled["input_ids"][5:7],
        lambda filled: filled["input_ids"].reshape(2, -1).view(np.int32)[1, ::2],
        lambda filled: memoryview(filled["input_ids"]),
        lambda filled: torch.from_numpy(filled["input_ids"])[3:9].numpy(),
    ],
    ids=["array", "slice", "view", "memoryview", "tensor"],
)
def test_what_is_still_held_is_never_overwritten(keep):
    arena = packing.Arena()
    kept = keep(one(100, 1, arena))
    before = np.array(kept).tolist()
    assert before
    for value in range(2, 6):
        one(100, value, arena)
    assert np.array(kept).tolist() == before


def test_one_of_several_micro_batches_holds_all_of_them():
    arena = packing.Arena()
    batch = large(ragged_lengths())
    last = fill(batch, bins_M1=np.array([0, 400, len(batch["ids"])]), arena=arena)[1]
    expected = snapshot(last)
    one(100_000, 1, arena)
    assert_same(last, expected)


def test_arrays_outlive_the_arena():
    filled = one(50_000, 3, packing.Arena())
    expected = snapshot(filled)
    gc.collect()
    one(50_000, 4)
    assert_same(filled, expected)


class Results:
    """Hold the results of the latest fills, and their expected values."""

    def __init__(self) -> None:
        self.kept: list[tuple[Filled, Filled]] = []

    def add(self, filled: Filled) -> None:
        self.kept.append((filled, snapshot(filled)))
        for each, expected in self.kept:
            assert_same(each, expected)

    def forget_all_but(self, latest: int) -> None:
        del self.kept[: len(self.kept) - latest]


@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 4)), max_size=30))
def test_it_holds_no_more_than_was_in_use_at_one_time(steps):
    """Fill a number of rows in each step, and then keep only the latest few results."""
    arena, results, most, largest = packing.Arena(), Results(), 0, 0
    for value, (rows, latest) in enumerate(steps):
        results.add(one(rows, value, arena))
        most, largest = max(most, len(results.kept)), max(largest, rows)
        assert arena.held <= most * 1.5 * (largest * ROW_BYTES + 9 * 64)
        results.forget_all_but(min(latest, len(results.kept)))


def test_several_threads_may_fill_from_one():
    arena, wrong = packing.Arena(), []

    def work(value: int) -> None:
        for _ in range(30):
            filled = one(30_000, value, arena)
            if not (filled["input_ids"] == value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---- allocators


def test_memory_comes_from_a_callable_and_is_given_back():
    asked: list[int] = []
    freed: list[int] = []

    class Memory(np.ndarray):
        def __del__(self) -> None:
            freed.append(self.nbytes)

    def allocate(size: int) -> NDArray[np.uint8]:
        asked.append(size)
        return np.empty(size, np.uint8).view(Memory)

    arena = packing.Arena(allocate)
    assert_same(one(100, 1, arena), one(100, 1))
    assert_same(one(80, 2, arena), one(80, 2))
    assert len(asked) == 1 and asked[0] > arena.held >= 100 * ROW_BYTES
    one(1000, 3, arena)
    assert freed == asked[:1] and asked[1] > 1.5 * asked[0]
    del arena
    assert freed == asked


@pytest.mark.parametrize(
    "allocate",
    [
        bytearray,
        lambda size: torch.empty(size, dtype=torch.uint8).numpy(),
        lambda size: np.empty(size + 1, np.uint8)[1:],
        lambda size: np.empty((2, size), np.int64),
        lambda size: memoryview(bytearray(size)),
    ],
    ids=["bytearray", "torch", "at an odd address", "larger", "memoryview"],
)
def test_any_writable_contiguous_buffer_will_do(allocate):
    batch = large(ragged_lengths())
    assert_same(fill(batch, arena=packing.Arena(allocate)), fill(batch))


@pytest.mark.parametrize("start", [0, 3000, 5000])
def test_memory_that_is_still_in_use_is_refused(start):
    memory, starts = np.empty(100_000, np.uint8), [start, 0]
    arena = packing.Arena(lambda _: memory[starts.pop() :])
    first = one(400, 1, arena)
    with pytest.raises(ValueError, match="allocate returned memory that an earlier result still refers to"):
        one(400, 2, arena)
    assert_same(first, one(400, 1))


def test_parts_of_one_memory_will_do():
    memory, starts = np.empty(100_000, np.uint8), [50_000, 0]
    arena = packing.Arena(lambda _: memory[starts.pop() :])
    first = one(200, 1, arena)
    assert_same(one(200, 2, arena), one(200, 2))
    assert_same(first, one(200, 1))


def failing(_: int) -> Any:
    raise OSError("no memory to lock")


def read_only(size: int) -> NDArray[np.uint8]:
    memory = np.empty(size, np.uint8)
    memory.flags.writeable = False
    return memory


@pytest.mark.parametrize(
    ("allocate", "error", "message"),
    [
        (lambda size: np.empty(size - 1, np.uint8), ValueError, r"a buffer of \d+ bytes, expected at least the \d+"),
        (lambda size: np.empty(0, np.uint8), ValueError, r"a buffer of 0 bytes, expected at least the \d+ asked for"),
        (bytes, ValueError, r"must return a writable contiguous buffer, got <class 'bytes'>"),
        (read_only, ValueError, r"must return a writable contiguous buffer, got a uint8 array"),
        (lambda size: np.empty(2 * size, np.uint8)[::2], ValueError, r"contiguous buffer, got .*, not contiguous"),
        (lambda size: np.broadcast_to(np.uint8(0), size), ValueError, r"a writable contiguous buffer"),
        (lambda size: None, ValueError, r"a writable contiguous buffer, got <class 'NoneType'>"),
        (torch.empty, ValueError, r"a writable contiguous buffer, got <class 'torch.Tensor'>"),
        (failing, OSError, "no memory to lock"),
        (lambda: None, TypeError, "takes 0 positional arguments"),
    ],
)
def test_what_an_allocator_may_not_do(allocate, error, message):
    arena = packing.Arena(allocate)
    for _ in range(2):
        with pytest.raises(error, match=message):
            one(10, 1, arena)
    assert arena.held == 0


def test_what_is_no_allocator_is_refused():
    with pytest.raises(ValueError, match="allocate must be callable or None, got <class 'int'>"):
        packing.Arena(3)  # type: ignore[arg-type]


def test_an_arena_that_was_never_initialised_is_refused():
    with pytest.raises(ValueError, match=r"made by Arena\.__new__ and never initialised"):
        one(10, 1, packing.Arena.__new__(packing.Arena))


def test_an_allocator_may_use_the_arena_and_change_the_lists_given():
    batch = large(ragged_lengths())
    tokens = split(batch["tokens"], batch["offsets"])
    nested: list[Filled] = []

    def allocate(size: int) -> bytearray:
        tokens.clear()
        if not nested:
            nested.append({})
            nested[0] = one(10, 1, arena)
        return bytearray(size)

    arena = packing.Arena(allocate)
    filled = fill(batch, lambda column_T, _: tokens if column_T is batch["tokens"] else column_T, arena=arena)
    assert_same(filled, fill(batch))
    assert_same(nested[0], one(10, 1))


def test_the_end_of_a_buffer_may_use_the_arena():
    nested: list[Filled] = []

    class Memory(np.ndarray):
        def __del__(self) -> None:
            if len(nested) < 3:
                nested.append(one(10 ** len(nested), 1, arenas[0]))

    arenas = [packing.Arena(lambda size: np.empty(size, np.uint8).view(Memory))]
    for rows in (10, 1000, 100_000):
        assert_same(one(rows, 2, arenas[0]), one(rows, 2))
    assert_same(nested[0], one(1, 1))
    assert_same(nested[1], one(10, 1))


def test_more_than_there_is_is_for_the_allocator_to_refuse():
    asked: list[int] = []

    def allocate(size: int) -> Any:
        asked.append(size)
        raise MemoryError

    length, times = 2**22 + 1, 511
    columns = (np.zeros(length, np.int32), np.array([0, length]), np.ones(length, np.bool_), np.zeros(times, np.int64))
    with pytest.raises(MemoryError):
        packing.fill(*columns, np.array([length - 1]), np.ones(1), np.ones(1), arena=packing.Arena(allocate))
    assert asked[0] > (length - 1) * times * ROW_BYTES
