"""The packer in plain Python, written to be read: what `mgrpo._packing` must give, number for number.

Legend: R rollouts; N sequences of T tokens in all; B sequences in a batch of P rows; M micro-batches ("bins").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

WORD = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(x: int) -> int:
    """The output function of splitmix64 (Steele, Lea and Flood 2014)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def draws(seed: int, key: int) -> Callable[[int], int]:
    """A function that gives the next number, uniform in [0, bound)."""
    state = mix((mix((seed + GOLDEN) & WORD) + key) & WORD)

    def below(bound: int) -> int:
        nonlocal state
        while True:
            state = (state + GOLDEN) & WORD
            draw = mix(state)
            if draw >= 2**64 % bound:
                return draw % bound

    return below


def align(counts: Sequence[int], target: int, mode: str, seed: int, keys: Sequence[int]) -> list[float]:
    copies: list[float] = []
    for count, key in zip(counts, keys, strict=True):
        below = draws(seed, key)
        if count == 0:
            continue
        if mode == "expected":
            copies += [target / count] * count
        elif count <= target:
            extra = [below(count) for _ in range(target - count)]
            copies += [1.0 + extra.count(i) for i in range(count)]
        else:
            chosen: set[int] = set()
            for last in range(count - target, count):
                drawn = below(last + 1)
                chosen.add(last if drawn in chosen else drawn)
            copies += [float(i in chosen) for i in range(count)]
    return copies


def trainable_rows(trajectories: Sequence[Sequence[bool]]) -> list[int]:
    return [max((t for t, sampled in enumerate(flags) if sampled), default=0) for flags in trajectories]


def best_fit_decreasing(lengths: Sequence[int], cap: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[int] = []
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        fits = [m for m in range(len(bins)) if room[m] >= lengths[n]]
        if not fits:
            bins.append([])
            room.append(cap)
        m = min(fits, key=lambda m: room[m], default=len(bins) - 1)
        bins[m].append(n)
        room[m] -= lengths[n]
    return bins


def plan(
    lengths: Sequence[int], cap: int, ranks: int = 1, cost: tuple[float, float] = (1.0, 0.0), allow_empty: bool = False
) -> list[list[int]]:
    """Best-fit decreasing under the smallest cap that keeps the number of bins, filled up by halving, then dealt."""

    def price(ids: Sequence[int]) -> float:
        total = 0.0
        for n in ids:
            total += cost[0] * lengths[n] + cost[1] * lengths[n] * lengths[n]
        return total

    bins = best_fit_decreasing(lengths, cap)
    count = -(-max(len(bins), int(allow_empty)) // ranks) * ranks
    low, high = max(max(lengths, default=0), sum(lengths) // max(count, 1)), min(cap, sum(lengths))
    while high - low > high // 64:
        middle = (low + high) // 2
        tried = best_fit_decreasing(lengths, middle)
        low, high, bins = (low, middle, tried) if len(tried) <= count else (middle + 1, high, bins)
    while len(bins) < count and any(len(ids) > 1 for ids in bins):
        m = max((m for m in range(len(bins)) if len(bins[m]) > 1), key=lambda m: (price(bins[m]), m))
        halves: tuple[list[int], list[int]] = [], []
        for n in bins[m]:
            halves[price(halves[1]) < price(halves[0])].append(n)
        bins[m] = halves[0]
        bins.append(halves[1])
    bins += [[]] * (count - len(bins))
    bins.sort(key=lambda ids: -price(ids))
    groups = [bins[j : j + ranks] for j in range(0, len(bins), ranks)]
    return [ids for j, group in enumerate(groups) for ids in (group[::-1] if j % 2 else group)]


def fill(
    tokens: NDArray[Any],
    offsets: Sequence[int],
    sampled: NDArray[Any],
    ids: Sequence[int],
    rows: Sequence[int],
    advantages: NDArray[Any],
    weights: NDArray[Any],
    logprobs: dict[str, NDArray[Any]],
    live: str | None = None,
    narrow: bool = False,
) -> dict[str, Any]:
    """`logprobs`: by output key. Sums of weights are exact where weights are small multiples of a power of two."""
    types = {**FILLED, **dict.fromkeys(IDS, np.int32 if narrow else np.int64), **dict.fromkeys(logprobs, np.float32)}
    out: dict[str, list[Any]] = {key: [] for key in types}
    lives, actions, weight_sum = [], 0, 0.0
    out["cu_seqlens"].append(0)
    for b, n in enumerate(ids):
        for i in range(rows[n]):
            t = offsets[n] + i
            action = bool(sampled[t + 1])
            if action and weights[n] != 0 and (live == "weight" or advantages[n] != 0):
                lives.append(len(out["input_ids"]))
            actions += action
            weight_sum += float(weights[n]) if action else 0.0
            out["input_ids"].append(tokens[t])
            out["positions"].append(i)
            out["targets"].append(tokens[t + 1])
            out["action_mask"].append(action)
            out["weights"].append(weights[n] if action else 0.0)
            out["advantages"].append(advantages[n])
            out["segment_ids"].append(b)
            for key, values in logprobs.items():
                out[key].append(values[t + 1] if action else 0.0)
        out["cu_seqlens"].append(len(out["input_ids"]))
    made: dict[str, Any] = {key: np.array(values, types[key]) for key, values in out.items()}
    if live is not None:
        made["live_rows"] = np.array(lives, np.int64)
    longest = max((rows[n] for n in ids), default=0)
    return made | {"max_seqlen": longest, "sequences": len(ids), "actions": actions, "weight_sum": weight_sum}


def from_lists(lists: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    values = [value for each in lists for value in each]
    return values, [sum(map(len, lists[:n])) for n in range(len(lists) + 1)]


IDS = ("input_ids", "positions", "targets")
FILLED: dict[str, Any] = {
    "cu_seqlens": np.int32,
    "action_mask": np.bool_,
    "weights": np.float32,
    "advantages": np.float32,
    "segment_ids": np.int32,
}
