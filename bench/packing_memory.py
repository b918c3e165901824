"""glibc's allocator held still, so that a figure does not depend on what ran before it.

Left alone, glibc learns from each large block that is freed to keep the next one of that size instead of faulting new
pages in: the same call on the same input then takes a third of the time because something else ran first. Here every
candidate has one of two fixed rules: `fresh`, large blocks are new pages in every call, or `recycled`, blocks up to
32 MiB, where glibc's learning ends, are kept.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Literal

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # malloc.h
WORDS = "memory: large blocks are fresh pages in every call, for all, but where it says recycled or reused"


def fix(rule: Literal["fresh", "recycled"]) -> None:
    """Holds for the process, until called again. Without glibc it does nothing."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    kept = {"fresh": 128 << 10, "recycled": 32 << 20}[rule]
    libc.mallopt(MMAP_THRESHOLD, kept)
    libc.mallopt(TRIM_THRESHOLD, 2 * kept)
    libc.malloc_trim(0)
