"""Prefix trees: `tree_plan` and `tree_fill` against tests/naive_tree.py, and against hostile input.

That training on a tree is training on its trajectories one by one is proven in test_tree_exactness.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import naive_tree as naive
from mgrpo import _packing as packing

Sequences = list[list[int]]


@st.composite
def forests(draw: st.DrawFn, most: int = 12) -> Sequences:
    """Sequences that fork off earlier ones, with identical ones and ones that are a prefix of another."""
    token = st.sampled_from([0, 1, 2, -(2**31), 2**31 - 1])
    sequences: Sequences = []
    for _ in range(draw(st.integers(0, most))):
        stem = draw(st.sampled_from(sequences)) if sequences and draw(st.booleans()) else []
        tokens = stem[: draw(st.integers(0, len(stem)))] + draw(st.lists(token, max_size=6))
        sequences.append(tokens or [0])
    return sequences


def ints(values: Any) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def flat(sequences: Sequences, dtype: Any = np.int64) -> tuple[NDArray[Any], NDArray[np.int64]]:
    tokens = np.array(list(itertools.chain(*sequences)), dtype)
    return tokens, np.cumsum([0, *map(len, sequences)], dtype=np.int64)


def lengths(sequences: Sequences) -> NDArray[np.int64]:
    return ints([len(tokens) for tokens in sequences])


def plan(
    sequences: Sequences, cap: int, groups: Any = None, dtype: Any = np.int64
) -> list[tuple[list[int], list[int]]]:
    """(ids, shared) of every micro-batch."""
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
    """With fewer rows than tokens, it is the plan of the sequences cut to their rows."""
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
    """Every trajectory is a prefix of the next: a trie as deep as there are trajectories, and no recursion."""
    count = 3000
    tokens, offsets = np.zeros(count * (count + 1) // 2, np.int32), np.cumsum([0, *range(1, count + 1)])
    bins, ids, shared = packing.tree_plan(tokens, offsets, np.arange(1, count + 1), count)
    assert bins.tolist() == [0, count] and ids.tolist() == list(range(count)) and shared.tolist() == ids.tolist()


def test_plan_cuts_a_subtree_only_as_often_as_it_must():
    """Ten completions of 10 tokens after a prompt of 5 fill two micro-batches of 55: the prompt is repeated once."""
    sequences = [[1, 2, 3, 4, 5, *([n] * 10)] for n in range(10, 20)]
    assert [len(ids) for ids, _ in plan(sequences, 55)] == [5, 5]


def rollouts(seed: int, queries: int, members: int, prompt: int, system: int = 0) -> Sequences:
    """Members of a query share its prompt, pairs of them the first half of a completion, all the system prompt."""
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


@pytest.mark.parametrize(
    ("cap", "prompt", "system"), [(400, 12, 0), (800, 50, 0), (1500, 50, 5), (3000, 50, 20), (10_000, 90, 9)]
)
@pytest.mark.parametrize("seed", range(3))
def test_plan_wastes_little(cap, prompt, system, seed):
    """Within 10 % of the distinct tokens, and no more micro-batches than one open row in the given order needs."""
    sequences = rollouts(seed, 12, 8, prompt, system)
    bins = plan(sequences, cap)
    tokens = sum(len(sequences[n]) for ids, _ in bins for n in ids) - sum(sum(shared) for _, shared in bins)
    assert tokens <= 1.1 * len(naive.prefixes(sequences))
    assert len(bins) <= naive.next_fit(sequences, cap)


# ---- fill


LOGPROBS = ("old_logprobs", "sampler_logprobs", "ref_logprobs")


def random_batch(sequences: Sequences, seed: int, names: Any = LOGPROBS, dtype: Any = np.int64) -> dict[str, Any]:
    """Columns for the sequences whose rows are the tokens but 0 or 1; merged weights and advantages are exact."""
    random = np.random.default_rng(seed)
    tokens, offsets = flat(sequences, dtype)
    count = len(sequences)
    return {
        "tokens": tokens,
        "offsets": offsets,
        "sampled": random.random(len(tokens)) < 0.8,
        "rows": np.maximum(lengths(sequences) - random.integers(0, 2, count), 1),
        "advantages": random.choice([-2.0, -1.0, 0.0, 1.0, 3.0], count) * 27720 / 2**15,
        "weights": random.choice([0.0, 1.0, 1.0, 2.0], count) / 64,
        "logprobs": {name: random.choice([-1.5, -1.75], len(tokens)).astype(np.float32) for name in names},
    }


def fill(batch: dict[str, Any], ids: Any, shared: Any, merge: bool = True) -> dict[str, NDArray[Any]]:
    head = [batch[name] for name in ("tokens", "offsets", "sampled")]
    tail = [batch[name] for name in ("rows", "advantages", "weights")]
    logprobs = {f"{name}_T": values for name, values in batch["logprobs"].items()}
    return packing.tree_fill(*head, ints(ids), ints(shared), *tail, **logprobs, merge=merge)


def trajectories(batch: dict[str, Any], ids: Any) -> list[dict[str, Any]]:
    """The same, one dictionary a trajectory."""
    out = []
    for n in ids:
        span = slice(batch["offsets"][n], batch["offsets"][n + 1])
        columns = {name: values[span].tolist() for name, values in batch["logprobs"].items()}
        out.append(
            {
                "tokens": batch["tokens"][span].tolist(),
                "sampled": batch["sampled"][span].tolist(),
                "rows": int(batch["rows"][n]),
                "advantage": float(batch["advantages"][n]),
                "weight": float(batch["weights"][n]),
                **columns,
            }
        )
    return out


def paths(filled: dict[str, NDArray[Any]]) -> list[list[int]]:
    """Packed positions from the root to the end of each segment."""
    bounds = filled["tree_cu_seqlens_k"]
    return [filled["tree_kv_index"][a:b].tolist() for a, b in itertools.pairwise(bounds)]


def prefix_of_each(filled: dict[str, NDArray[Any]]) -> list[naive.Prefix]:
    """Of every packed token, the tokens that it attends to, itself last: causal, aligned to the end of its segment."""
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
    """A plan is not needed: trajectories may come in any order, repeatedly, and share less than they could."""
    batch = random_batch(sequences, seed)
    ids = data.draw(st.lists(st.sampled_from(range(len(sequences))), max_size=9)) if sequences else []
    read = [sequences[n][: batch["rows"][n]] for n in ids]
    shared = [0, *(data.draw(st.integers(0, naive.common(a, b))) for a, b in itertools.pairwise(read))][: len(ids)]
    filled = fill(batch, ids, shared)
    assert [filled["input_ids"][paths(filled)[leaf]].tolist() for leaf in filled["leaf"]] == read
    assert len(filled["input_ids"]) == sum(map(len, read)) - sum(shared)
    assert len(prefix_of_each(filled)) == len(filled["input_ids"])


def test_fill_averages_in_double():
    """Weights 1, 2 and 4 of advantages 1, 2 and 4: 7 of 3."""
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


# ---- mistakes


def bad_plan(**changes: Any) -> Callable[[], Any]:
    named = {"tokens": ints([1, 2, 3, 4, 5]), "offsets": ints([0, 2, 5]), "rows": ints([2, 3]), "cap": 9} | changes
    return lambda: packing.tree_plan(*named.values())


def bad_fill(**changes: Any) -> Callable[[], Any]:
    columns = {
        "tokens": ints([1, 2, 1, 2, 3]),
        "offsets": ints([0, 2, 5]),
        "sampled": np.ones(5, np.bool_),
        "ids": ints([0, 1]),
        "shared": ints([0, 2]),
        "rows": ints([2, 3]),
        "advantages": np.ones(2),
        "weights": np.ones(2),
    }
    named = {key: value for key, value in changes.items() if key not in columns}
    return lambda: packing.tree_fill(*(columns | {k: v for k, v in changes.items() if k in columns}).values(), **named)


MISTAKES = [
    (bad_plan(tokens=np.ones(5)), r"tokens must be a .* array of int32 or int64, got a float64"),
    (bad_plan(tokens=ints([1, 2])), r"offsets ends at 5, expected the 2 tokens"),
    (bad_plan(tokens=np.arange(10)[::2]), r"tokens must be .* not contiguous"),
    (bad_plan(offsets=ints([])), r"offsets is empty"),
    (bad_plan(offsets=ints([1, 2, 5])), r"offsets\[0\] is 1, expected 0"),
    (bad_plan(offsets=ints([0, -2, 5])), r"offsets\[1\] is -2, below offsets\[0\] = 0"),
    (bad_plan(offsets=ints([0, 2, 2**63 - 1])), r"offsets ends at 9223372036854775807, expected the 5 tokens"),
    (bad_plan(offsets=[0, 2, 5]), r"offsets must be a .* array of int64, got <class 'list'>"),
    (bad_plan(rows=ints([2])), r"rows has 1 entries, expected one for each of the 2 trajectories"),
    (bad_plan(rows=ints([0, 3])), r"rows\[0\] is 0, expected from 1 to the trajectory's 2 tokens"),
    (bad_plan(rows=ints([2, 4])), r"rows\[1\] is 4, expected from 1 to the trajectory's 3 tokens"),
    (bad_plan(offsets=ints([0, 0, 5])), r"rows\[0\] is 2, expected from 1 to the trajectory's 0 tokens"),
    (bad_plan(cap=2), r"rows\[1\] is 3, more than cap 2"),
    (bad_plan(cap=0), r"cap must be at least 1, got 0"),
    (bad_plan(cap=2**63), r"cap must be a 64-bit integer, got 9223372036854775808"),
    (bad_plan(groups=ints([1])), r"groups has 1 entries, expected one for each of the 2"),
    (bad_plan(groups=ints([])), r"groups has 0 entries, expected one for each of the 2"),
    (bad_plan(groups=np.ones(2)), r"groups must be a .* array of int64, got a float64"),
    (bad_fill(tokens=ints([1])), r"sampled has 5 entries, expected one for each of the 1 tokens"),
    (bad_fill(sampled=np.ones(4, np.bool_)), r"sampled has 4 entries, expected one for each of the 5 tokens"),
    (bad_fill(sampled=np.ones(5)), r"sampled must be a .* array of bool or uint8, got a float64"),
    (bad_fill(offsets=ints([])), r"offsets is empty"),
    (bad_fill(offsets=ints([0, 2, 6])), r"offsets\[1\] and offsets\[2\] are 2 and 6, expected .* the 5 tokens"),
    (bad_fill(offsets=ints([-1, 2, 5])), r"offsets\[0\] and offsets\[1\] are -1 and 2"),
    (bad_fill(offsets=ints([0, 2, -(2**63)])), r"offsets\[1\] and offsets\[2\] are 2 and -9223372036854775808"),
    (bad_fill(ids=ints([0, 2])), r"ids\[1\] is 2, expected from 0 to below 2"),
    (bad_fill(ids=ints([-1, 0])), r"ids\[0\] is -1, expected from 0 to below 2"),
    (bad_fill(shared=ints([0])), r"shared has 1 entries, expected one for each of the 2 ids"),
    (bad_fill(shared=ints([1, 2])), r"shared\[0\] is 1, expected 0"),
    (bad_fill(shared=ints([0, 3])), r"shared\[1\] is 3, expected from 0 to the 2 rows of trajectories 0 and 1"),
    (bad_fill(shared=ints([0, -1])), r"shared\[1\] is -1, expected from 0"),
    (bad_fill(tokens=ints([1, 2, 1, 7, 3])), r"shared\[1\] is 2, but trajectories 0 and 1 part after 1 tokens"),
    (bad_fill(rows=ints([2, 4])), r"rows\[1\] is 4, expected from 1 to the trajectory's 3 tokens"),
    (bad_fill(advantages=np.array([np.nan, 1])), r"advantages\[0\] is nan, expected a finite float32"),
    (bad_fill(advantages=np.ones(2, np.float32)), r"advantages must be a .* array of float64, got a float32"),
    (bad_fill(weights=np.array([1, np.nan])), r"weights\[1\] is nan, expected a finite float32"),
    (bad_fill(weights=np.array([1, 1e39])), r"weights\[1\] is 1e\+39, expected a finite float32"),
    (bad_fill(weights=np.array([1, -0.5])), r"weights\[1\] is -0.5, expected at least 0"),
    (bad_fill(weights=np.ones(3)), r"weights has 3 entries, expected one for each of the 2 trajectories"),
    (bad_fill(old_logprobs_T=np.ones(5)), r"old_logprobs must be a .* array of float32, got a float64"),
    (bad_fill(ref_logprobs_T=np.ones(4, np.float32)), r"ref_logprobs has 4 entries, .* each of the 5 tokens"),
    (bad_plan(rows=np.frombuffer(bytes(17), np.uint8)[1:].view(np.int64)), r"rows must be a one-dimensional contig"),
]


@pytest.mark.parametrize(("call", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_fill_counts_in_int32():
    """512 copies of a long trajectory that share nothing are more tokens than int32 counts; sharing all, they fit."""
    length, copies = 2**22, 2**9
    columns = (np.zeros(length, np.int32), ints([0, length]), np.zeros(length, np.bool_), np.zeros(copies, np.int64))
    with pytest.raises(ValueError, match=r"ids\[511\] = 0 brings the batch to 2143289344 \+ 4194304 tokens"):
        packing.tree_fill(*columns, np.zeros(copies, np.int64), ints([length]), np.ones(1), np.ones(1))


EXTREMES = [-(2**63), -1, 0, 1, 2, 3, 7, 2**31, 2**63 - 1]
scalars = st.sampled_from([*EXTREMES, 2**64, 1.5, float("nan"), None, "x", True])
dtypes = st.sampled_from([np.int64, np.int64, np.int64, np.int32, np.bool_, np.uint8, np.float32, np.float64])
arrays = st.builds(
    lambda values, dtype: np.array(values, np.int64).astype(dtype),
    st.lists(st.sampled_from(EXTREMES), max_size=4),
    dtypes,
)


@settings(max_examples=300)
@given(st.sampled_from([(packing.tree_plan, 5), (packing.tree_fill, 8)]), st.data())
def test_hostile_arguments_are_refused(function, data):
    """Whatever is passed, the answer is a result or a plain Python error: the process lives."""
    call, arity = function
    arguments = data.draw(st.lists(st.one_of(arrays, arrays, scalars), min_size=arity, max_size=arity))
    try:
        call(*arguments)
    except (ValueError, TypeError):
        return


@settings(max_examples=300)
@given(st.data())
def test_hostile_numbers_are_refused(data):
    """The same with every dtype right, so that it is the numbers that are checked."""

    def column(size: int, values: Any = EXTREMES) -> NDArray[np.int64]:
        return ints(data.draw(st.lists(st.sampled_from(values), min_size=size, max_size=size)))

    tokens, offsets, small = column(4, [0, 1]), column(3, [0, 0, 1, 2, 4, *EXTREMES]), [0, 1, 1, 2, 2, 3, *EXTREMES]
    rows, ids = column(2, small), column(3, small)
    for call in (
        lambda: packing.tree_plan(tokens, offsets, rows, 3),
        lambda: packing.tree_fill(tokens, offsets, tokens == 1, ids, column(3, small), rows, np.ones(2), np.ones(2)),
    ):
        try:
            call()
        except ValueError:
            continue
