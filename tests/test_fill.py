"""fill, trainable_rows, from_lists and Arena of mgrpo._packing, against tests/naive_packing.py and hostile input."""

from __future__ import annotations

import gc
import itertools
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import naive_packing as naive
from mgrpo import _packing as packing

Filled = dict[str, Any]


def ints(values: Any) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def offsets_of(lists: list[list[Any]]) -> NDArray[np.int64]:
    return np.cumsum([0, *map(len, lists)], dtype=np.int64)


def assert_same(filled: Filled, expected: Filled) -> None:
    """To the bit, types included."""
    assert filled.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, np.ndarray):
            assert filled[key].dtype == value.dtype, key
            np.testing.assert_array_equal(filled[key], value, key)
        else:
            assert type(filled[key]) is type(value) and filled[key] == value, key


def snapshot(filled: Filled) -> Filled:
    return {key: value.copy() if isinstance(value, np.ndarray) else value for key, value in filled.items()}


# ---- trainable_rows


flag_lists = st.lists(st.lists(st.booleans(), max_size=9), max_size=9)


@given(flag_lists, st.sampled_from([np.bool_, np.uint8]), st.booleans())
def test_trainable_rows_is_the_naive_one(flags, dtype, as_list):
    each_N = [np.array(f, dtype) for f in flags]
    sampled = each_N if as_list else np.concatenate([np.zeros(0, dtype), *each_N])
    rows_N = packing.trainable_rows(offsets_of(flags), sampled)
    assert rows_N.dtype == np.int64
    assert rows_N.tolist() == naive.trainable_rows(flags)


def test_trainable_rows_takes_any_nonzero_flag():
    assert packing.trainable_rows(ints([0, 3]), np.array([0, 7, 0], np.uint8)).tolist() == [1]


# ---- fill


eighths = st.integers(-16, 16).map(lambda n: n / 8)  # of which all sums are exact


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    flags = draw(st.lists(st.lists(st.booleans(), min_size=1, max_size=8), max_size=7))
    count, total = len(flags), sum(map(len, flags))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    names = draw(st.sets(st.sampled_from(["old_logprobs", "sampler_logprobs", "ref_logprobs"])))
    token, number = draw(st.sampled_from([np.int32, np.int64])), draw(st.sampled_from([np.float32, np.float64]))
    return {
        "tokens": random.integers(0, 2**31 - 1, total, token),
        "offsets": offsets_of(flags),
        "sampled": np.array(list(itertools.chain(*flags)), draw(st.sampled_from([np.bool_, np.uint8]))),
        "ids": ints(draw(st.lists(st.integers(0, count - 1), max_size=9)) if flags else []),
        "rows": ints([draw(st.integers(0, len(each) - 1)) for each in flags]),
        "advantages": np.array(draw(st.lists(eighths, min_size=count, max_size=count)), number),
        "weights": np.array(draw(st.lists(eighths, min_size=count, max_size=count)), number),
        "logprobs": {name: random.normal(size=total).astype(np.float32) for name in names},
        "live": draw(st.sampled_from([None, "weight", "advantage"])),
        "narrow": token is np.int32 and draw(st.booleans()),
    }


def split(column_T: NDArray[Any], offsets_N1: NDArray[np.int64]) -> list[NDArray[Any]]:
    """The same as one array of each trajectory, each in memory of its own."""
    return [column_T[a:b].copy() for a, b in itertools.pairwise(offsets_N1)]


def fill(batch: dict[str, Any], form: Callable[..., Any] = lambda column_T, _: column_T, **options: Any) -> Any:
    def given_as(column_T: NDArray[Any]) -> Any:
        return form(column_T, batch["offsets"])

    rest = [batch[name] for name in ("ids", "rows", "advantages", "weights")]
    logprobs = {f"{name}_T": given_as(values) for name, values in batch["logprobs"].items()}
    options |= {name: batch[name] for name in ("live", "narrow")}
    return packing.fill(
        given_as(batch["tokens"]), batch["offsets"], given_as(batch["sampled"]), *rest, **logprobs, **options
    )


forms = st.sampled_from([lambda column_T, _: column_T, split, lambda *given: tuple(split(*given))])


@given(batches(), forms, st.integers(0, 3), st.booleans())
def test_fill_is_the_naive_one(batch, form, threads, with_arena):
    arena = packing.Arena() if with_arena else None
    assert_same(fill(batch, form, threads=threads, arena=arena), naive.fill(**batch))


