"""Measure the fill: seven columns of flat buffers against numpy, torch, memcpy and a list collator; and lists of ints.

numpy, torch and `fill` read the same trajectories and build the same columns, which are compared before timing.

Legend: N trajectories of T tokens in all, P rows.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mgrpo import _packing
from mgrpo.bench.harness import Candidate, Result, figure, interleave
from mgrpo.bench.packing import memory
from mgrpo.bench.packing.peers import flattening_collator, numpy_columns, torch_columns
from mgrpo.bench.packing.plan import fastest

LENGTH = 4096
COLUMNS = ("input_ids", "positions", "targets", "action_mask", "weights", "advantages", "segment_ids")
BYTES_READ, BYTES_WRITTEN = 8 + 1, 3 * 8 + 1 + 3 * 4  # per row: its token and flag; the columns
WORDS = (
    f"fill: trajectories of {LENGTH} tokens (int64), 47 % of them sampled, into {', '.join(COLUMNS)}: "
    f"{BYTES_READ} bytes read and {BYTES_WRITTEN} written per row; memcpy: a copy of half the sum of these, by "
    "numpy.copyto split over as many threads or by torch's copy_, whichever is faster; numpy and torch allocate memory "
    "in each call"
)
COLLATOR_WORDS = (
    "collator: DataCollatorWithFlattening makes 3 columns and cu_seqlens from one list of ints per trajectory, which "
    "includes joining the lists and turning them into tensors; `fill` makes its 7 columns from arrays or, where a line "
    "says lists, from the same lists"
)


@dataclass(frozen=True)
class Trajectories:
    """Hold N trajectories of LENGTH tokens, one after another."""

    tokens_T: NDArray[np.int64]
    sampled_T: NDArray[np.bool_]
    advantages_N: NDArray[np.float32]
    weights_N: NDArray[np.float32]

    @property
    def offsets_N1(self) -> NDArray[np.int64]:
        return np.arange(0, len(self.tokens_T) + 1, LENGTH)

    @property
    def rows_N(self) -> NDArray[np.int64]:
        return np.full(len(self.weights_N), LENGTH - 1)

    def first(self, count: int) -> Trajectories:
        """Return the first `count` trajectories."""
        tokens = count * LENGTH
        return Trajectories(
            self.tokens_T[:tokens], self.sampled_T[:tokens], self.advantages_N[:count], self.weights_N[:count]
        )


def trajectories(count: int) -> Trajectories:
    """Make trajectories: a prompt of 1024 tokens, then turns of 192 by a tool and 320 that the agent sampled."""
    random = np.random.default_rng(count)
    place_L = np.arange(LENGTH)
    sampled_L = (place_L >= 1024) & (place_L % 512 >= 192)
    return Trajectories(
        random.integers(0, 150_000, count * LENGTH),
        np.tile(sampled_L, count),
        random.normal(size=count).astype(np.float32),
        random.uniform(0.5, 1.5, count).astype(np.float32),
    )


def ours(
    given: Trajectories, arena: _packing.Arena | None = None, threads: int | None = None
) -> Callable[[], dict[str, Any]]:
    """Return a call of `fill`.  threads: as many as torch uses, unless given."""
    ids_B, rows_N, offsets_N1 = np.arange(len(given.weights_N)), given.rows_N, given.offsets_N1
    return lambda: _packing.fill(
        given.tokens_T,
        offsets_N1,
        given.sampled_T,
        ids_B,
        rows_N,
        given.advantages_N,
        given.weights_N,
        arena=arena,
        threads=threads or torch.get_num_threads(),
    )


def numpys(given: Trajectories) -> Callable[[], dict[str, Any]]:
    tokens, sampled = given.tokens_T.reshape(-1, LENGTH), given.sampled_T.reshape(-1, LENGTH)
    rows_N = given.rows_N
    return lambda: numpy_columns(list(tokens), list(sampled), rows_N, given.advantages_N, given.weights_N)


def torchs(given: Trajectories) -> Callable[[], dict[str, Any]]:
    tokens, sampled, rows_N, advantages_N, weights_N = map(
        torch.from_numpy,
        (
            given.tokens_T.reshape(-1, LENGTH),
            given.sampled_T.reshape(-1, LENGTH),
            given.rows_N,
            given.advantages_N,
            given.weights_N,
        ),
    )
    return lambda: torch_columns(tokens.unbind(), sampled.unbind(), rows_N, advantages_N, weights_N)


def memcpy(size: int, pool: ThreadPoolExecutor, threads: int) -> dict[str, Candidate]:
    """Return two ways to copy `size` bytes into existing memory."""
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    sources, targets = np.array_split(source, threads), np.array_split(target, threads)
    source_S, target_S = torch.from_numpy(source), torch.from_numpy(target)
    return {
        "numpy.copyto": lambda: list(pool.map(np.copyto, targets, sources)),
        "torch copy_": lambda: target_S.copy_(source_S),
    }


def check(given: Trajectories) -> None:
    """Check that `fill`, numpy and torch make the same columns."""
    made, by_numpy, by_torch = ours(given)(), numpys(given)(), torchs(given)()
    for column in COLUMNS:
        assert np.array_equal(made[column], by_numpy[column]), column
        assert np.array_equal(made[column], by_torch[column].numpy()), column


def measure(count: int, rounds: int) -> list[Result]:
    """Measure the fill of `count` trajectories, into fresh and into reused memory."""
    given = trajectories(count)
    check(given.first(64))
    threads, rows = torch.get_num_threads(), count * (LENGTH - 1)
    moved = rows * (BYTES_READ + BYTES_WRITTEN)
    with ThreadPoolExecutor(threads) as pool:
        copies = memcpy(moved // 2, pool, threads)
        builders = {
            "fresh": ours(given),
            "reused": ours(given, _packing.Arena()),
            "numpy": numpys(given),
            "torch": torchs(given),
        }
        timings = memory.time_settled({**builders, **copies}, rounds)
    fresh, reused = timings["fresh"], timings["reused"]
    rival, copy = fastest(timings[way] for way in ("numpy", "torch")), fastest(timings[way] for way in copies)
    name = f"fill {count} x {LENGTH}"
    return [
        figure(f"{name}: fresh, time", fresh.seconds * 1e3, "ms"),
        figure(f"{name}: reused, time", reused.seconds * 1e3, "ms"),
        figure(f"{name}: memcpy, read and written", moved / copy.seconds / 1e9, "GB/s"),
        figure(f"{name}: fresh, times numpy or torch", fresh.times_faster_than(rival), "x", at_least=3),
        figure(f"{name}: reused, times numpy or torch", reused.times_faster_than(rival), "x", at_least=6),
        figure(f"{name}: fresh, share of memcpy", fresh.times_faster_than(copy), ""),
        figure(f"{name}: reused, share of memcpy", reused.times_faster_than(copy), "", at_least=0.7),
    ]


def measure_collator(count: int, rounds: int) -> list[Result]:
    """Measure the fill against the collator, on fewer trajectories because a list takes 40 bytes per token."""
    given = trajectories(count)
    lists = given.tokens_T.reshape(-1, LENGTH).tolist()

    def from_lists() -> dict[str, Any]:
        tokens_T, _ = _packing.from_lists(lists)
        return ours(replace(given, tokens_T=tokens_T))()

    timings = memory.time_settled(
        {"arrays": ours(given), "lists": from_lists, "collator": flattening_collator(lists)}, rounds
    )
    name = f"fill {count} x {LENGTH}: times the flattening collator"
    return [
        figure(name, timings["arrays"].times_faster_than(timings["collator"]), "x", at_least=80),
        figure(f"{name}, both of lists", timings["lists"].times_faster_than(timings["collator"]), "x"),
    ]


def measure_lists(count: int, rounds: int) -> list[Result]:
    """Measure the conversion of one list of `count` ints."""
    values = np.random.default_rng(count).integers(0, 150_000, count).tolist()
    ways: dict[str, Candidate] = {
        "from_lists": lambda: _packing.from_lists([values]),
        "np.array": lambda: np.array(values, np.int64),
        "torch.tensor": lambda: torch.tensor(values),
    }
    timings = interleave(ways, rounds=rounds)
    return [figure(f"{count:_} ints: {way}", timings[way].seconds / count * 1e9, "ns/token") for way in ways]


def results(quick: bool) -> list[Result]:
    """Return all results of the fill."""
    trajectories, rounds = (512, 3) if quick else (4096, 9)
    return [
        *measure(trajectories, rounds),
        *measure_collator(64 if quick else 256, rounds),
        *measure_lists(200_000 if quick else 2_000_000, rounds),
    ]
