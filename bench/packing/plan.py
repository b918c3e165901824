"""Measure the plan: time against the peers, bins against best-fit decreasing and the lower bound, ranks' imbalance.

Every planner gets the same lengths, in the form that it takes without conversion. The bounds are computed here, by code
that shares nothing with the planner.

Legend: N sequences, M micro-batches ("bins").
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from mgrpo import _packing
from mgrpo.bench.harness import Result, Timing, figure, interleave
from mgrpo.bench.packing.peers import planners

RANKS = 8
# A decoder layer of hidden size H does 24*H^2*L multiply-adds' worth of matmuls and 2*H*L^2 of causal attention: at
# H = 4096 a sequence of L rows costs L + L^2 / 49152.
COST = (1.0, 1 / 49152)


@dataclass(frozen=True)
class Mix:
    """Describe a distribution of lengths."""

    name: str
    words: str
    cap: int

    def lengths(self, count: int) -> NDArray[np.int64]:
        """Draw `count` lengths."""
        random = np.random.default_rng(count)
        drawn = _agents(random, count) if self.name == "agents" else _lognormal(random, count, 1500, 1.0)
        return drawn.clip(1 if self.name == "log-normal" else 200, self.cap).astype(np.int64)


LOG_NORMAL = Mix("log-normal", "lengths log-normal, median 1500, sigma 1, clipped to 1..16384 = cap", 16384)
AGENTS = Mix(
    "agents",
    "rollouts of one main trajectory (log-normal, median 6000, sigma 0.8) and 0 to 48 sub-agent ones (geometric, mean "
    "5; log-normal, median 1500, sigma 0.9), clipped to 200..32768 = cap",
    32768,
)
MIXES = (LOG_NORMAL, AGENTS)
WORDS = f"plan: {RANKS} ranks, a sequence of L rows costs L + L^2 / {1 / COST[1]:.0f}; " + "; ".join(
    f"{mix.name}: {mix.words}" for mix in MIXES
)


def _lognormal(random: np.random.Generator, count: int, median: float, sigma: float) -> NDArray[np.float64]:
    return random.lognormal(np.log(median), sigma, count)


def _agents(random: np.random.Generator, count: int) -> NDArray[np.float64]:
    """Draw the lengths of rollouts: each is a main trajectory, followed by those of its sub-agents."""
    subs_R = np.minimum(random.geometric(1 / 6, count) - 1, 48)
    starts_R = np.cumsum(subs_R + 1) - subs_R - 1
    mains = starts_R[starts_R < count]
    lengths_N = _lognormal(random, count, 1500, 0.9)
    lengths_N[mains] = _lognormal(random, len(mains), 6000, 0.8)
    return lengths_N


def best_fit_decreasing(lengths_N: NDArray[np.int64], cap: int) -> int:
    """Return the number of bins if each sequence goes where it leaves the least room."""
    rooms: list[int] = []  # ascending, each value once
    bins: Counter[int] = Counter()  # by their room
    for length in np.sort(lengths_N)[::-1].tolist():
        place = bisect_left(rooms, length)
        room = rooms[place] if place < len(rooms) else cap
        if place < len(rooms):
            bins[room] -= 1
            if bins[room] == 0:
                del rooms[place]
        if bins[room - length] == 0:
            insort(rooms, room - length)
        bins[room - length] += 1
    return bins.total()


def lower_bound(lengths_N: NDArray[np.int64], cap: int) -> int:
    """Return L2 of Martello and Toth (1990), a lower bound on the number of bins of size `cap`.

    For each a <= cap/2, every length above cap/2 needs its own bin. Lengths from a to cap/2 must fit into the room that
    lengths of more than cap/2 and at most cap - a leave in their bins, or else into further bins.
    """
    up_N = np.sort(lengths_N)
    sums_N1 = np.concatenate([[0], np.cumsum(up_N)])
    smalls_A = np.unique(np.append(up_N[up_N <= cap // 2], 0))
    first_A = np.searchsorted(up_N, smalls_A)
    half = np.searchsorted(up_N, cap // 2, side="right")
    alone_A = np.searchsorted(up_N, cap - smalls_A, side="right")
    room_A = (alone_A - half) * cap - (sums_N1[alone_A] - sums_N1[half])
    over_A = sums_N1[half] - sums_N1[first_A] - room_A
    return int((len(up_N) - half + np.maximum(-(-over_A // cap), 0)).max())


def bin_sums(
    values_N: NDArray[np.float64], offsets_M1: NDArray[np.int64], ids_N: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the sum of the values in each bin."""
    return np.diff(np.concatenate([[0.0], np.cumsum(values_N[ids_N])])[offsets_M1])


