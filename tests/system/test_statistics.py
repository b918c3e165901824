"""Test intervals against published figures, the test that they invert, and their own coverage."""

from __future__ import annotations

import math
from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgrpo.engine.system import statistics
from mgrpo.engine.system.statistics import Z, bootstrap, difference, mean_interval, pass_at_k, wilson

counts = st.integers(1, 10**9).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@pytest.mark.parametrize(
    "successes, n, low, high",  # Newcombe 1998, Stat. Med. 17:857, table I
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_published_intervals_of_a_proportion(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize(
    "a, n_a, b, n_b, low, high",  # Newcombe 1998, Stat. Med. 17:873, table II, method 10
    [
        (48, 80, 56, 70, 0.0524, 0.3339),
        (3, 10, 9, 10, 0.1705, 0.8090),
        (2, 7, 6, 7, 0.0582, 0.8062),
        (0, 29, 5, 56, -0.0381, 0.1926),
        (0, 20, 0, 10, -0.1611, 0.2775),
        (0, 10, 10, 10, 0.6075, 1.0),
    ],
)
def test_published_intervals_of_a_difference(a, n_a, b, n_b, low, high):
    assert difference(a, n_a, b, n_b) == pytest.approx((low, high), abs=5e-5)


@given(counts)
def test_an_end_is_a_proportion_that_the_score_test_just_does_not_reject(counted):
    successes, n = counted
    share, ends = successes / n, wilson(successes, n)
    assert 0 <= ends[0] <= share <= ends[1] <= 1
    for end in ends:
        if end not in (0.0, 1.0):
            assert abs(share - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / n), rel=1e-5, abs=1e-12)


def test_the_interval_covers_the_truth_about_95_times_in_100():
    n = 200
    for truth in (0.05, 0.3, 0.5, 0.9):
        chance = [comb(n, k) * truth**k * (1 - truth) ** (n - k) for k in range(n + 1)]
        covered = sum(p for k, p in enumerate(chance) if wilson(k, n)[0] <= truth <= wilson(k, n)[1])
        assert 0.93 < covered < 0.975


@given(counts, counts)
def test_swapping_the_samples_mirrors_the_difference(a, b):
    low, high = difference(*a, *b)
    assert difference(*b, *a) == pytest.approx((-high, -low), abs=1e-12)
    assert low <= b[0] / b[1] - a[0] / a[1] <= high


def test_scores_beyond_a_proportion_have_no_interval_and_none_asked_is_an_error():
    assert all(math.isnan(end) for end in (*wilson(3.5, 3), *wilson(-0.5, 3), *difference(1, 3, 4, 3)))
    assert wilson(1.5, 3) == pytest.approx((0.5 - (high := wilson(1.5, 3)[1]) + 0.5, high))
    for broken in (lambda: wilson(0, 0), lambda: difference(1, 2, 0, 0)):
        with pytest.raises(ValueError, match="n: 0 given, expected at least one question"):
            broken()


# ---- pass@k, and means over tasks


def every_choice(n: int, correct: int, k: int) -> float:
    """Return the share of all choices of k among n samples in which any is correct."""
    samples = [True] * correct + [False] * (n - correct)
    choices = list(combinations(samples, k))
    return sum(map(any, choices)) / len(choices)


@pytest.mark.parametrize("n", range(1, 9))
def test_pass_at_k_is_the_share_of_all_choices(n: int):
    for correct in range(n + 1):
        for k in range(1, n + 1):
            assert pass_at_k(n, correct, k) == pytest.approx(every_choice(n, correct, k), abs=1e-12)


def test_pass_at_k_of_many_samples_is_exact():
    assert pass_at_k(10_000, 3, 100) == pytest.approx(1 - comb(9997, 100) / comb(10_000, 100), rel=1e-9)


@pytest.mark.parametrize("n, correct, k", [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1), (0, 0, 1)])
def test_pass_at_k_refuses_what_was_not_sampled(n: int, correct: int, k: int):
    with pytest.raises(ValueError, match=r"pass@k: .* given: expected"):
        pass_at_k(n, correct, k)


def test_the_bootstrap_covers_the_mean_of_a_known_distribution():
    random, covered, times = np.random.default_rng(0), 0, 400
    for seed in range(times):  # 60 tasks, each solved with a probability that is uniform, by 4 samples
        values = random.binomial(4, random.random(60)) / 4
        low, high = bootstrap(values, seed, resamples=500)
        covered += low <= 0.5 <= high
    assert 0.91 <= covered / times <= 0.98


def test_the_bootstrap_repeats_by_its_seed_and_draws_in_pieces_alike(monkeypatch):
    values = np.random.default_rng(1).random(50).tolist()
    assert bootstrap(values, 3) == bootstrap(values, 3) != bootstrap(values, 4)
    whole = bootstrap(values, 3)
    monkeypatch.setattr(statistics, "PIECE", 1000)
    assert bootstrap(values, 3) == whole


def test_one_task_has_no_interval_and_equal_ones_that_of_wilson():
    assert all(map(math.isnan, mean_interval([1.0]))) and all(map(math.isnan, bootstrap([])))
    assert mean_interval([1.0] * 20) == wilson(20, 20) and mean_interval([0.0] * 20) == wilson(0, 20)
    assert bootstrap([0.5] * 20) == (0.5, 0.5)