@given(batches(), forms, st.data())
def test_fill_of_many_micro_batches_is_that_of_each(batch, form, data):
    count = len(batch["ids"])
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=5)))
    bins_M1 = ints([0, *cuts, count])
    filled = fill(batch, form, bins_M1=bins_M1)
    assert len(filled) == len(bins_M1) - 1
    for made, (a, b) in zip(filled, itertools.pairwise(bins_M1), strict=True):
        assert_same(made, naive.fill(**batch | {"ids": batch["ids"][a:b]}))


def test_fill_of_no_micro_batch_is_none_and_of_no_sequence_is_empty():
    columns = (np.zeros(0, np.int32), ints([0]), np.zeros(0, np.bool_), ints([]), ints([]), np.ones(0), np.ones(0))
    assert packing.fill(*columns, bins_M1=ints([0])) == []
    assert packing.fill(*columns)["cu_seqlens"].tolist() == [0]


@given(batches())
def test_fill_of_trainable_rows_leaves_no_action_out(batch):
    batch["rows"] = packing.trainable_rows(batch["offsets"], batch["sampled"])
    batch["ids"] = np.arange(len(batch["rows"]))
    starts = batch["offsets"][:-1]
    assert fill(batch)["action_mask"].sum() == batch["sampled"].sum() - batch["sampled"][starts].sum()


def test_fill_takes_read_only_and_subclassed_columns(tmp_path):
    tokens, sampled = np.frombuffer(bytes(16), np.int32), np.frombuffer(b"\0\1\0\1", np.bool_)
    np.full(4, 7, np.int32).tofile(tmp_path / "tokens")
    for given_tokens in (tokens, np.memmap(tmp_path / "tokens", np.int32, "r")):
        filled = packing.fill(given_tokens, ints([0, 4]), sampled, ints([0]), ints([3]), np.ones(1), np.ones(1))
        assert filled["weights"].tolist() == [1, 0, 1]
        assert filled["targets"].tolist() == given_tokens[1:].tolist()


def large() -> dict[str, Any]:
    """Some 600,000 rows in pieces that end within sequences: one long, one of a row, some of none, many short."""
    random = np.random.default_rng(5)
    lengths = ints([300_000, 2, 1, *random.integers(1, 700, 900), 1, 1])
    total = int(lengths.sum())
    return {
        "tokens": random.integers(0, 150_000, total, np.int32),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]),
        "sampled": random.random(total) < 0.5,
        "ids": random.permutation(len(lengths)),
        "rows": lengths - 1,
        "advantages": random.integers(-1, 2, len(lengths)).astype(np.float64),
        "weights": random.random(len(lengths)),
        "logprobs": {"old_logprobs": random.normal(size=total).astype(np.float32)},
        "live": "advantage",
        "narrow": False,
    }


def test_the_result_is_the_same_for_any_number_of_threads():
    batch = large()
    bins_M1 = ints([0, 0, 400, 401, len(batch["ids"])])
    expected = fill(batch, bins_M1=bins_M1, threads=1)
    for threads in (2, 3, 8, 0):
        for made, truth in zip(fill(batch, bins_M1=bins_M1, threads=threads), expected, strict=True):
            assert_same(made, truth)


def test_rows_of_many_pieces_are_the_right_ones():
    batch = large()
    filled = fill(batch)
    sequences = [slice(batch["offsets"][n], batch["offsets"][n + 1]) for n in batch["ids"]]
    mask_P = np.concatenate([batch["sampled"][s][1:] for s in sequences])
    weights_P = np.repeat(batch["weights"][batch["ids"]], batch["rows"][batch["ids"]]).astype(np.float32)
    logprobs_P = np.concatenate([batch["logprobs"]["old_logprobs"][s][1:] for s in sequences])
    np.testing.assert_array_equal(filled["input_ids"], np.concatenate([batch["tokens"][s][:-1] for s in sequences]))
    np.testing.assert_array_equal(filled["targets"], np.concatenate([batch["tokens"][s][1:] for s in sequences]))
    np.testing.assert_array_equal(filled["weights"], np.where(mask_P, weights_P, 0))
    np.testing.assert_array_equal(filled["old_logprobs"], np.where(mask_P, logprobs_P, np.float32(0)))
    np.testing.assert_array_equal(filled["live_rows"], np.flatnonzero(filled["weights"] * filled["advantages"]))
    assert filled["actions"] == mask_P.sum()
    assert filled["weight_sum"] == pytest.approx(filled["weights"].astype(np.float64).sum(), rel=1e-12)


