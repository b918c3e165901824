"""Compute intervals of proportions by Wilson's score (JASA 1927), which is accurate even near 0 and 1.

A score between 0 and 1 that is not simply yes or no varies less than a coin with the same mean, so its interval here is
wider than necessary.
"""

from __future__ import annotations

import math

Z = 1.959963984540054  # 95 % of a standard normal distribution lies within plus or minus Z


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
