"""Compare `tree_plan` and `tree_fill` with tests/support/naive_tree.py.

tests/batch/test_tree_exactness.py shows that training on a tree equals training on its trajectories one by one.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import naive_tree as naive
from cases.tree import LOGPROBS, Sequences, fill, flat, forests, ints, lengths, random_batch, trajectories
from mgrpo import _packing as packing


def plan(
    sequences: Sequences, cap: int, groups: Any = None, dtype: Any = np.int64
) -> list[tuple[list[int], list[int]]]:
    """Return (ids, shared) of every micro-batch."""
    groups_N = None if groups is None else ints(groups)
    offsets_M1, ids_N, shared_N = packing.tree_plan(*flat(sequences, dtype), lengths(sequences), cap, groups_N)
    assert offsets_M1.dtype == ids_N.dtype == shared_N.dtype == np.int64
    assert offsets_M1[0] == 0 and offsets_M1[-1] == len(ids_N)
    return [(ids_N[a:b].tolist(), shared_N[a:b].tolist()) for a, b in itertools.pairwise(offsets_M1)]


# ---- plan


@given(forests(), st.integers(0, 60), st.sampled_from([np.int32, np.int64]))
def test_plan_holds_every_trajectory_once_within_the_cap(sequences, room, dtype):
    cap = max(map(len, sequences), default=1) + room
    bins = plan(sequences, cap, dtype=dtype)
    assert sorted(n for ids, _ in bins for n in ids) == list(range(len(sequences)))
    for ids, shared in bins:
        held = [sequences[n] for n in ids]
        assert held
        assert shared == [0, *(naive.common(a, b) for a, b in itertools.pairwise(held))]
        distinct = len(naive.prefixes(held))
        assert sum(map(len, held)) - sum(shared) == distinct <= cap


@given(forests(), st.data())
def test_plan_shares_only_within_groups(sequences, data):
    groups = [data.draw(st.sampled_from([-(2**63), 0, 2**63 - 1])) for _ in sequences]
    bins = plan(sequences, 2**62, groups)
    assert len(bins) == bool(sequences)
    for ids, shared in bins:
        expected = [0]
        for a, b in itertools.pairwise(ids):
            expected.append(naive.common(sequences[a], sequences[b]) if groups[a] == groups[b] else 0)
        assert shared == expected
        tries = [[sequences[n] for n in ids if groups[n] == group] for group in set(groups)]
        assert sum(len(sequences[n]) for n in ids) - sum(shared) == sum(len(naive.prefixes(each)) for each in tries)


@given(forests(), st.integers(0, 9))
def test_plan_keeps_identical_trajectories_together(sequences, room):
    bins = plan(sequences * 2, max(map(len, sequences), default=1) + room)
    assert all(
        ({n % len(sequences) for n in ids if n < len(sequences)}) == set(n % len(sequences) for n in ids)
        for ids, _ in bins
    )


@given(forests(), st.integers(0, 9))
def test_plan_computes_leading_tokens_only(sequences, room):
    """Check that with fewer rows than tokens the plan is that of the sequences cut to their rows."""
    longer = [[*tokens, 7, n] for n, tokens in enumerate(sequences)]
    cap = max(map(len, sequences), default=1) + room
    made = packing.tree_plan(*flat(longer), lengths(sequences), cap)
    expected = packing.tree_plan(*flat(sequences), lengths(sequences), cap)
    assert [array.tolist() for array in made] == [array.tolist() for array in expected]


def test_plan_of_nothing():
    assert [array.tolist() for array in packing.tree_plan(*flat([]), ints([]), 8)] == [[0], [], []]


def test_plan_of_single_tokens():
    bins = plan([[n % 5] for n in range(20)], 2)
    assert [len({n % 5 for n in ids}) for ids, _ in bins] == [2, 2, 1]
    assert [len(ids) for ids, _ in bins] == [8, 8, 4]


def test_plan_of_a_deep_chain():
    """Make every trajectory a prefix of the next: the trie is as deep as there are trajectories, without recursion."""
    count = 3000
    tokens, offsets = np.zeros(count * (count + 1) // 2, np.int32), np.cumsum([0, *range(1, count + 1)])
    bins, ids, shared = packing.tree_plan(tokens, offsets, np.arange(1, count + 1), count)
    assert bins.tolist() == [0, count] and ids.tolist() == list(range(count)) and shared.tolist() == ids.tolist()


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_plan_of_many(dtype):
    """Check that in one bin they are sorted by group, then tokens, then number."""
    random = np.random.default_rng(0)
    least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
    sequences = [random.choice([least, -1, 0, 1, most], random.integers(1, 5)).tolist() for _ in range(20_000)]
    groups = random.choice([-(2**63), 0, 2**63 - 1], len(sequences)).tolist()
    for named in (None, groups):
        order = sorted(range(len(sequences)), key=lambda n: (named and named[n], sequences[n], n))
        assert plan(sequences, 2**62, named, dtype)[0][0] == order


def test_plan_cuts_a_subtree_only_as_often_as_it_must():
    """Plan ten completions of 10 tokens after a prompt of 5 into two micro-batches of 55: it is repeated once."""
    sequences = [[1, 2, 3, 4, 5, *([n] * 10)] for n in range(10, 20)]
    assert [len(ids) for ids, _ in plan(sequences, 55)] == [5, 5]


def rollouts(seed: int, queries: int, members: int, prompt: int, system: int = 0) -> Sequences:
    """Make queries whose members share a prompt, pairs of them half a completion, and all of them the system prompt."""
    random = np.random.default_rng(seed)
    head = random.integers(0, 1000, system).tolist()
    sequences = []
    for _ in range(queries):
        stem = head + random.integers(0, 1000, prompt).tolist()
        for _ in range(members // 2):
            first = random.integers(0, 1000, random.integers(20, 80)).tolist()
            for _ in range(2):
                sequences.append(stem + first + random.integers(0, 1000, random.integers(20, 80)).tolist())
    return sequences


def tokens_of(bins: Any, sequences: Sequences) -> int:
    return sum(len(sequences[n]) for ids, _ in bins for n in ids) - sum(sum(shared) for _, shared in bins)


@given(forests(), st.integers(0, 60))
def test_plan_takes_no_more_bins_than_one_open_row_does(sequences, room):
    cap = max(map(len, sequences), default=1) + room
    assert len(plan(sequences, cap)) <= naive.next_fit(sequences, cap)


@pytest.mark.parametrize(
    ("cap", "prompt", "system"), [(200, 90, 0), (400, 12, 0), (400, 90, 20), (800, 50, 0), (1500, 50, 5), (9000, 90, 9)]
)
@pytest.mark.parametrize("seed", range(3))
def test_plan_wastes_little(cap, prompt, system, seed):
    """Check that the plan is within 10 % of the lower bound, however much of the cap the prompt takes."""
    sequences = rollouts(seed, 12, 8, prompt, system)
    cap = max(cap, *map(len, sequences))
    bins = plan(sequences, cap)
    assert tokens_of(bins, sequences) <= 1.1 * naive.fewest_tokens(sequences, cap)
    assert len(bins) <= naive.next_fit(sequences, cap)


def partitions(items: list[Any]) -> Any:
    """Return all ways to put the items into bins."""
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for i, each in enumerate(rest):
            yield [*rest[:i], [items[0], *each], *rest[i + 1 :]]


@given(forests(6), st.integers(0, 8))
def test_plan_against_every_packing(sequences, room):
    """Check that no packing goes below the naive bound, and that the plan is one of all packings."""
    cap = max(map(len, sequences), default=1) + room
    sizes = [[len(naive.prefixes(held)) for held in bins] for bins in partitions(sequences)]
    possible = {(len(each), sum(each)) for each in sizes if max(each, default=0) <= cap}
    fewest = min(tokens for _, tokens in possible)
    bins = plan(sequences, cap)
    assert len(naive.prefixes(sequences)) <= naive.fewest_tokens(sequences, cap) <= fewest
    assert (len(bins), tokens_of(bins, sequences)) in possible


# ---- fill


def paths(filled: dict[str, NDArray[Any]]) -> list[list[int]]:
    """Return the packed positions from the root to the end of each segment."""
    bounds = filled["tree_cu_seqlens_k"]
    return [filled["tree_kv_index"][a:b].tolist() for a, b in itertools.pairwise(bounds)]


def prefix_of_each(filled: dict[str, NDArray[Any]]) -> list[naive.Prefix]:
    """Return the tokens that every packed token attends to, itself last: causal, aligned to its segment's end."""
    seen: list[naive.Prefix] = []
    for (start, stop), path in zip(itertools.pairwise(filled["tree_cu_seqlens_q"]), paths(filled), strict=True):
        for p in range(start, stop):
            keys = path[: len(path) - (stop - 1 - p)]
            assert keys[-1] == p
            seen.append(tuple(filled["input_ids"][keys].tolist()))
    return seen