def test_a_weight_that_float32_rounds_to_nothing_is_not_live():
    columns = (np.zeros(3, np.int32), ints([0, 3]), np.ones(3, np.bool_), ints([0]), ints([2]))
    for tiny, one in itertools.permutations([np.full(1, 1e-60), np.ones(1)]):
        live = packing.fill(*columns, advantages_N=tiny, weights_N=one, live="advantage")["live_rows"]
        assert live.tolist() == []


# ---- from_lists


@given(st.lists(st.one_of(st.lists(st.integers(-(2**63), 2**63 - 1)), st.tuples(st.integers(0, 300)))))
def test_from_lists_is_the_naive_one(lists):
    for given_as in (lists, tuple(lists)):
        values_T, offsets_N1 = packing.from_lists(given_as)
        assert values_T.dtype == offsets_N1.dtype == np.int64
        assert (values_T.tolist(), offsets_N1.tolist()) == naive.from_lists(lists)


def test_from_lists_leaves_the_reference_counts_as_they_are():
    token, inner = 123_456_789, [1, 2]
    inner.append(token)
    before = sys.getrefcount(token), sys.getrefcount(inner)
    packing.from_lists([inner, inner])
    with pytest.raises(ValueError, match="must be an int"):
        packing.from_lists([inner, [token, None]])
    assert (sys.getrefcount(token), sys.getrefcount(inner)) == before


# ---- arena


def flat(rows: int, value: int, arena: Any = None) -> Filled:
    tokens = np.full(rows + 1, value, np.int32)
    columns = (tokens, ints([0, rows + 1]), np.ones(rows + 1, np.bool_), ints([0]), ints([rows]))
    return packing.fill(*columns, np.full(1, float(value)), np.ones(1), arena=arena)


def address(filled: Filled) -> int:
    return filled["input_ids"].__array_interface__["data"][0]


def test_an_arena_gives_the_same_memory_again_once_nothing_refers_to_it():
    arena = packing.Arena()
    first = flat(1000, 1, arena)
    before, held = address(first), arena.held
    del first
    assert address(flat(900, 2, arena)) == before and arena.held == held


@pytest.mark.parametrize(
    "keep",
    [
        lambda filled: filled["input_ids"],
        lambda filled: filled["input_ids"][5:7],
        lambda filled: filled["input_ids"].reshape(2, -1).view(np.int32)[1, ::2],
        lambda filled: memoryview(filled["input_ids"]),
        lambda filled: torch.from_numpy(filled["input_ids"])[3:9],
    ],
    ids=["array", "slice", "view", "memoryview", "tensor"],
)
def test_what_is_still_held_is_never_overwritten(keep):
    arena = packing.Arena()
    kept = keep(flat(100, 1, arena))
    before = np.array(kept)
    assert before.size
    for value in range(2, 6):
        flat(100, value, arena)
    np.testing.assert_array_equal(np.array(kept), before)


def test_arrays_outlive_the_arena():
    filled = flat(50_000, 3, packing.Arena())
    expected = snapshot(filled)
    gc.collect()
    flat(50_000, 4)
    assert_same(filled, expected)


@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 4)), max_size=30))
@settings(deadline=None)
def test_an_arena_holds_no_more_than_was_in_use_at_one_time(steps):
    """Each step fills so many rows and then keeps only the latest few results."""
    arena = packing.Arena()
    kept: list[tuple[Filled, Filled]] = []
    most, largest = 0, 0
    for value, (rows, keep) in enumerate(steps):
        filled = flat(rows, value, arena)
        kept.append((filled, snapshot(filled)))
        del filled
        most, largest = max(most, len(kept)), max(largest, rows)
        for held, expected in kept:
            assert_same(held, expected)
        assert arena.held <= most * 1.5 * (largest * 37 + 9 * 64)
        kept = kept[len(kept) - keep :] if keep else []


def test_an_arena_takes_memory_from_a_callable_and_gives_it_back():
    asked: list[int] = []
    freed: list[int] = []

    class Memory(np.ndarray):
        def __del__(self) -> None:
            freed.append(self.nbytes)

    def allocate(size: int) -> Any:
        asked.append(size)
        return np.empty(size, np.uint8).view(Memory)

    arena = packing.Arena(allocate)
    assert_same(flat(100, 1, arena), flat(100, 1))
    assert_same(flat(80, 2, arena), flat(80, 2))
    assert len(asked) == 1 and asked[0] > arena.held >= 100 * 37
    flat(1000, 3, arena)
    assert freed == asked[:1] and asked[1] > 1.5 * asked[0]
    del arena
    assert freed == asked


