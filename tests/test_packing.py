"""mgrpo._packing against tests/naive_packing.py on random, ragged, empty and hostile input, and its statistics."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
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


# ---- align


rollouts = st.lists(st.tuples(st.integers(0, 12), words), max_size=12)


@given(rollouts, st.integers(1, 15), st.sampled_from(["sampled", "expected"]), words)
def test_align_is_the_naive_one(rollouts, target, mode, seed):
    counts, keys = [count for count, _ in rollouts], [key for _, key in rollouts]
    copies_T = align(counts, target, keys, mode, seed)
    assert copies_T.dtype == np.float64
    assert copies_T.tolist() == naive.align(counts, target, mode, seed, keys)


@given(rollouts, st.integers(1, 15), words)
def test_align_gives_each_rollout_its_target(rollouts, target, seed):
    counts = [count for count, _ in rollouts]
    copies_T = align(counts, target, [key for _, key in rollouts], seed=seed)
    for count, copies in zip(counts, np.split(copies_T, np.cumsum(counts, dtype=np.int64)[:-1]), strict=bool(counts)):
        assert copies.sum() == (target if count else 0)
        assert np.all(copies == np.round(copies))
        assert np.all(copies >= 1) if count <= target else np.all(copies <= 1)


@given(rollouts, st.integers(1, 15), words, st.randoms(use_true_random=False))
def test_align_does_not_depend_on_place(rollouts, target, seed, random):
    shuffled = random.sample(rollouts, len(rollouts))
    together = align([count for count, _ in shuffled], target, [key for _, key in shuffled], seed=seed)
    alone = [align([count], target, [key], seed=seed) for count, key in shuffled]
    assert together.tolist() == list(itertools.chain(*alone))


def chi_square(counted: Counter[Any], chances: dict[Any, float], draws: int) -> float:
    assert set(counted) <= set(chances)
    return sum((counted[k] - draws * chance) ** 2 / (draws * chance) for k, chance in chances.items())


@pytest.mark.parametrize("stride", [1, 2**32, 0x9E3779B97F4A7C15 % 2**40])
def test_align_chooses_every_subset_alike(stride):
    rollouts, count, target = 20_000, 5, 3
    copies = align([count] * rollouts, target, [stride * r for r in range(rollouts)]).reshape(rollouts, count)
    subsets = [row for row in itertools.product([0.0, 1.0], repeat=count) if sum(row) == target]
    # 9 degrees of freedom: above 45 once in a million
    assert chi_square(Counter(map(tuple, copies)), dict.fromkeys(subsets, 1 / 10), rollouts) < 45


def test_align_repeats_uniformly_and_independently():
    rollouts, count, target = 20_000, 3, 5
    copies = align([count] * rollouts, target, range(rollouts), seed=11).reshape(rollouts, count)
    pairs = Counter(tuple(1.0 + (np.bincount(pair, minlength=3))) for pair in itertools.product(range(3), repeat=2))
    # 5 degrees of freedom: above 37 once in a million
    assert chi_square(Counter(map(tuple, copies)), {k: n / 9 for k, n in pairs.items()}, rollouts) < 37


@pytest.mark.parametrize(("count", "target"), [(3, 8), (8, 3), (7, 1), (1, 7)])
def test_align_samples_around_the_expected_mode(count, target):
    """Over seeds, the mean of the sampled multiplicities is the expected one: the same gradient on average."""
    mean = np.mean([align([count], target, [5], seed=seed) for seed in range(4000)], axis=0)
    np.testing.assert_allclose(mean, align([count], target, [5], "expected"), atol=0.12)


# ---- plan


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[int], int, int]:
    cap = draw(st.integers(1, 200))
    lengths = draw(st.lists(st.integers(1, cap), max_size=40))
    return lengths, cap, draw(st.integers(1, 9))


def bins_of(lengths: list[int], *args: Any, **named: Any) -> list[list[int]]:
    offsets_M1, ids_N = packing.plan(ints(lengths), *args, **named)
    assert offsets_M1.dtype == ids_N.dtype == np.int64
    assert offsets_M1[0] == 0 and offsets_M1[-1] == len(ids_N)
    return [ids_N[a:b].tolist() for a, b in itertools.pairwise(offsets_M1)]


@given(plans(), costs)
def test_plan_is_the_naive_one(drawn, cost):
    lengths, cap, ranks = drawn
    assert bins_of(lengths, cap, ranks, cost, True) == naive.plan(lengths, cap, ranks, cost, True)


@given(plans(), costs, st.booleans())
def test_plan_holds_every_sequence_once_within_the_cap(drawn, cost, allow_empty):
    lengths, cap, ranks = drawn
    fewest = len(naive.best_fit_decreasing(lengths, cap))
    count = -(-max(fewest, allow_empty) // ranks) * ranks
    if not allow_empty and len(lengths) < count:
        with pytest.raises(ValueError, match=f"{len(lengths)} sequences are too few for the {count} micro-batches"):
            bins_of(lengths, cap, ranks, cost)
        return
    bins = bins_of(lengths, cap, ranks, cost, allow_empty)
    assert len(bins) == count
    assert sorted(itertools.chain(*bins)) == list(range(len(lengths)))
    assert all(sum(lengths[n] for n in ids) <= cap for ids in bins)
    assert sum(not ids for ids in bins) == max(count - len(lengths), 0)


@given(plans())
def test_plan_of_one_rank_has_as_many_bins_as_best_fit_decreasing(drawn):
    lengths, cap, _ = drawn
    assert len(bins_of(lengths, cap)) == len(naive.best_fit_decreasing(lengths, cap))


@given(plans(), costs)
def test_plan_deals_by_cost(drawn, cost):
    """No micro-batch of one turn is dearer than any of the turn before, so those side by side are neighbours."""
    lengths, cap, ranks = drawn
    bins = bins_of(lengths, cap, ranks, cost, True)
    price = [sum(cost[0] * lengths[n] + cost[1] * lengths[n] ** 2 for n in ids) for ids in bins]
    turns = [price[j : j + ranks] for j in range(0, len(price), ranks)]
    assert all(min(before) >= max(after) - 1e-6 for before, after in itertools.pairwise(turns))


@pytest.mark.parametrize(
    ("sequences", "square", "most"), [(300, 0.0, 1.08), (1000, 1 / 8000, 1.09), (10_000, 0.0, 1.01)]
)
def test_plan_keeps_ranks_busy(sequences, square, most):
    """Time in lockstep (the dearest of each turn) over the mean, for 8 ranks. A random deal has 1.3 and more."""
    lengths = np.minimum(np.random.default_rng(0).lognormal(np.log(1500), 0.8, sequences).astype(np.int64) + 1, 16_384)
    offsets_M1, ids_N = packing.plan(lengths, 16_384, 8, (1.0, square))
    cost_N = lengths + square * lengths.astype(np.float64) ** 2
    turns = np.add.reduceat(cost_N[ids_N], offsets_M1[:-1]).reshape(-1, 8)
    assert turns.max(1).sum() <= most * turns.mean(1).sum()
    assert turns.sum(0).max() <= most * turns.sum(0).mean()


def test_plan_spreads_what_would_leave_a_remainder():
    """Nine bins' worth for eight ranks: sixteen even bins, not nine full ones and seven scraps."""
    lengths = ints([10] * 900)
    rows = [10 * len(ids) for ids in bins_of(lengths, 1000, 8)]
    assert len(rows) == 16 and max(rows) <= 1.05 * 9000 / 16


