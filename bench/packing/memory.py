"""Memory held still, so that a figure does not depend on what ran before it.

Left alone, glibc learns from each large block that is freed to keep the next one of that size instead of faulting new
pages in: the same call on the same input then takes a third of the time because something else ran first. Here every
candidate has one of two fixed rules: `fresh`, large blocks are new pages in every call, or `recycled`, blocks up to
32 MiB, where glibc's learning ends, are kept.

Nor does taking turns suffice: who comes after a candidate that frees hundreds of thousands of small pages pays for
making large ones of them, and to rotate the turns does not change who comes after whom. So every timed call follows an
untimed one of the same candidate.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from typing import Literal

from mgrpo.bench.harness import Candidate, Timing, interleave

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # malloc.h
WORDS = (
    "memory: large blocks are fresh pages in every call, for all, but where it says recycled or reused; "
    "each timed call of fill and tree follows an untimed one of the same candidate"
)


def fix(rule: Literal["fresh", "recycled"]) -> None:
    """Holds for the process, until called again. Without glibc it does nothing."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    kept = {"fresh": 128 << 10, "recycled": 32 << 20}[rule]
    libc.mallopt(MMAP_THRESHOLD, kept)
    libc.mallopt(TRIM_THRESHOLD, 2 * kept)
    libc.malloc_trim(0)


def settled(candidates: Mapping[str, Candidate], rounds: int) -> dict[str, Timing]:
    """As `interleave`, each timed call after an untimed one of its own."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            seconds[name] += interleave({name: run}, rounds=1, warmup=1)[name].rounds
    return {name: Timing(tuple(each)) for name, each in seconds.items()}