def imbalance(cost_M: NDArray[np.float64], ranks: int) -> float:
    """Return the mean over steps of the highest cost over the mean cost among the bins that run side by side."""
    cost_SD = cost_M.reshape(-1, ranks)
    return float((cost_SD.max(1) / cost_SD.mean(1)).mean())


def times(
    name: str, ours: Timing | None, theirs: Timing | None, why: str, *, at_least: float | None = None, unit: str = "x"
) -> Result:
    """Return the other's time divided by ours or, if one of them is missing, the reason."""
    if ours is None or theirs is None:
        return figure(name, None, unit, at_least=at_least, why=why)
    return figure(name, ours.times_faster_than(theirs), unit, at_least=at_least)


def fastest(timings: Iterable[Timing]) -> Timing:
    """Return the fastest of each round."""
    return Timing(tuple(map(min, zip(*(t.rounds for t in timings), strict=True))))


def measure(mix: Mix, count: int, rounds: int) -> list[Result]:
    """Measure the plan of `count` sequences: its time against the peers, and its quality."""
    lengths_N = mix.lengths(count)
    name = f"plan {mix.name} {count:_}"
    peers = planners(lengths_N, mix.cap, RANKS)
    installed = {peer: run for peer, run in peers.items() if run is not None}
    timings = interleave({"ours": lambda: _packing.plan(lengths_N, mix.cap, RANKS, COST), **installed}, rounds=rounds)
    ours, rival = timings["ours"], fastest(timings[peer] for peer in installed) if installed else None
    return [
        figure(f"{name}: time", ours.seconds * 1e3, "ms"),
        times(f"{name}: times the fastest peer", ours, rival, "no peer is installed", at_least=10),
        *(times(f"{name}: times {peer}", ours, timings.get(peer), "not installed") for peer in peers),
        *quality(name, mix, lengths_N),
    ]


def quality(name: str, mix: Mix, lengths_N: NDArray[np.int64]) -> list[Result]:
    """Return the bins against their bounds, and the imbalance of the ranks."""
    offsets_M1, ids_N, _ = _packing.plan(lengths_N, mix.cap, RANKS, COST)
    assert np.array_equal(np.sort(ids_N), np.arange(len(lengths_N)))
    rows_M = bin_sums(lengths_N.astype(np.float64), offsets_M1, ids_N)
    cost_M = bin_sums(COST[0] * lengths_N + COST[1] * lengths_N.astype(np.float64) ** 2, offsets_M1, ids_N)
    best_fit = best_fit_decreasing(lengths_N, mix.cap)
    bins = len(_packing.plan(lengths_N, mix.cap, 1, COST)[0]) - 1
    beyond = len(rows_M) - ceil(best_fit / RANKS) * RANKS
    return [
        figure(f"{name}: bins / best-fit decreasing", bins / best_fit, "", at_most=1),
        figure(f"{name}: bins / lower bound", bins / lower_bound(lengths_N, mix.cap), ""),
        figure(f"{name}: bins beyond a multiple of {RANKS}", beyond, "", at_most=0),
        figure(f"{name}: fullest bin / cap", float(rows_M.max()) / mix.cap, "", at_most=1),
        figure(f"{name}: lockstep imbalance", imbalance(cost_M, RANKS), "", at_most=1.005),
    ]


def results(quick: bool) -> list[Result]:
    """Return all results of the plan."""
    sizes = {10_000: 9, 100_000: 5} if quick else {10_000: 51, 100_000: 21, 1_000_000: 7}
    return [r for mix in MIXES for count, rounds in sizes.items() for r in measure(mix, count, rounds)]
