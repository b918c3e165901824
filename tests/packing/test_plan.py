"""Compare plan and l2_bound with tests/support/naive_packing.py: random, ragged, empty, hostile.

Legend: N sequences, M micro-batches ("bins"), B mini-batches.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import naive_packing as naive
from mgrpo import _packing as packing

words = st.integers(0, 2**64 - 1)
costs = st.sampled_from([(1.0, 0.0), (0.0, 1.0), (1.0, 0.125), (3.0, 2.0), (0.1, 0.3)])


def ints(values: Any) -> NDArray[np.int64]:
    return np.array(values, np.int64)


@st.composite
def plans(draw: st.DrawFn, most: int = 40) -> tuple[list[int], int, int]:
    """Draw lengths, a cap and ranks. Few distinct lengths chain equal bins; large caps have no table of rooms."""
    cap = draw(st.one_of(st.integers(1, 200), st.sampled_from([16_384, 2**40])))
    kinds = draw(st.lists(st.integers(1, cap), min_size=1, max_size=12))
    lengths = draw(st.lists(st.one_of(st.sampled_from(kinds), st.integers(1, cap)), max_size=most))
    return lengths, cap, draw(st.integers(1, 9))


def many(random: np.random.Generator, cap: int) -> list[int]:
    """Draw enough lengths for more bins than are evened out."""
    return np.minimum(random.lognormal(np.log(cap / 6), 1.0, 300).astype(np.int64) + 1, cap).tolist()


def plan(lengths: Any, *args: Any, groups: Any = None, **named: Any) -> list[list[list[int]]]:
    """Return the plan by mini-batch and micro-batch."""
    groups_N = None if groups is None else ints(groups)
    made = packing.plan(ints(lengths), *args, groups_N=groups_N, **named)
    assert all(type(array) is np.ndarray and array.dtype == np.int64 for array in made)
    offsets_M1, ids_N, mini_B1 = (array.tolist() for array in made)
    assert offsets_M1[0] == mini_B1[0] == 0 and offsets_M1[-1] == len(ids_N) and mini_B1[-1] == len(offsets_M1) - 1
    bins = [ids_N[a:b] for a, b in itertools.pairwise(offsets_M1)]
    return [bins[a:b] for a, b in itertools.pairwise(mini_B1)]


def bins_of(*args: Any, **named: Any) -> list[list[int]]:
    (bins,) = plan(*args, **named)
    return bins


def price(lengths: list[int], cost: tuple[float, float], ids: list[int]) -> float:
    return sum(cost[0] * lengths[n] + cost[1] * lengths[n] ** 2 for n in ids)


@given(plans(), costs)
def test_plan_is_the_naive_one(drawn, cost):
    lengths, cap, ranks = drawn
    assert plan(lengths, cap, ranks, cost, allow_empty=True) == naive.plan(lengths, cap, ranks, cost, allow_empty=True)


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.integers(8, 400), st.integers(1, 40), costs)
def test_plan_of_many_is_the_naive_one(seed, cap, ranks, cost):
    lengths = many(np.random.default_rng(seed), cap)
    assert plan(lengths, cap, ranks, cost, allow_empty=True) == naive.plan(lengths, cap, ranks, cost, allow_empty=True)


@given(plans(most=25), costs, st.integers(1, 4), words, st.data())
def test_plan_of_groups_and_mini_batches_is_the_naive_one(drawn, cost, mini_batches, seed, data):
    lengths, cap, ranks = drawn
    name = st.integers(-(2**63), -(2**63) + 5) | st.integers(-3, 3) | st.just(2**63 - 1)
    groups = data.draw(st.none() | st.lists(name, min_size=len(lengths), max_size=len(lengths)))
    rows = Counter[int]()
    rows.update({name: 0 for name in groups or ()})
    for name, length in zip(groups or (), lengths, strict=bool(groups)):
        rows[name] += length
    assume(max(rows.values(), default=0) <= cap)
    named = {"groups": groups, "mini_batches": mini_batches, "seed": seed, "allow_empty": True}
    assert plan(lengths, cap, ranks, cost, **named) == naive.plan(lengths, cap, ranks, cost, **named)


@given(plans(), costs, st.booleans())
def test_plan_holds_every_sequence_once_within_the_cap(drawn, cost, allow_empty):
    lengths, cap, ranks = drawn
    fewest = len(naive.best_fit_decreasing(lengths, cap))
    count = -(-max(fewest, allow_empty) // ranks) * ranks
    if not allow_empty and len(lengths) < count:
        with pytest.raises(ValueError, match=f"{len(lengths)} sequences are too few for the {count} micro-batches"):
            plan(lengths, cap, ranks, cost)
        return
    bins = bins_of(lengths, cap, ranks, cost, allow_empty=allow_empty)
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
    """Check that no micro-batch costs more than one of the turn before, so those side by side are neighbours."""
    lengths, cap, ranks = drawn
    prices = [price(lengths, cost, ids) for ids in bins_of(lengths, cap, ranks, cost, allow_empty=True)]
    turns = [prices[j : j + ranks] for j in range(0, len(prices), ranks)]
    assert all(min(before) >= max(after) * (1 - 1e-12) for before, after in itertools.pairwise(turns))


@given(plans(), st.integers(1, 5), words, st.integers(1, 6))
def test_plan_keeps_groups_together(drawn, mini_batches, seed, size):
    lengths, cap, ranks = drawn
    lengths = [min(length, max(cap // size, 1)) for length in lengths]
    groups = np.random.default_rng(seed).permutation(np.arange(len(lengths)) // min(size, cap)) * 7 - 20
    named = {"groups": groups, "mini_batches": mini_batches, "seed": seed, "allow_empty": True}
    parts = plan(lengths, cap, ranks, **named)
    bins = list(itertools.chain(*parts))
    assert sorted(itertools.chain(*bins)) == list(range(len(lengths)))
    assert all(sum(lengths[n] for n in ids) <= cap for ids in bins)
    assert len(set(groups)) == sum(len(set(groups[ids])) for ids in bins if ids)


@given(plans(), costs, st.integers(1, 5), words)
def test_mini_batches_cost_alike(drawn, cost, mini_batches, seed):
    """Check that no two mini-batches differ by more than the most expensive sequence, and that all turns are full."""
    lengths, cap, ranks = drawn
    parts = plan(lengths, cap, ranks, cost, mini_batches=mini_batches, seed=seed, allow_empty=True)
    assert len(parts) == mini_batches
    assert all(len(bins) % ranks == 0 for bins in parts)
    prices = [price(lengths, cost, list(itertools.chain(*bins))) for bins in parts]
    dearest = max((price(lengths, cost, [n]) for n in range(len(lengths))), default=0.0)
    assert max(prices) - min(prices) <= dearest * (1 + 1e-9)


def test_mini_batches_of_many_cost_the_same():
    lengths, cost = many(np.random.default_rng(1), 16_384), (1.0, 1e-4)
    parts = plan(lengths, 16_384, 4, cost, mini_batches=4)
    prices = [price(lengths, cost, list(itertools.chain(*bins))) for bins in parts]
    assert max(prices) < 1.001 * min(prices)


def test_another_seed_deals_other_mini_batches():
    """Check that two seeds divide about half of 300 sequences differently into two mini-batches, and one seed none."""
    lengths = [100 + n % 5 for n in range(300)]
    first = [{*itertools.chain(*plan(lengths, 1000, 2, mini_batches=2, seed=seed)[0])} for seed in range(20)]
    assert first[3] == {*itertools.chain(*plan(lengths, 1000, 2, mini_batches=2, seed=3)[0])}
    assert all(60 < len(a & b) < 90 for a, b in itertools.combinations(first, 2))


def test_the_seed_does_not_touch_one_mini_batch():
    lengths = many(np.random.default_rng(2), 500)
    assert plan(lengths, 500, 8, seed=1) == plan(lengths, 500, 8, seed=2)


def lockstep(lengths: NDArray[np.int64], cost: tuple[float, float], ranks: int) -> NDArray[np.float64]:
    """Return the most expensive micro-batch of each turn over the mean of the turn."""
    offsets_M1, ids_N, _ = packing.plan(lengths, 16_384, ranks, cost)
    cost_N = cost[0] * lengths + cost[1] * lengths.astype(np.float64) ** 2
    turns = np.add.reduceat(cost_N[ids_N], offsets_M1[:-1]).reshape(-1, ranks)
    return turns.max(1) / turns.mean(1)


@pytest.mark.parametrize(
    ("sequences", "square", "most"),
    [(300, 0.0, 1.02), (450, 0.0, 1.02), (1000, 0.0, 1.005), (10_000, 0.0, 1.001), (10_000, 1 / 8000, 1.005)],
)
def test_plan_keeps_ranks_busy(sequences, square, most):
    """Check the balance; a random assignment has 1.3 or more."""
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(1500), 1.0, sequences), 1, 16_384).astype(np.int64)
    assert lockstep(lengths, (1.0, square), 8).mean() <= most


def test_plan_spreads_what_would_leave_a_remainder():
    """Plan nine bins' worth for eight ranks: sixteen even bins, not nine full and seven nearly empty ones."""
    lengths = [10] * 900
    rows = [10 * len(ids) for ids in bins_of(lengths, 1000, 8)]
    assert len(rows) == 16 and max(rows) <= 1.05 * 9000 / 16


