"""Check a result of mgrpo._packing against its arguments, for tests/fuzz/fuzz_packing.py.

The checks are cheap, as they follow every call; tests/packing compares the same functions with naive ones.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import _packing as packing
import numpy as np
from fuzz_inputs import LOGPROBS
from numpy.typing import NDArray


def is_column(array: Any, dtype: str, size: int) -> bool:
    return isinstance(array, np.ndarray) and array.dtype == dtype and array.shape == (size,)


def aligned(given: dict[str, Any], copies_T: Any) -> bool:
    counts_R = given["counts_R"]
    sums_R = np.diff(np.cumsum([0.0, *copies_T])[np.cumsum([0, *counts_R])])
    whole = given["mode"] == "expected" or (copies_T == np.floor(copies_T)).all()
    return (
        is_column(copies_T, "f8", counts_R.sum())
        and np.allclose(sums_R, np.where(counts_R > 0, given["target"], 0))
        and bool(whole)
    )


def planned(given: dict[str, Any], made: Any) -> bool:
    offsets_M1, ids_N, mini_B1 = made
    lengths_N = given["lengths_N"]
    count, bins, minis = len(lengths_N), len(offsets_M1) - 1, given["mini_batches"]
    sizes_M = np.diff(offsets_M1)
    return (
        is_column(ids_N, "i8", count)
        and is_column(offsets_M1, "i8", bins + 1)
        and is_column(mini_B1, "i8", int(minis) + 1)
        and np.array_equal(np.sort(ids_N), np.arange(count))
        and (offsets_M1[0], offsets_M1[-1], mini_B1[0], mini_B1[-1]) == (0, count, 0, bins)
        and (sizes_M >= (0 if given["allow_empty"] else 1)).all()
        and (np.diff(np.cumsum([0, *lengths_N[ids_N]])[offsets_M1]) <= given["cap"]).all()
        and not (mini_B1 % given["ranks"]).any()
        and (np.diff(mini_B1) >= 0).all()
        and together(given.get("groups_N"), ids_N, sizes_M)
    )


def together(groups_N: NDArray[np.int64] | None, ids_N: NDArray[np.int64], sizes_M: NDArray[np.int64]) -> bool:
    if groups_N is None:
        return True
    bins = np.repeat(np.arange(len(sizes_M)), sizes_M)
    return len({*zip(groups_N[ids_N].tolist(), bins.tolist(), strict=True)}) == len({*groups_N.tolist()})


def bounded(given: dict[str, Any], bound: Any) -> bool:
    lengths = given["lengths_N"].tolist()
    return type(bound) is int and -(-sum(lengths) // int(given["cap"])) <= bound <= len(lengths)


def flat(column: Any) -> NDArray[Any]:
    if not isinstance(column, list | tuple):
        return column
    return np.concatenate(list(column)) if len(column) else np.zeros(0, np.int64)


def trainable(given: dict[str, Any], rows_N: Any) -> bool:
    sampled_T = flat(given["sampled_T"])
    each_N = [sampled_T[a:b] for a, b in pairwise(given["offsets_N1"].tolist())]
    return rows_N.dtype == np.int64 and rows_N.tolist() == [max(np.flatnonzero(each), default=0) for each in each_N]


def twice(
    fill: Callable[..., Any], holds: Callable[[dict[str, Any], Any], Any]
) -> Callable[[dict[str, Any], Any], Any]:
    """Fill again if there is an arena, and check that the held result does not change."""

    def check(given: dict[str, Any], made: Any) -> bool:
        if given.get("arena") is None or not holds(given, made):
            return holds(given, made)
        other = given if "shared_B" in given else given | {"ids_B": given["ids_B"][::-1].copy()}
        try:
            later = fill(**other)
        except ValueError:  # raised for the arena's allocator
            return holds(given, made)
        return holds(other, later) and holds(given, made)

    return check


def as_expected(given: dict[str, Any], made: Any) -> bool:
    bounds, batches = in_bins(given, made)
    expected = [expected_batch(given, given["ids_B"][a:b]) for a, b in bounds]
    return len(batches) == len(expected) and all(map(same, batches, expected))


def in_bins(given: dict[str, Any], made: Any) -> tuple[list[tuple[int, int]], list[dict[str, Any]]]:
    """Return the bounds of the micro-batches within the ids, and the micro-batches."""
    bins_M1 = given.get("bins_M1")
    return ([(0, len(given["ids_B"]))], [made]) if bins_M1 is None else (list(pairwise(bins_M1.tolist())), made)


def expected_batch(given: dict[str, Any], ids_B: NDArray[np.int64]) -> dict[str, Any]:
    rows_B, starts_B = given["rows_N"][ids_B], given["offsets_N1"][ids_B]
    cu_seqlens = np.cumsum([0, *rows_B], dtype=np.int32)
    places_P = np.repeat(np.arange(len(ids_B)), rows_B)
    positions_P = np.arange(cu_seqlens[-1]) - cu_seqlens[places_P]
    at_P = starts_B[places_P] + positions_P
    columns = {name: flat(given[name]) for name in ("tokens_T", "sampled_T", *LOGPROBS) if given.get(name) is not None}
    mask_P = columns["sampled_T"][at_P + 1] != 0
    weights_P = (given["weights_N"][ids_B[places_P]] * mask_P).astype(np.float32)
    advantages_P = given["advantages_N"][ids_B[places_P]].astype(np.float32)
    id_type = np.int32 if given["narrow"] else np.int64
    batch = {
        "input_ids": columns["tokens_T"][at_P].astype(id_type),
        "positions": positions_P.astype(id_type),
        "targets": columns["tokens_T"][at_P + 1].astype(id_type),
        "action_mask": mask_P,
        "weights": weights_P,
        "advantages": advantages_P,
        "segment_ids": places_P.astype(np.int32),
        "cu_seqlens": cu_seqlens,
        "max_seqlen": int(rows_B.max(initial=0)),
        "sequences": len(ids_B),
        "actions": int(mask_P.sum()),
        "weight_sum": float(weights_P.sum(dtype=np.float64)),
    }
    for name in set(LOGPROBS) & set(columns):
        batch[name.removesuffix("_T")] = np.where(mask_P, columns[name][at_P + 1], 0).astype(np.float32)
    if given["live"] is not None:
        batch["live_rows"] = np.flatnonzero((weights_P != 0) & ((given["live"] == "weight") | (advantages_P != 0)))
    return batch


def same(batch: dict[str, Any], expected: dict[str, Any]) -> bool:
    weight_sum = expected.pop("weight_sum")
    bits = {name: np.asarray(value) for name, value in expected.items()}
    return (
        batch.keys() == {*expected, "weight_sum"}
        and abs(batch["weight_sum"] - weight_sum) <= 1e-9 * float(np.abs(batch["weights"]).sum(dtype=np.float64))
        and all(type(batch[name]) is type(value) for name, value in expected.items())
        and all(np.asarray(batch[name]).dtype == value.dtype for name, value in bits.items())
        and all(np.array_equal(batch[name], value, equal_nan=value.dtype.kind == "f") for name, value in bits.items())
    )


def tree_planned(given: dict[str, Any], made: Any) -> bool:
    offsets_M1, ids_N, shared_N = made
    count, groups_N = len(given["rows_N"]), given.get("groups_N")
    fresh_N = given["rows_N"][ids_N] - shared_N
    opens_N = np.isin(np.arange(count), offsets_M1)
    follow = [(a, b, shared) for (a, b), shared in zip(pairwise(ids_N.tolist()), shared_N[1:].tolist(), strict=False)]
    return (
        is_column(ids_N, "i8", count)
        and is_column(shared_N, "i8", count)
        and is_column(offsets_M1, "i8", len(offsets_M1))
        and np.array_equal(np.sort(ids_N), np.arange(count))
        and (offsets_M1[0], offsets_M1[-1]) == (0, count)
        and (np.diff(offsets_M1) > 0).all()
        and (np.diff(np.cumsum([0, *fresh_N])[offsets_M1]) <= given["cap"]).all()
        and not shared_N[opens_N].any()
        and (fresh_N >= 0).all()
        and all(np.array_equal(path(given, a)[:shared], path(given, b)[:shared]) for a, b, shared in follow)
        and (groups_N is None or all(groups_N[a] == groups_N[b] for a, b, shared in follow if shared))
    )


def path(given: dict[str, Any], n: int) -> NDArray[Any]:
    start = given["offsets_N1"][n]
    return given["tokens_T"][start : start + given["rows_N"][n]]


def trees_filled(given: dict[str, Any], made: Any) -> bool:
    bounds, trees = in_bins(given, made)
    parts = [given | {name: given[name][a:b] for name in ("ids_B", "shared_B")} for a, b in bounds]
    return len(trees) == len(parts) and all(map(tree_filled, parts, trees))


def tree_filled(given: dict[str, Any], made: Any) -> bool:
    ids_B, bounds_S1 = given["ids_B"], made["tree_cu_seqlens_k"]
    columns = [name.removesuffix("_T") for name in LOGPROBS if given.get(name) is not None]
    rows = len(made["targets"])
    # Merged advantages have one sign, so their size is not lost.
    size_P = made["weights"].astype(np.float64) * np.abs(made["advantages"])
    walks_B = [made["tree_kv_index"][bounds_S1[leaf] : bounds_S1[leaf + 1]] for leaf in made["leaf"]]
    return (
        is_column(made["input_ids"], "i8", (given["rows_N"][ids_B] - given["shared_B"]).sum())
        and is_column(made["leaf"], "i4", len(ids_B))
        and all(is_column(made[name], "i8", rows) for name in ("token_index", "targets", "segment_id"))
        and all(is_column(made[name], "f4", rows) for name in ("weights", "advantages", *columns))
        and all(np.array_equal(made["input_ids"][w], path(given, n)) for w, n in zip(walks_B, ids_B, strict=True))
        and all(np.array_equal(made["positions"][w], np.arange(len(w))) for w in walks_B)
        and np.isfinite(made["advantages"]).all()
        and np.isclose(made["weights"].sum(dtype=np.float64), in_all(given, given["weights_N"]), rtol=1e-5)
        and np.isclose(size_P.sum(), in_all(given, given["weights_N"] * np.abs(given["advantages_N"])), rtol=1e-5)
    )


def in_all(given: dict[str, Any], values_N: NDArray[Any]) -> float:
    """Repeat a trajectory's value for each token that it predicts."""
    total = 0.0
    for n in given["ids_B"]:
        start, stop = given["offsets_N1"][n], given["offsets_N1"][n + 1]
        predicted = given["sampled_T"][start + 1 : min(start + given["rows_N"][n] + 1, stop)]
        total += float(values_N[n]) * np.count_nonzero(predicted)
    return total


def listed(given: dict[str, Any], made: Any) -> bool:
    values_T, offsets_N1 = made
    lists = [list(each) for each in given["lists_N"]]
    return (
        values_T.dtype == offsets_N1.dtype == np.int64
        and [values_T[a:b].tolist() for a, b in pairwise(offsets_N1)] == lists
        and all(type(value) is int for each in lists for value in each)
    )


HOLDS: dict[str, Callable[[dict[str, Any], Any], Any]] = {
    "align": aligned,
    "plan": planned,
    "l2_bound": bounded,
    "trainable_rows": trainable,
    "fill": twice(packing.fill, as_expected),
    "tree_plan": tree_planned,
    "tree_fill": twice(packing.tree_fill, trees_filled),
    "from_lists": listed,
    "Arena": lambda given, arena: arena.held == 0,
}