def test_plan_without_sequences():
    assert [array.tolist() for array in packing.plan(ints([]), 8, 4)] == [[0], []]
    assert [array.tolist() for array in packing.plan(ints([]), 8, 4, allow_empty=True)] == [[0, 0, 0, 0, 0], []]


def test_plan_takes_the_largest_cap():
    assert bins_of([1, 2**62], 2**63 - 1) == [[1, 0]]


# ---- mistakes


def bad_align(**changes: Any) -> Callable[[], Any]:
    named = {"counts": ints([2, 3]), "target": 2, "mode": "sampled", "seed": 0, "keys": keys_of([1, 2])} | changes
    return lambda: packing.align(*named.values())


def bad_plan(**changes: Any) -> Callable[[], Any]:
    named = {"lengths": ints([2, 3]), "cap": 4, "ranks": 1, "cost": (1.0, 0.0)} | changes
    return lambda: packing.plan(*named.values())


def misaligned() -> NDArray[np.int64]:
    return np.frombuffer(bytes(17), np.uint8)[1:].view(np.int64)


MISTAKES = [
    (bad_align(counts=ints([2, -3])), r"counts\[1\] is -3, expected at least 0"),
    (bad_align(counts=ints([2, 2**62])), r"counts\[1\] is 4611686018427387904: the sum passes 268435456"),
    (bad_align(counts=[2, 3]), r"counts must be a .* array of int64, got <class 'list'>"),
    (bad_align(counts=np.ones((2, 1), np.int64)), r"counts must be .* got a int64 array of shape \(2, 1\)"),
    (bad_align(counts=np.arange(4)[::2]), r"counts must be .* shape \(2,\), not contiguous"),
    (bad_align(counts=np.array([2, 3], ">i8")), r"counts must be a .* array of int64, got a >i8 array"),
    (bad_align(counts=misaligned()), r"counts must be a one-dimensional contiguous array of int64"),
    (bad_align(keys=ints([1, 2])), r"keys must be a .* array of uint64, got a int64 array"),
    (bad_align(keys=keys_of([1])), r"keys has 1 entries, expected one for each of the 2 counts"),
    (bad_align(target=0), r"target must be from 1 to 1048576, got 0"),
    (bad_align(target=2**20 + 1), r"target must be from 1 to 1048576, got 1048577"),
    (bad_align(target=2**70), r"target must be a 64-bit integer, got 1180591620717411303424"),
    (bad_align(target=2.5), r"target must be a 64-bit integer, got 2\.5"),
    (bad_align(seed=-1), r"seed must be an integer from 0 to 2\^64 - 1, got -1"),
    (bad_align(mode="mean"), r"mode must be 'sampled' or 'expected', got 'mean'"),
    (bad_align(mode=None), r"mode must be 'sampled' or 'expected', got None"),
    (bad_plan(lengths=ints([2, 0])), r"lengths\[1\] is 0, expected at least 1"),
    (bad_plan(lengths=ints([5, 2])), r"lengths\[0\] is 5, more than cap 4"),
    (bad_plan(lengths=ints([2**62, 2**62]), cap=2**62), r"lengths\[1\] is \d+: the sum passes the largest 64-bit"),
    (bad_plan(lengths=np.ones(2)), r"lengths must be a .* array of int64, got a float64"),
    (bad_plan(cap=0), r"cap must be at least 1, got 0"),
    (bad_plan(cap=None), r"cap must be a 64-bit integer, got None"),
    (bad_plan(ranks=0), r"ranks must be from 1 to 1048576, got 0"),
    (bad_plan(ranks=2**62), r"ranks must be from 1 to 1048576, got 4611686018427387904"),
    (bad_plan(ranks=3), r"2 sequences are too few for the 3 micro-batches that ranks = 3 needs"),
    (bad_plan(cost=(-1.0, 0.0)), r"cost must be two finite numbers.*got \(-1, 0\)"),
    (bad_plan(cost=(0.0, 0.0)), r"cost must be two finite numbers.*got \(0, 0\)"),
    (bad_plan(cost=(1.0, float("nan"))), r"cost must be two finite numbers.*got \(1, nan\)"),
    (bad_plan(cost=(0.0, 1e308)), r"cost \(0, 1e\+308\) is too large: that of lengths\[0\] = 2"),
    (bad_plan(cost=(1.0,)), r"cost must be a pair"),
    (bad_plan(cost=3.0), r"cost must be a pair"),
    (bad_plan(cost="ab"), r"cost\[0\] must be a number, got 'a'"),
]


@pytest.mark.parametrize(("call", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


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
@given(st.sampled_from([(packing.align, 5), (packing.plan, 5)]), st.data())
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
    lengths = random.integers(1, 16_384, 100_000)
    return {
        "align": lambda: packing.align(counts, 2**20, "sampled", 0, keys),
        "plan": lambda: packing.plan(lengths, 16_384),
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


@pytest.mark.parametrize("name", ["align", "plan"])
def test_the_gil_is_released(name):
    """A call that held the GIL would stop this thread from its start to its end, every time."""
    call = long_calls()[name]
    assert min(stopped_share(call) for _ in range(4)) < 0.5