DTYPES = {
    "input_ids": np.int64,
    "positions": np.int64,
    "tree_kv_index": np.int64,
    "tree_cu_seqlens_q": np.int32,
    "tree_cu_seqlens_k": np.int32,
    "tree_max_seqlens": np.int64,
    "token_index": np.int64,
    "segment_id": np.int64,
    "targets": np.int64,
    "weights": np.float32,
    "advantages": np.float32,
    "leaf": np.int32,
}


@given(forests(), st.integers(0, 2**32), st.sets(st.sampled_from(LOGPROBS)), st.sampled_from([np.int32, np.int64]))
def test_fill_has_each_distinct_prefix_once(sequences, seed, names, dtype):
    batch = random_batch(sequences, seed, names, dtype)
    _, ids, shared = packing.tree_plan(batch["tokens"], batch["offsets"], batch["rows"], 2**62)
    filled = fill(batch, ids, shared)
    assert {key: array.dtype for key, array in filled.items()} == DTYPES | dict.fromkeys(names, np.float32)
    read = [sequences[n][: batch["rows"][n]] for n in ids]
    prefixes = prefix_of_each(filled)
    assert len(set(prefixes)) == len(prefixes) and set(prefixes) == naive.prefixes(read)
    assert filled["positions"].tolist() == [len(prefix) - 1 for prefix in prefixes]
    assert {prefixes[stop - 1] for stop in filled["tree_cu_seqlens_q"][1:]} == naive.segment_ends(read)
    assert [filled["input_ids"][paths(filled)[leaf]].tolist() for leaf in filled["leaf"]] == read
    segments = np.diff(filled["tree_cu_seqlens_q"])
    assert filled["tree_max_seqlens"].tolist() == [max(segments, default=0), max(map(len, read), default=0)]


