"""Define the packer in plain, readable Python: `mgrpo._packing` must return the same numbers.

Legend: R rollouts; N sequences of T tokens in all; B sequences in a batch of P rows; M micro-batches ("bins").
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

WORD = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(x: int) -> int:
    """Compute the output function of splitmix64 (Steele, Lea and Flood 2014)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def draws(seed: int, key: int) -> Callable[[int], int]:
    """Return a function that draws the next number, uniform in [0, bound)."""
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


def best_fit_decreasing(lengths: Sequence[int], cap: int, ids: Sequence[int] | None = None) -> list[list[int]]:
    """Pack best-fit decreasing; among bins with the least room, choose the one that reached it last."""
    bins: list[list[int]] = []
    room: list[int] = []
    latest: list[int] = []
    for moment, n in enumerate(sorted(range(len(lengths)) if ids is None else ids, key=lambda n: -lengths[n])):
        fits = [m for m in range(len(bins)) if room[m] >= lengths[n]]
        if not fits:
            fits = [len(bins)]
            bins.append([])
            room.append(cap)
            latest.append(moment)
        m = min(fits, key=lambda m: (room[m], -latest[m]))
        bins[m].append(n)
        room[m] -= lengths[n]
        latest[m] = moment
    return bins


def added_up(numbers: Iterable[float]) -> float:
    """Add the numbers one after another: Python's own sum rounds less."""
    return functools.reduce(operator.add, numbers, 0.0)


FEW, TRIES = 32, 8


@dataclass(frozen=True)
class Items:
    """Hold what is put into bins: sequences, or groups of them."""

    rows: Sequence[int]
    costs: Sequence[float]

    def price(self, ids: Sequence[int]) -> float:
        return added_up(self.costs[n] for n in ids)

    def dearest_first(self, bins: list[list[int]]) -> list[list[int]]:
        return sorted(bins, key=lambda ids: -self.price(ids))


def halved(items: Items, bins: Sequence[list[int]], count: int) -> list[list[int]]:
    """Halve the most expensive bin repeatedly until there are `count` bins."""
    bins = list(bins)
    while len(bins) < count and any(len(ids) > 1 for ids in bins):
        m = max((m for m in range(len(bins)) if len(bins[m]) > 1), key=lambda m: (items.price(bins[m]), m))
        halves: tuple[list[int], list[int]] = [], []
        for n in bins[m]:
            halves[items.price(halves[1]) < items.price(halves[0])].append(n)
        bins[m] = halves[0]
        bins.append(halves[1])
    return bins + [[]] * (count - len(bins))


def dealt_anew(items: Items, bins: Sequence[list[int]], cap: int, count: int) -> list[list[int]] | None:
    """Put each item into the cheapest bin with room."""
    dealt: list[list[int]] = [[] for _ in range(count)]
    for n in sorted(itertools.chain(*bins), key=lambda n: -items.rows[n]):
        few = sorted(dealt, key=items.price)[:TRIES]
        roomy = [ids for ids in few if sum(items.rows[i] for i in ids) + items.rows[n] <= cap]
        if not roomy:
            return None
        roomy[0].append(n)
    return dealt


def even_out(items: Items, bins: list[list[int]], cap: int, count: int, ranks: int) -> list[list[int]]:
    kept = items.dearest_first(halved(items, bins, count))
    anew = dealt_anew(items, bins, cap, count)
    if anew is None:
        return kept
    anew = items.dearest_first(anew)
    prices, before = [items.price(ids) for ids in anew], [items.price(ids) for ids in kept]
    better = prices[0] <= max(map(items.price, bins)) and sum(prices[::ranks]) < sum(before[::ranks])
    return anew if better else kept


def pack(items: Items, ids: Sequence[int], cap: int, ranks: int, allow_empty: bool) -> list[list[int]]:
    """Pack one mini-batch."""
    bins = items.dearest_first(best_fit_decreasing(items.rows, cap, ids))
    count = -(-max(len(bins), int(allow_empty or len(items.rows) > 0)) // ranks) * ranks
    few = min(-(-FEW // ranks) * ranks, count)
    while few < count and sum(map(len, bins[count - few :])) < few:
        few += ranks
    if bins:
        bins[count - few :] = even_out(items, bins[count - few :], cap, few, ranks)
    bins += [[]] * (count - len(bins))
    turns = [bins[j : j + ranks] for j in range(0, len(bins), ranks)]
    return [ids for j, turn in enumerate(turns) for ids in (turn[::-1] if j % 2 else turn)]


def deal_out(items: Items, parts: int, seed: int) -> list[list[int]]:
    """Put each item, most expensive first, into the cheapest mini-batch; shuffle those of nearly the same cost."""

    def key(n: int) -> tuple[int, int]:
        mantissa, exponent = math.frexp(items.costs[n])
        return -(16 * exponent + int((mantissa - 0.5) * 32)), mix((mix((seed + GOLDEN) & WORD) + n) & WORD) >> 16

    dealt: list[list[int]] = [[] for _ in range(parts)]
    for n in sorted(range(len(items.rows)), key=key):
        min(dealt, key=items.price).append(n)
    return [sorted(ids) for ids in dealt]


def plan(
    lengths: Sequence[int],
    cap: int,
    ranks: int = 1,
    cost: tuple[float, float] = (1.0, 0.0),
    *,
    groups: Sequence[int] | None = None,
    mini_batches: int = 1,
    seed: int = 0,
    allow_empty: bool = False,
) -> list[list[list[int]]]:
    """Return the plan by mini-batch and micro-batch."""
    names = range(len(lengths)) if groups is None else groups
    members = [[n for n in range(len(lengths)) if names[n] == name] for name in sorted(set(names))]
    price = [cost[0] * length + cost[1] * length * length for length in lengths]
    rows = [sum(lengths[n] for n in ids) for ids in members]
    items = Items(rows, [added_up(price[n] for n in ids) for ids in members])
    return [
        [[n for i in ids for n in members[i]] for ids in pack(items, part, cap, ranks, allow_empty)]
        for part in deal_out(items, mini_batches, seed)
    ]


def l2_bound(lengths: Sequence[int], cap: int) -> int:
    """Compute L2 of Martello and Toth (1990): the best bound over all limits below which items are ignored."""

    def bound(limit: int) -> int:
        alone = [rows for rows in lengths if rows > cap - limit]
        large = [rows for rows in lengths if cap - limit >= rows > cap / 2]
        small = [rows for rows in lengths if cap / 2 >= rows >= limit]
        rest = sum(small) - (len(large) * cap - sum(large))
        return len(alone) + len(large) + max(0, -(-rest // cap))

    return max(bound(limit) for limit in range(cap // 2 + 1))


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
    """Fill one micro-batch.  logprobs: by output key.  Small multiples of a power of two give exact sums."""
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
    longest = max((int(rows[n]) for n in ids), default=0)
    return made | {"max_seqlen": longest, "sequences": len(ids), "actions": actions, "weight_sum": weight_sum}


IDS = ("input_ids", "positions", "targets")
FILLED: dict[str, Any] = {
    "cu_seqlens": np.int32,
    "action_mask": np.bool_,
    "weights": np.float32,
    "advantages": np.float32,
    "segment_ids": np.int32,
}


def from_lists(lists: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    values = [value for each in lists for value in each]
    return values, [sum(map(len, lists[:n])) for n in range(len(lists) + 1)]
