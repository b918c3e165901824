"""Intervals of proportions, by Wilson's score (JASA 1927): right also near 0 and 1, where the usual plus-minus is not.

A score between 0 and 1 that is no plain yes or no varies less than a coin of the same mean: its interval is wide.
"""

from __future__ import annotations

import math

Z = 1.959963984540054  # of a standard normal, 95 % lies within plus-minus Z


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95 % interval of a proportion of which `successes` of n were seen.

    (nan, nan) where successes is outside 0..n, as an environment's own scores may be. Raises ValueError if n < 1.
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
    """95 % interval of b's proportion less a's, two independent samples (Newcombe 1998, Stat. Med. 17:873, method 10).

    (nan, nan) and ValueError as `wilson`.
    """
    share_a, share_b = successes_a / max(n_a, 1), successes_b / max(n_b, 1)
    (low_a, high_a), (low_b, high_b) = wilson(successes_a, n_a), wilson(successes_b, n_b)
    middle = share_b - share_a
    low = middle - math.hypot(share_b - low_b, high_a - share_a)
    return low, middle + math.hypot(high_b - share_b, share_a - low_a)