def test_memory_that_an_allocator_gives_twice_is_refused_while_in_use():
    memory = np.empty(100_000, np.uint8)
    arena = packing.Arena(lambda _: memory)
    first = flat(100, 1, arena)
    with pytest.raises(ValueError, match="allocate returned memory that an earlier result still refers to"):
        flat(100, 2, arena)
    assert_same(first, flat(100, 1))


def failing(_: int) -> Any:
    raise OSError("no memory to lock")


@pytest.mark.parametrize(
    ("allocate", "error", "message"),
    [
        (lambda size: np.empty(size - 1, np.uint8), ValueError, r"a buffer of \d+ bytes, expected at least the \d+"),
        (lambda size: bytes(size), ValueError, r"a writable contiguous buffer, got <class 'bytes'>"),
        (lambda size: np.empty(2 * size, np.uint8)[::2], ValueError, r"a writable contiguous buffer"),
        (lambda size: None, ValueError, r"a writable contiguous buffer, got <class 'NoneType'>"),
        (failing, OSError, "no memory to lock"),
    ],
)
def test_what_an_allocator_may_not_return(allocate, error, message):
    arena = packing.Arena(allocate)
    with pytest.raises(error, match=message):
        flat(10, 1, arena)
    assert arena.held == 0


def test_an_allocator_may_use_the_arena_and_change_the_lists_given():
    batch = large()
    tokens = split(batch["tokens"], batch["offsets"])
    nested: list[Filled] = []

    def allocate(size: int) -> Any:
        tokens.clear()
        if not nested:
            nested.append({})
            nested[0] = flat(10, 1, arena)
        return bytearray(size)

    arena = packing.Arena(allocate)
    expected = fill(batch)
    filled = fill(batch, lambda column_T, offsets: tokens if column_T is batch["tokens"] else column_T, arena=arena)
    assert_same(filled, expected)
    assert_same(nested[0], flat(10, 1))


# ---- mistakes


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


def bad_lists(lists: Any) -> Callable[[], Any]:
    return lambda: packing.from_lists(lists)


def misaligned() -> NDArray[np.int64]:
    return np.frombuffer(bytes(41), np.uint8)[1:].view(np.int64)


HUGE = np.broadcast_to(np.int64(0), 2**31)  # takes no memory: every entry is the same
HALVES = [ints([1, 2]), ints([3, 4, 5])]


class Odd(int):
    """An integer of another type: it may run code of its own when it is converted."""


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
    (bad_fill(tokens=misaligned()), r"tokens must be a one-dimensional contiguous array of int32 or int64"),
    (bad_fill(tokens=ints([1, 2, 3, 4, 5])[::-1]), r"tokens must be .* not contiguous"),
    (bad_fill(tokens=np.ones(5, ">i8")), r"tokens must be .* got a >i8 array"),
    (bad_fill(tokens=ints([1])), r"tokens has 1 entries, expected 5, where offsets ends"),
    (bad_fill(tokens=[ints([1, 2]), ints([3])]), r"tokens\[1\] has 1 entries, expected the 3 tokens that offsets"),
    (bad_fill(tokens=[HALVES[0], HALVES[1].astype(np.int32)]), r"tokens\[1\] must be .* all alike, got a int32"),
    (bad_fill(tokens=[HALVES[0].astype(np.int32), HALVES[1]]), r"tokens\[1\] must be .* int32, as the first is, got"),
    (bad_fill(tokens=[HALVES[0], HALVES[1][::-1]]), r"tokens\[1\] must be .* not contiguous"),
    (bad_fill(offsets=ints([0, 6, 5])), r"offsets\[2\] is 5, below offsets\[1\] = 6"),
    (bad_fill(offsets=ints([0, 2, 6])), r"sampled has 5 entries, expected 6, where offsets ends"),
    (bad_fill(offsets=ints([0, 5])), r"rows has 2 entries, expected one for each of the 1 trajectories"),
    (bad_fill(offsets=ints([0, 5]).astype(np.int32)), r"offsets must be .* of int64, got a int32 array"),
    (bad_fill(ids=ints([0, 2])), r"ids\[1\] is 2, expected from 0 to below 2"),
    (bad_fill(ids=ints([-1])), r"ids\[0\] is -1, expected from 0 to below 2"),
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
    (bad_fill(bins_M1=[0, 2]), r"bins must be .*, got <class 'list'>"),
    (bad_fill(live="loss"), r"live must be 'weight', 'advantage' or None, got 'loss'"),
    (bad_fill(narrow=True), r"narrow needs tokens of int32, got int64"),
    (bad_fill(arena=3), r"arena must be an Arena or None, got <class 'int'>"),
    (bad_fill(threads=-1), r"threads must be from 0 to 1024, got -1"),
    (bad_fill(threads=1025), r"threads must be from 0 to 1024, got 1025"),
    (bad_fill(threads=2**70), r"threads must be a 64-bit integer"),
    (bad_lists(None), r"lists must be a list or tuple of lists, got NoneType"),
    (bad_lists({1: 2}), r"lists must be a list or tuple of lists, got dict"),
    (bad_lists([[1], 2]), r"lists\[1\] must be a list or tuple of int, got int"),
    (bad_lists([[1], "ab"]), r"lists\[1\] must be a list or tuple of int, got str"),
    (bad_lists([[1], ints([2])]), r"lists\[1\] must be a list or tuple of int, got numpy\.ndarray"),
    (bad_lists([[1], [2, True]]), r"lists\[1\]\[1\] must be an int, got bool"),
    (bad_lists([[1, 2.0]]), r"lists\[0\]\[1\] must be an int, got float"),
    (bad_lists([[1], [], [None]]), r"lists\[2\]\[0\] must be an int, got NoneType"),
    (bad_lists([[np.int64(1)]]), r"lists\[0\]\[0\] must be an int, got numpy\.int64"),
    (bad_lists([[Odd(1)]]), r"lists\[0\]\[0\] must be an int, got Odd"),
    (bad_lists([[0, 2**63]]), r"lists\[0\]\[1\] does not fit in int64"),
    (bad_lists([[-(10**5000)]]), r"lists\[0\]\[0\] does not fit in int64"),
    (lambda: packing.Arena(3), r"allocate must be callable or None, got <class 'int'>"),
]


