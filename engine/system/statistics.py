"""Compute intervals of proportions and of means over tasks, and pass@k.

Intervals of proportions are by Wilson's score (JASA 1927), which is accurate even near 0 and 1. A score between 0 and 1
that is not simply yes or no varies less than a coin with the same mean, so its interval here is wider than necessary.

If a task was sampled several times, its samples are alike, so that only tasks may be counted: such intervals are by the
bootstrap over tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959963984540054  # 95 % of a standard normal distribution lies within plus or minus Z
RESAMPLES = 4000  # of a bootstrap: its bounds then move by less than a fiftieth of its width from seed to seed
PIECE = 1 << 22  # most numbers that a bootstrap draws at a time


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a proportion of which `successes` of n were observed.

    Returns (nan, nan) if successes is outside 0..n, as scores of an environment may be. Raises ValueError if n < 1.
    """
    if n < 1:
        raise ValueError(f"n: {n} given, expected at least one question")
    share = successes / n
    if not 0 <= share <= 1:
        return math.nan, math.nan
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(share * (1 - share) / n + (Z / (2 * n)) ** 2) / (1 + Z**2 / n)
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))


def difference(successes_a: float, n_a: int, successes_b: float, n_b: int) -> tuple[float, float]:
    """Return the 95 % interval of b's proportion minus a's, for two independent samples.

    Source: Newcombe 1998, Stat. Med. 17:873, method 10. Returns (nan, nan) and raises ValueError as `wilson` does.
    """
    share_a, share_b = successes_a / max(n_a, 1), successes_b / max(n_b, 1)
    (low_a, high_a), (low_b, high_b) = wilson(successes_a, n_a), wilson(successes_b, n_b)
    middle = share_b - share_a
    low = middle - math.hypot(share_b - low_b, high_a - share_a)
    return low, middle + math.hypot(high_b - share_b, share_a - low_a)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return the unbiased estimate of the probability that any of k samples is correct, if `correct` of n were.

    Source: Chen et al. 2021, arXiv 2107.03374, Eq. 1: 1 - C(n - correct, k) / C(n, k), as a product, as binomials are
    too large for floats. Raises ValueError unless 1 <= k <= n and 0 <= correct <= n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@k: k = {k} given: expected 1 to {n}, the number of samples of a task")
    if not 0 <= correct <= n:
        raise ValueError(f"pass@k: {correct} of {n} samples correct given: expected 0 to {n}")
    if n - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - correct + 1, n + 1))


def bootstrap(values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean of some values, one for each task, by drawing tasks again.

    Returns (nan, nan) for fewer than two values, which say nothing of how tasks differ. Equal values give an interval
    without width: none of them shows how others would be. Source: Efron 1979, Ann. Stat. 7:1; the seed makes it repeat.
    """
    values_N = np.asarray(values, np.float64)
    if len(values_N) < 2:
        return math.nan, math.nan
    random, rows = np.random.default_rng(seed), max(1, PIECE // len(values_N))
    means = [
        values_N[random.integers(len(values_N), size=(min(rows, resamples - first), len(values_N)))].mean(1)
        for first in range(0, resamples, rows)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def mean_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of the mean of some values from 0 to 1, one for each task.

    It is that of `bootstrap`, but Wilson's where all values are equal, as when every task is solved: that of the
    bootstrap would claim certainty.
    """
    if len(values) > 1 and min(values) == max(values):
        return wilson(sum(values), len(values))
    return bootstrap(values, seed)