def test_plan_without_sequences():
    assert [array.tolist() for array in packing.plan(ints([]), 8, 4)] == [[0], [], [0, 0]]
    assert [array.tolist() for array in packing.plan(ints([]), 8, 4, mini_batches=2)] == [[0], [], [0, 0, 0]]
    assert plan([], 8, 3, mini_batches=2, allow_empty=True) == [[[], [], []], [[], [], []]]
    assert plan([], 8, groups=[]) == [[]]


@pytest.mark.parametrize("cap", [2**24, 2**24 + 1, 2**62, 2**63 - 1])
def test_plan_takes_large_caps(cap):
    assert bins_of([1, min(cap, 2**62)], cap) == ([[1, 0]] if cap > 2**62 else [[1], [0]])


# ---- l2_bound


@given(plans())
def test_l2_bound_is_the_naive_one(drawn):
    lengths, cap, _ = drawn
    assume(cap <= 200)
    assert packing.l2_bound(ints(lengths), cap) == naive.l2_bound(lengths, cap)


@given(plans())
def test_l2_bound_is_below_what_best_fit_decreasing_needs_and_above_the_mean(drawn):
    lengths, cap, _ = drawn
    bound = packing.l2_bound(ints(lengths), cap)
    assert -(-sum(lengths) // cap) <= bound <= len(naive.best_fit_decreasing(lengths, cap))


def test_l2_bound_of_rows_beyond_the_largest_integer():
    """Use three large items that leave more room than fits in 64 bits, none of it usable."""
    third = 2**61
    assert packing.l2_bound(ints([third + 1, third + 1, third + 1]), 2 * third) == 3
    assert packing.l2_bound(ints([2**62, *[1] * 40]), 2**63 - 1) == 1


# ---- mistakes


def bad_plan(**changes: Any) -> Callable[[], Any]:
    columns = {"lengths": ints([2, 3]), "cap": 4, "ranks": 1, "cost": (1.0, 0.0)}
    named = {key: value for key, value in changes.items() if key not in columns}
    return lambda: packing.plan(*(columns | {k: v for k, v in changes.items() if k in columns}).values(), **named)


def misaligned() -> NDArray[np.int64]:
    return np.frombuffer(bytes(17), np.uint8)[1:].view(np.int64)


MISTAKES = [
    (bad_plan(lengths=ints([2, 0])), r"lengths\[1\] is 0, expected at least 1"),
    (bad_plan(lengths=ints([5, 2])), r"lengths\[0\] is 5, more than cap 4"),
    (bad_plan(lengths=ints([2**62, 2**62]), cap=2**62), r"lengths\[1\] is \d+: the sum exceeds the largest 64-bit"),
    (bad_plan(lengths=np.ones(2)), r"lengths must be a .* array of int64, got a float64"),
    (bad_plan(cap=0), r"cap must be at least 1, got 0"),
    (bad_plan(cap=None), r"cap must be a 64-bit integer, got None"),
    (bad_plan(ranks=0), r"ranks must be from 1 to 1048576, got 0"),
    (bad_plan(ranks=2**62), r"ranks must be from 1 to 1048576, got 4611686018427387904"),
    (bad_plan(ranks=3), r"2 sequences are too few for the 3 micro-batches that ranks = 3 needs"),
    (bad_plan(cost=(-1.0, 0.0)), r"cost must be two finite numbers.*got \(-1, 0\)"),
    (bad_plan(cost=(0.0, 0.0)), r"cost must be two finite numbers.*got \(0, 0\)"),
    (bad_plan(cost=(1.0, float("nan"))), r"cost must be two finite numbers.*got \(1, nan\)"),
    (bad_plan(cost=(0.0, 1e308)), r"cost \(0, 1e\+308\) is too large: that of the 5 rows in all"),
    (bad_plan(cost=(1.0,)), r"cost must be a pair"),
    (bad_plan(cost=3.0), r"cost must be a pair"),
    (bad_plan(cost=np.array(3.0)), r"cost must be a pair"),
    (bad_plan(cost="ab"), r"cost\[0\] must be a number, got 'a'"),
    (bad_plan(lengths=misaligned()), r"lengths must be a one-dimensional contiguous array of int64"),
    (bad_plan(lengths=np.arange(1, 9)[::2]), r"lengths must be .* shape \(4,\), not contiguous"),
    (bad_plan(groups_N=ints([1])), r"groups has 1 entries, expected one for each of the 2 lengths"),
    (bad_plan(groups_N=ints([-7, -7])), r"groups: group -7 has 5 rows in all, more than cap 4"),
    (bad_plan(groups_N=np.array([1, 2], np.int32)), r"groups must be a .* array of int64, got a int32"),
    (bad_plan(groups_N=ints([5, 5]), cap=5, ranks=2), r"1 groups are too few for the 2 micro-batches"),
    (bad_plan(mini_batches=0), r"mini_batches must be from 1 to 1048576 at ranks = 1, got 0"),
    (bad_plan(mini_batches=2**19, ranks=4), r"mini_batches must be from 1 to 262144 at ranks = 4, got 524288"),
    (bad_plan(mini_batches=3), r"0 sequences are too few for the 1 micro-batches that ranks = 1 needs"),
    (bad_plan(seed=-1), r"seed must be an integer from 0 to 2\^64 - 1, got -1"),
    (bad_plan(seed=2**64), r"seed must be an integer from 0 to 2\^64 - 1, got 18446744073709551616"),
    (lambda: packing.l2_bound(ints([3]), 2), r"lengths\[0\] is 3, more than cap 2"),
    (lambda: packing.l2_bound(ints([]), 0), r"cap must be at least 1, got 0"),
]


@pytest.mark.parametrize(("call", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


EXTREMES = [-(2**63), -1, 0, 1, 2, 3, 7, 2**31, 2**63 - 1]
scalars = st.one_of(st.sampled_from([*EXTREMES, 2**64, 1.5, float("nan"), None, "x", "sampled", (1.0, 1.0), True]))
dtypes = st.sampled_from([np.int64, np.int64, np.int64, np.uint64, np.int32, np.bool_, np.float32])
arrays = st.builds(
    lambda values, dtype: np.array(values, np.int64).astype(dtype),
    st.lists(st.sampled_from(EXTREMES), max_size=4),
    dtypes,
)
anything = st.one_of(arrays, arrays, scalars)
NAMED = {"groups_N": anything, "mini_batches": scalars, "seed": scalars, "allow_empty": scalars}


@settings(max_examples=300)
@given(st.sampled_from([(packing.plan, 4), (packing.l2_bound, 2), (packing.align, 5)]), st.data())
def test_hostile_arguments_are_refused(function, data):
    """Check that any arguments lead to a result or a Python error, never to a crash."""
    call, arity = function
    arguments = data.draw(st.lists(anything, min_size=arity, max_size=arity))
    named = data.draw(st.fixed_dictionaries({}, optional=NAMED)) if call is packing.plan else {}
    try:
        call(*arguments, **named)
    except (ValueError, TypeError):
        return
