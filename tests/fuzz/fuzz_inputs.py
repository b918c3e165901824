"""Turn bytes into calls of mgrpo._packing for tests/fuzz/fuzz_packing.py: most are valid, then one thing is made wrong.

Names are those of bindings/_packing.pyi. Only Arena of the extension is used, so a call that broke it can be shown.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import _packing as packing
import numpy as np
from fuzz_damage import Fleeting, Hostile, Source, wrong
from numpy.typing import NDArray

PAGE = 4096
DAMAGE = 24  # bytes
LOGPROBS = ("old_logprobs_T", "sampler_logprobs_T", "ref_logprobs_T")


# ---- valid arguments, by name


def align(source: Source) -> dict[str, Any]:
    counts = source.ints(source.below(9), 0, source.pick([1, 12, 12, 500]))
    return {
        "counts_R": counts,
        "target": 1 + source.below(source.pick([20, 20, 1000])),
        "mode": source.pick(["sampled", "expected"]),
        "seed": source.below(2**64),
        "keys_R": source.ints(len(counts), 0, 2**40).astype(np.uint64),
    }


def l2_bound(source: Source) -> dict[str, Any]:
    cap = source.pick([1, 7, 100, 100, 4096, 2**24, 2**24 + 1, 2**40, 2**62])
    most = source.pick([cap, cap // 2 + 1, cap // 8 + 1, 3])
    return {"lengths_N": source.ints(source.pick([0, 1, 5, 40, 40, 400]), 1, min(most, cap)), "cap": cap}


def plan(source: Source) -> dict[str, Any]:
    named = l2_bound(source)
    named["ranks"] = source.pick([1, 1, 2, 3, 8, 40, 1000])
    named["cost"] = source.pick([(1.0, 0.0), (0.0, 1.0), (0.3, 1e-4)])
    named["mini_batches"] = source.pick([1, 1, 2, 5])
    named["seed"] = source.below(2**64)
    named["allow_empty"] = source.pick([True, True, False])
    if source.chance(2):
        named["groups_N"] = source.ints(len(named["lengths_N"]), -50, source.pick([-40, 150]))
    return named


def trajectories(source: Source) -> dict[str, Any]:
    """Make columns of trajectories that begin alike, sometimes so long that fill takes them in several pieces."""
    few_long = source.chance(64)
    lengths = source.ints(2 if few_long else source.pick([0, 1, 3, 20]), 1, 70_000 if few_long else 40)
    draw, size = source.random(), int(lengths.sum())
    return {
        "tokens_T": (draw.random(size) < source.pick([0, 0.05, 0.5])) * source.pick([1, 2**31 - 1]),
        "offsets_N1": np.cumsum([0, *lengths], dtype=np.int64),
        "sampled_T": (draw.random(size) < draw.random()).astype(source.pick(["?", "u1"])),
        "rows_N": draw.integers(0, lengths),
        "advantages_N": draw.normal(size=len(lengths)).round(source.pick([0, 3])),
        "weights_N": draw.random(len(lengths)).round(source.pick([0, 3])),
    }


def logprobs(source: Source, columns: dict[str, Any]) -> dict[str, Any]:
    values_T = source.random().normal(size=len(columns["tokens_T"])).astype(np.float32)
    return {name: values_T for name in LOGPROBS if source.chance(2)}


def trainable_rows(source: Source) -> dict[str, Any]:
    columns = trajectories(source)
    return {"offsets_N1": columns["offsets_N1"], "sampled_T": in_form(source, columns, "sampled_T")}


def in_form(source: Source, columns: dict[str, Any], name: str) -> Any:
    """Return a column as one array, or as one array per trajectory."""
    form = source.pick([None, None, list, tuple, Fleeting])
    if form is None:
        return columns[name]
    return form(columns[name][a:b].copy() for a, b in pairwise(columns["offsets_N1"]))


def fill(source: Source) -> dict[str, Any]:
    columns = trajectories(source)
    columns["tokens_T"] = columns["tokens_T"].astype(source.pick(["i8", "i4"]))
    narrow = columns["tokens_T"].dtype == np.int32 and source.chance(2)
    columns |= logprobs(source, columns)
    named = {name: in_form(source, columns, name) if name.endswith("_T") else columns[name] for name in columns}
    for name in ("advantages_N", "weights_N"):
        named[name] = named[name].astype(source.pick(["f8", "f4"]))
    count = len(columns["rows_N"])
    size = source.below(9) if count else 0
    named["ids_B"] = source.ints(size, 0, max(count - 1, 0))
    if source.chance(2):
        named["bins_M1"] = np.array([0, *sorted(source.ints(source.below(4), 0, size)), size], np.int64)
    if source.chance(2):
        named["arena"] = packing.Arena(allocate(source))
    named |= {"live": source.pick([None, "weight", "advantage"]), "narrow": narrow, "threads": source.below(4)}
    return named


def tree_plan(source: Source) -> dict[str, Any]:
    columns = trajectories(source)
    columns["rows_N"] = np.maximum(columns["rows_N"], 1)
    named = {name: columns[name] for name in ("tokens_T", "offsets_N1", "rows_N")}
    named["tokens_T"] = named["tokens_T"].astype(source.pick(["i8", "i4"]))
    named["cap"] = int(columns["rows_N"].max(initial=1)) + source.below(50)
    if source.chance(2):
        named["groups_N"] = source.ints(len(columns["rows_N"]), -2, 2)
    return named


def tree_fill(source: Source) -> dict[str, Any]:
    columns = trajectories(source)
    columns["rows_N"] = np.maximum(columns["rows_N"], 1)
    columns["tokens_T"] = columns["tokens_T"].astype(source.pick(["i8", "i4"]))
    paths = [columns["tokens_T"][a : a + r] for a, r in zip(columns["offsets_N1"], columns["rows_N"], strict=False)]
    ids = sorted(range(len(paths)), key=lambda n: paths[n].tolist()) if source.chance(2) else range(len(paths))
    shared = [0, *(alike(paths[a], paths[b]) for a, b in pairwise(ids))][: len(paths)]
    if source.chance(2):
        columns["bins_M1"] = np.array([0, *sorted(source.ints(source.below(4), 0, len(ids))), len(ids)], np.int64)
        shared = [0 if b in columns["bins_M1"] else common for b, common in enumerate(shared)]
    if source.chance(2):
        columns["arena"] = packing.Arena(allocate(source))
    columns |= {"ids_B": np.array(ids, np.int64), "shared_B": np.array(shared, np.int64), "threads": source.below(4)}
    return columns | logprobs(source, columns) | {"merge": source.chance(2)}


def alike(first: NDArray[Any], second: NDArray[Any]) -> int:
    """Return how many tokens two paths share at their beginning."""
    both = min(len(first), len(second))
    return int(np.append(first[:both] != second[:both], True).argmax())


def from_lists(source: Source) -> dict[str, Any]:
    form = source.pick([list, tuple])
    return {
        "lists_N": form(form(source.ints(source.below(5), -(2**62), 2**62).tolist()) for _ in range(source.below(5)))
    }


# ---- memory for an Arena


def fenced(size: int) -> NDArray[np.uint8]:
    """Allocate as little as an Arena needs; if the address sanitizer is loaded, the rest must not be touched."""
    memory = np.empty(size, np.uint8)
    begin = -memory.ctypes.data % PAGE
    end = begin + size - (PAGE - 1)
    poison = getattr(ctypes.CDLL(None), "__asan_poison_memory_region", None)
    if poison is not None:
        poison(ctypes.c_void_p(memory.ctypes.data + end), ctypes.c_size_t(size - end))
    return memory


def allocate(source: Source) -> Any:
    """Return an allocator for an Arena, correct or not."""
    kept = bytearray(2**17)
    badly = [
        bytes,
        Hostile(),
        lambda size: kept,
        lambda size: bytearray(size - 1),
        lambda size: np.empty(2 * size, np.uint8)[::2],
        lambda size: size,
    ]
    return source.pick([None, bytearray, *[fenced] * 4, *badly])


def Arena(source: Source) -> dict[str, Any]:
    return {"allocate": allocate(source)}


MAKERS: list[Callable[[Source], dict[str, Any]]]
MAKERS = [align, plan, plan, l2_bound, trainable_rows, fill, fill, fill, tree_plan, tree_fill, from_lists, Arena]


def call(data: bytes) -> tuple[str, dict[str, Any]]:
    """Return the name of a function of the extension, and arguments. The first bytes say what is wrong with them."""
    damage, source = Source(data[:DAMAGE]), Source(data[DAMAGE:])
    maker = source.pick(MAKERS)
    named = maker(source)
    with np.errstate(all="ignore"):  # of numbers that do not fit another dtype
        for _ in range(damage.pick([0, 1, 1, 2])):
            name = damage.pick(sorted(named))
            named[name] = wrong(damage, named[name], named)
    return maker.__name__, named
