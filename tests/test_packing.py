"""mgrpo._packing against tests/naive_packing.py on random, ragged, empty and hostile input, and its statistics."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import naive_packing as naive
from mgrpo import _packing as packing

words = st.integers(0, 2**64 - 1)
costs = st.sampled_from([(1.0, 0.0), (0.0, 1.0), (1.0, 0.125), (3.0, 2.0)])


def ints(values: Any) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def keys_of(values: Any) -> NDArray[np.uint64]:
    return np.array(values, np.uint64)


def align(counts: Any, target: int, keys: Any, mode: str = "sampled", seed: int = 0) -> NDArray[np.float64]:
    return packing.align(ints(counts), target, mode, seed, keys_of(keys))


# ---- trainable_rows


trajectories = st.lists(st.lists(st.booleans(), max_size=9), max_size=9)


def offsets_of(lists: list[list[Any]]) -> NDArray[np.int64]:
    return np.cumsum([0, *map(len, lists)], dtype=np.int64)


@given(trajectories, st.sampled_from([np.bool_, np.uint8]))
def test_trainable_rows_is_the_naive_one(flags, dtype):
    sampled_T = np.array(list(itertools.chain(*flags)), dtype)
    rows_N = packing.trainable_rows(offsets_of(flags), sampled_T)
    assert rows_N.dtype == np.int64
    assert rows_N.tolist() == naive.trainable_rows(flags)


def test_trainable_rows_takes_any_nonzero_flag():
    assert packing.trainable_rows(ints([0, 3]), np.array([0, 7, 0], np.uint8)).tolist() == [1]


# ---- fill


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    flags = draw(st.lists(st.lists(st.booleans(), min_size=1, max_size=8), max_size=7))
    total = sum(map(len, flags))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    names = draw(st.sets(st.sampled_from(["old_logprobs", "sampler_logprobs", "ref_logprobs"])))
    token, number = draw(st.sampled_from([np.int32, np.int64])), draw(st.sampled_from([np.float32, np.float64]))
    return {
        "tokens": random.integers(0, 2**31 - 1, total, token),
        "offsets": offsets_of(flags),
        "sampled": np.array(list(itertools.chain(*flags)), draw(st.sampled_from([np.bool_, np.uint8]))),
        "ids": ints(draw(st.lists(st.integers(0, len(flags) - 1), max_size=9)) if flags else []),
        "rows": ints([draw(st.integers(0, len(each) - 1)) for each in flags]),
        "advantages": random.normal(size=len(flags)).astype(number),
        "weights": random.random(len(flags)).astype(number),
        "logprobs": {name: random.normal(size=total).astype(np.float32) for name in names},
    }


def fill(batch: dict[str, Any]) -> dict[str, Any]:
    columns = [batch[name] for name in ("tokens", "offsets", "sampled", "ids", "rows", "advantages", "weights")]
    return packing.fill(*columns, **{f"{name}_T": values for name, values in batch["logprobs"].items()})


@given(batches())
def test_fill_is_the_naive_one(batch):
    filled, expected = fill(batch), naive.fill(**batch)
    assert filled.keys() == expected.keys()
    assert type(filled["max_seqlen"]) is int and filled["max_seqlen"] == expected.pop("max_seqlen")
    for key, array in expected.items():
        assert filled[key].dtype == array.dtype, key
        np.testing.assert_array_equal(filled[key], array, key)


@given(batches())
def test_fill_of_trainable_rows_leaves_no_action_out(batch):
    batch["rows"] = packing.trainable_rows(batch["offsets"], batch["sampled"])
    batch["ids"] = np.arange(len(batch["rows"]))
    starts = batch["offsets"][:-1]
    assert fill(batch)["action_mask"].sum() == batch["sampled"].sum() - batch["sampled"][starts].sum()


def test_fill_takes_read_only_columns():
    tokens, sampled = np.frombuffer(bytes(16), np.int32), np.frombuffer(b"\0\1\0\1", np.bool_)
    filled = packing.fill(tokens, ints([0, 4]), sampled, ints([0]), ints([3]), np.ones(1), np.ones(1))
    assert filled["weights"].tolist() == [1, 0, 1]


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


def misaligned() -> NDArray[np.int64]:
    return np.frombuffer(bytes(17), np.uint8)[1:].view(np.int64)


HUGE = np.broadcast_to(np.int64(0), 2**31)  # takes no memory: every entry is the same

MISTAKES = [
    (bad_rows(offsets=ints([])), r"offsets is empty"),
    (bad_rows(offsets=ints([1, 4])), r"offsets\[0\] is 1, expected 0"),
    (bad_rows(offsets=ints([0, 3, 2, 4])), r"offsets\[2\] is 2, below offsets\[1\] = 3"),
    (bad_rows(offsets=ints([0, 5])), r"offsets ends at 5, expected the 4 tokens"),
    (bad_rows(offsets=ints([0, 3])), r"offsets ends at 3, expected the 4 tokens"),
    (bad_rows(sampled=np.ones(4)), r"sampled must be a .* array of bool or uint8, got a float64"),
    (bad_fill(tokens=np.ones(5)), r"tokens must be a .* array of int32 or int64, got a float64"),
    (bad_fill(tokens=ints([1])), r"tokens has 1 entries, expected one for each of the 5 entries of sampled"),
    (bad_fill(offsets=ints([0, 6, 5])), r"offsets\[2\] is 5, below offsets\[1\] = 6"),
    (bad_fill(offsets=ints([0, 2, 6])), r"offsets ends at 6, expected the 5 tokens"),
    (bad_fill(offsets=ints([0, 5])), r"rows has 2 entries, expected one for each of the 1 trajectories"),
    (bad_fill(ids=ints([0, 2])), r"ids\[1\] is 2, expected from 0 to below 2"),
    (bad_fill(ids=ints([-1])), r"ids\[0\] is -1, expected from 0 to below 2"),
    (bad_fill(ids=HUGE), r"ids must be .* not contiguous"),
    (bad_fill(rows=ints([1, 3])), r"rows\[1\] is 3, expected from 0 to below the trajectory's 3 tokens"),
    (bad_fill(rows=ints([-1, 2])), r"rows\[0\] is -1, expected from 0 to below the trajectory's 2 tokens"),
    (bad_fill(advantages=np.ones(1)), r"advantages has 1 entries, expected one for each of the 2 trajectories"),
    (bad_fill(advantages=np.array([np.nan, 1])), r"advantages\[0\] is nan, expected a finite float32"),
    (bad_fill(weights=np.array([1, 1e39])), r"weights\[1\] is 1e\+39, expected a finite float32"),
    (bad_fill(weights=np.ones(2, np.float16)), r"weights must be a .* array of float64 or float32, got a float16"),
    (bad_fill(old_logprobs_T=np.ones(5)), r"old_logprobs must be a .* array of float32, got a float64"),
    (bad_fill(ref_logprobs_T=np.ones(4, np.float32)), r"ref_logprobs has 4 entries, .* each of the 5 tokens"),
]


@pytest.mark.parametrize(("call", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_fill_counts_rows_in_int32():
    length, repeats = 2**22 + 1, 2**9
    columns = (np.zeros(length, np.int32), ints([0, length]), np.ones(length, np.bool_), np.zeros(repeats, np.int64))
    with pytest.raises(ValueError, match=r"ids\[511\] = 0 brings the batch to 2143289344 \+ 4194304 rows"):
        packing.fill(*columns, ints([length - 1]), np.ones(1), np.ones(1))


EXTREMES = [-(2**63), -1, 0, 1, 2, 3, 7, 2**31, 2**63 - 1]
scalars = st.one_of(st.sampled_from([*EXTREMES, 2**64, 1.5, float("nan"), None, "x", "sampled", (1.0, 1.0), True]))
dtypes = st.sampled_from(
    [np.int64, np.int64, np.int64, np.uint64, np.int32, np.bool_, np.uint8, np.float32, np.float64]
)
arrays = st.builds(
    lambda values, dtype: np.array(values, np.int64).astype(dtype),
    st.lists(st.sampled_from(EXTREMES), max_size=4),
    dtypes,
)


@settings(max_examples=300)
@given(st.sampled_from([(packing.trainable_rows, 2), (packing.fill, 7)]), st.data())
def test_hostile_arguments_are_refused(function, data):
    """Whatever is passed, the answer is a result or a plain Python error: the process lives."""
    call, arity = function
    arguments = data.draw(st.lists(st.one_of(arrays, arrays, scalars), min_size=arity, max_size=arity))
    try:
        call(*arguments)
    except (ValueError, TypeError):
        return


# ---- threads


def long_calls() -> dict[str, Callable[[], Any]]:
    """Calls of 0.05 s and more. Their arguments are made here, so that nothing else is timed."""
    random = np.random.default_rng(0)
    counts, keys = ints([1] * 16), keys_of([1] * 16)
    lengths = random.integers(1, 16_384, 4_000_000)
    size = 2**23
    offsets, tokens, silent = ints([0, size]), np.zeros(size, np.int32), np.zeros(8 * size, np.bool_)
    columns = (tokens, offsets, silent[:size], ints([0]), ints([size - 1]), np.ones(1), np.ones(1))
    return {
        "align": lambda: packing.align(counts, 2**20, "sampled", 0, keys),
        "trainable_rows": lambda: packing.trainable_rows(ints([0, 8 * size]), silent),
        "plan": lambda: packing.plan(lengths, 16_384),
        "fill": lambda: packing.fill(*columns),
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


@pytest.mark.parametrize("name", ["align", "trainable_rows", "plan", "fill"])
def test_the_gil_is_released(name):
    """A call that held the GIL would stop this thread from its start to its end, every time."""
    call = long_calls()[name]
    assert min(stopped_share(call) for _ in range(4)) < 0.5