@pytest.mark.parametrize(("call", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def repeated(times: int, **options: Any) -> Any:
    """The same 2**22 rows so many times, which is refused before any memory is taken."""
    length = 2**22 + 1
    columns = (np.zeros(length, np.int32), ints([0, length]), np.ones(length, np.bool_), np.zeros(times, np.int64))
    return packing.fill(*columns, ints([length - 1]), np.ones(1), np.ones(1), **options)


def test_fill_counts_the_rows_of_a_micro_batch_in_int32():
    with pytest.raises(ValueError, match=r"ids\[511\] = 0 brings the batch to 2143289344 \+ 4194304 rows"):
        repeated(512)


def test_fill_counts_all_rows_below_the_limit():
    with pytest.raises(ValueError, match=r"micro-batch 32 brings all of them to \d+ rows, expected below 68719476736"):
        repeated(40 * 511, bins_M1=np.arange(0, 41 * 511, 511))


def test_more_memory_than_there_is_is_a_memory_error():
    with pytest.raises(MemoryError):
        repeated(32 * 511, bins_M1=np.arange(0, 33 * 511, 511))


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
@given(
    st.sampled_from([(packing.trainable_rows, 2), (packing.fill, 7), (packing.from_lists, 1), (packing.Arena, 1)]),
    st.data(),
)
def test_hostile_arguments_are_refused(function, data):
    """Whatever is passed, the answer is a result or a plain Python error: the process lives."""
    call, arity = function
    arguments = data.draw(st.lists(anything, min_size=arity, max_size=arity))
    options = data.draw(st.dictionaries(st.sampled_from(OPTIONS), anything, max_size=2)) if call is packing.fill else {}
    try:
        call(*arguments, **options)
    except (ValueError, TypeError):
        return


# ---- threads


def long_calls() -> dict[str, Callable[[], Any]]:
    """Calls of tens of milliseconds. Their arguments are made here, so that nothing else is timed."""
    size = 2**23
    offsets, tokens, silent = ints([0, size]), np.zeros(size, np.int32), np.zeros(8 * size, np.bool_)
    columns = (tokens, offsets, silent[:size], ints([0]), ints([size - 1]), np.ones(1), np.ones(1))
    return {
        "trainable_rows": lambda: packing.trainable_rows(ints([0, 8 * size]), silent),
        "fill": lambda: packing.fill(*columns, threads=1),
    }


def stopped_share(call: Callable[[], Any]) -> float:
    """The longest that this thread was stopped while another one made the call, over the time of the call."""
    seconds: list[float] = []

    def work() -> None:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)

    thread = threading.Thread(target=work)
    moments = [time.perf_counter()]
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        moments.append(time.perf_counter())
    return max(np.diff(moments)) / seconds[0]


@pytest.mark.parametrize("name", ["trainable_rows", "fill"])
def test_the_gil_is_released(name):
    """A call that held the GIL would stop this thread from its start to its end, every time."""
    call = long_calls()[name]
    assert min(stopped_share(call) for _ in range(8)) < 0.6
