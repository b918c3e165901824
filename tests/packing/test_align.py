"""Compare align with tests/support/naive_packing.py; test its statistics, and what it refuses.

Legend: R rollouts, T trajectories.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import naive_packing as naive
from mgrpo import _packing as packing

words = st.integers(0, 2**64 - 1)


def ints(values: Any) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def keys_of(values: Any) -> NDArray[np.uint64]:
    return np.array(values, np.uint64)


def align(counts: Any, target: int, keys: Any, mode: str = "sampled", seed: int = 0) -> NDArray[np.float64]:
    return packing.align(ints(counts), target, mode, seed, keys_of(keys))


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
    # 9 degrees of freedom: exceeds 45 once in a million
    assert chi_square(Counter(map(tuple, copies)), dict.fromkeys(subsets, 1 / 10), rollouts) < 45


def test_align_repeats_uniformly_and_independently():
    rollouts, count, target = 20_000, 3, 5
    copies = align([count] * rollouts, target, range(rollouts), seed=11).reshape(rollouts, count)
    pairs = Counter(tuple(1.0 + (np.bincount(pair, minlength=3))) for pair in itertools.product(range(3), repeat=2))
    # 5 degrees of freedom: exceeds 37 once in a million
    assert chi_square(Counter(map(tuple, copies)), {k: n / 9 for k, n in pairs.items()}, rollouts) < 37


@pytest.mark.parametrize(("count", "target"), [(3, 8), (8, 3), (7, 1), (1, 7)])
def test_align_samples_around_the_expected_mode(count, target):
    """Check that the mean of sampled multiplicities over seeds is the expected one: the same gradient on average."""
    mean = np.mean([align([count], target, [5], seed=seed) for seed in range(4000)], axis=0)
    np.testing.assert_allclose(mean, align([count], target, [5], "expected"), atol=0.12)


# ---- mistakes


def bad_align(**changes: Any) -> Callable[[], Any]:
    named = {"counts": ints([2, 3]), "target": 2, "mode": "sampled", "seed": 0, "keys": keys_of([1, 2])} | changes
    return lambda: packing.align(*named.values())


def misaligned() -> NDArray[np.int64]:
    return np.frombuffer(bytes(17), np.uint8)[1:].view(np.int64)


MISTAKES = [
    (bad_align(counts=ints([2, -3])), r"counts\[1\] is -3, expected at least 0"),
    (bad_align(counts=ints([2, 2**62])), r"counts\[1\] is 4611686018427387904: the sum exceeds 268435456"),
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
    (bad_align(mode=np.zeros(2, "i8,i8")), r"mode must be .sampled. or .expected., got array"),
]


@pytest.mark.parametrize(("call", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
