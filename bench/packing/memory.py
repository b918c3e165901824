"""Fix the rules of memory allocation, so that a figure does not depend on what ran before it.

By default glibc raises its threshold whenever a large block is freed, and then keeps the next block of that size
instead of faulting in new pages: the same call on the same input may take a third of the time because something else
ran first. Here one of two fixed rules holds: with `fresh`, large blocks are new pages in every call; with `recycled`,
blocks of up to 32 MiB, where glibc stops adapting, are kept.

Taking turns does not solve this: a candidate that runs after one which frees hundreds of thousands of small pages pays
for merging these into large ones, and rotating the turns does not change which candidate follows which. So every timed
call follows an untimed call of the same candidate.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from typing import Literal

from mgrpo.bench.harness import Candidate, Timing, interleave

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # malloc.h
WORDS = (
    "memory: unless a line says recycled or reused, large blocks are fresh pages in every call, for all candidates; "
    "each timed call of fill and tree follows an untimed one of the same candidate"
)


def fix(rule: Literal["fresh", "recycled"]) -> None:
    """Set the rule of this process, until the next call. Without glibc this does nothing."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    threshold = {"fresh": 128 << 10, "recycled": 32 << 20}[rule]
    libc.mallopt(MMAP_THRESHOLD, threshold)
    libc.mallopt(TRIM_THRESHOLD, 2 * threshold)
    libc.malloc_trim(0)


def time_settled(candidates: Mapping[str, Candidate], rounds: int) -> dict[str, Timing]:
    """Time the candidates as `interleave` does, but each timed call follows an untimed call of the same candidate."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            seconds[name] += interleave({name: run}, rounds=1, warmup=1)[name].rounds
    return {name: Timing(tuple(each)) for name, each in seconds.items()}