@given(forests(6), st.integers(0, 2**32), st.sets(st.sampled_from(LOGPROBS)), st.booleans())
def test_fill_predicts_as_the_naive_one(sequences, seed, names, merge):
    batch = random_batch(sequences, seed, names)
    _, ids, shared = packing.tree_plan(batch["tokens"], batch["offsets"], batch["rows"], 2**62)
    filled = fill(batch, ids, shared, merge)
    prefixes = prefix_of_each(filled)
    order = [name for name in LOGPROBS if name in names]
    got = zip(
        [prefixes[p] for p in filled["token_index"]],
        *(filled[name].tolist() for name in ("targets", "segment_id", "weights", "advantages")),
        [tuple(filled[name][m].tobytes() for name in order) for m in range(len(filled["targets"]))],
        strict=True,
    )
    expected = naive.prediction_rows(trajectories(batch, ids), order, merge=merge)
    assert list(got) == expected


@given(forests(6), st.integers(0, 2**32), st.data())
def test_fill_takes_any_order_and_any_sharing(sequences, seed, data):
    """Fill without a plan: trajectories may come in any order, repeatedly, and share less than they could."""
    batch = random_batch(sequences, seed)
    ids = data.draw(st.lists(st.sampled_from(range(len(sequences))), max_size=9)) if sequences else []
    read = [sequences[n][: batch["rows"][n]] for n in ids]
    shared = [0, *(data.draw(st.integers(0, naive.common(a, b))) for a, b in itertools.pairwise(read))][: len(ids)]
    filled = fill(batch, ids, shared)
    assert [filled["input_ids"][paths(filled)[leaf]].tolist() for leaf in filled["leaf"]] == read
    assert len(filled["input_ids"]) == sum(map(len, read)) - sum(shared)
    assert len(prefix_of_each(filled)) == len(filled["input_ids"])


@given(forests(), st.integers(0, 2**32))
def test_fill_takes_float32_as_what_it_is_in_float64(sequences, seed):
    batch = random_batch(sequences, seed)
    _, ids, shared = packing.tree_plan(batch["tokens"], batch["offsets"], batch["rows"], 2**62)
    narrow = batch | {name: batch[name].astype(np.float32) for name in ("advantages", "weights")}
    filled = fill(narrow, ids, shared)
    for key, expected in fill(batch, ids, shared).items():
        np.testing.assert_array_equal(filled[key], expected, key)


def test_fill_averages_in_double():
    """Merge weights 1, 2 and 4 with advantages 1, 2 and 4 into weight 7 with advantage 3."""
    tokens, offsets = flat([[5, 6]] * 3)
    filled = packing.tree_fill(
        tokens,
        offsets,
        np.ones(6, np.bool_),
        ints([0, 1, 2]),
        ints([0, 2, 2]),
        ints([2] * 3),
        np.array([1.0, 2.0, 4.0]),
        np.array([1.0, 2.0, 4.0]),
    )
    assert (filled["weights"].tolist(), filled["advantages"].tolist()) == ([7.0], [3.0])


@pytest.mark.parametrize("values", [1, 40, 10**6])
def test_fill_tells_many_log_probs_apart(values):
    """Fill 400 trajectories of the same tokens: one row per sampled token if merged, else one per trajectory."""
    random = np.random.default_rng(values)
    batch = random_batch([[1, 2, 3, 4, 5, 6]] * 400, 0, ["old_logprobs"])
    batch["rows"][:] = 6
    batch["logprobs"]["old_logprobs"] = random.integers(0, values, 2400).astype(np.float32)
    filled = fill(batch, range(400), [0, *[6] * 399])
    columns = ("token_index", "targets", "segment_id", "weights", "advantages", "old_logprobs")
    got = list(zip(*(filled[name].tolist() for name in columns), strict=True))
    expected = naive.prediction_rows(trajectories(batch, range(400)), ["old_logprobs"], merge=True)
    assert got == [
        (len(prefix) - 1, target, b, np.float32(weight), np.float32(advantage), np.frombuffer(bits[0], np.float32)[0])
        for prefix, target, b, weight, advantage, bits in expected
    ]
