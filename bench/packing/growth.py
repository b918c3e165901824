"""Measure how the packer's time grows: the plan's with the number of sequences, the fill's with the threads.

Legend: N sequences.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mgrpo import _packing
from mgrpo.bench.harness import Result, Timing, figure, interleave
from mgrpo.bench.packing import fill
from mgrpo.bench.packing.peers import planners
from mgrpo.bench.packing.plan import COST, LOG_NORMAL, RANKS

FIGURE = Path(__file__).parents[1] / "results" / "packing-growth.png"
SIZES = (1_000, 10_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)
FITTED_FROM, PEERS_TO = 100_000, 1_000_000
ROUNDS = 5


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Return k of the power law c * N^k through the points, by least squares of the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def plan_times() -> dict[str, dict[int, float]]:
    """Return the seconds by planner and N."""
    seconds: dict[str, dict[int, float]] = {}
    for count in SIZES:
        lengths_N = LOG_NORMAL.lengths(count)
        peers = planners(lengths_N, LOG_NORMAL.cap, RANKS) if count <= PEERS_TO else {}
        installed = {name: run for name, run in peers.items() if run is not None}
        ours = {"ours": lambda lengths_N=lengths_N: _packing.plan(lengths_N, LOG_NORMAL.cap, RANKS, COST)}
        for name, timing in interleave({**ours, **installed}, rounds=ROUNDS).items():
            seconds.setdefault(name, {})[count] = timing.seconds
    return seconds


def fill_times(count: int) -> dict[int, Timing]:
    """Return the fill's timing into reused memory, by the number of threads."""
    given = fill.trajectories(count)
    threads = range(1, len(os.sched_getaffinity(0)) + 1)
    runs = {str(n): fill.ours(given, _packing.Arena(), threads=n) for n in threads}
    timings = interleave(runs, rounds=ROUNDS)
    return {n: timings[str(n)] for n in threads}


def draw(plans: dict[str, dict[int, float]], fills: dict[int, Timing], to: Path) -> None:
    """Draw both curves into a PNG file."""
    from matplotlib.figure import Figure

    page = Figure(figsize=(10, 4), layout="constrained")
    left, right = page.subplots(1, 2)
    for name, seconds in plans.items():
        left.loglog(list(seconds), [s * 1e3 for s in seconds.values()], marker="o", label=name)
    left.set(xlabel="sequences", ylabel="ms", title="plan, log-normal lengths")
    left.legend()
    right.plot(list(fills), [timing.seconds * 1e3 for timing in fills.values()], marker="o")
    right.set(xlabel="threads", ylabel="ms", title="fill, reused memory", xticks=list(fills), ylim=(0, None))
    to.parent.mkdir(parents=True, exist_ok=True)
    page.savefig(to, dpi=150)


def results() -> list[Result]:
    """Measure and draw how the times grow."""
    plans, fills = plan_times(), fill_times(1024)
    draw(plans, fills, FIGURE)
    print(f"growth: written to {FIGURE}")
    fitted = {count: s for count, s in plans["ours"].items() if count >= FITTED_FROM}
    most = max(fills)
    return [
        figure(f"growth: plan, {max(SIZES):_} sequences", plans["ours"][max(SIZES)] * 1e3, "ms"),
        figure("growth: plan, exponent of N from 100_000 on", exponent(list(fitted), list(fitted.values())), ""),
        figure(f"growth: fill, {most} threads over 1", fills[most].times_faster_than(fills[1]), "x"),
    ]
