"""pack and its plans: all ranks together run all that counts, once, and each runs equally many micro-batches."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo import _packing
from mgrpo.engine.batch.packing import pack, plan_batches
from mgrpo.engine.batch.prefix_trees import plan_trees
from mgrpo.engine.batch.shares import MicroBatch

LOGPROBS = ("old_logprobs", "sampler_logprobs", "ref_logprobs")
Case = dict[str, Any]  # the arguments of `pack`, ragged ones as lists of arrays


@st.composite
def cases(draw: st.DrawFn, shortest: int = 0) -> Case:
    """Draw trajectories of few tokens, so that prefixes are shared, some without an action or a weight."""
    flags = draw(st.lists(st.lists(st.booleans(), min_size=shortest, max_size=7), max_size=9))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    token, flag = draw(st.sampled_from([np.int32, np.int64])), draw(st.sampled_from([np.bool_, np.uint8]))
    names = draw(st.sets(st.sampled_from(LOGPROBS)))
    return {
        "tokens": [random.integers(0, 2, len(each)).astype(token) for each in flags],
        "sampled": [np.array(each, flag) for each in flags],
        "advantages": random.choice([-2.0, 0.0, 1.0], len(flags)),
        "weights": random.choice([0.0, 0.5, 1.0, 3.0], len(flags)),
    } | {name: [random.choice([-1.5, -2.0], len(each)).astype(np.float32) for each in flags] for name in sorted(names)}


def flat(each_N: list[np.ndarray], dtype: Any = np.int64) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([np.zeros(0, dtype), *each_N]), np.cumsum([0, *map(len, each_N)])


def flatten(case: Case) -> Case:
    """Return the ragged columns as pairs."""
    dtypes = {"tokens": np.int64, "sampled": np.bool_}
    return {
        name: flat(v, v[0].dtype if v else dtypes.get(name, np.float32)) if isinstance(v, list) else v
        for name, v in case.items()
    }


def rows_of(case: Case, n: int) -> int:
    """Return how many tokens precede the last action, 0 for a trajectory that does not count."""
    actions = np.flatnonzero(case["sampled"][n])
    return int(actions[-1]) if case["weights"][n] and len(actions) else 0


def expected(case: Case) -> list[dict[str, Any]]:
    """Return the rows of each trajectory that counts."""
    found = []
    for n in range(len(case["tokens"])):
        if not (rows := rows_of(case, n)):
            continue
        acts = case["sampled"][n][1 : rows + 1] != 0
        logprobs = {name: np.where(acts, case[name][n][1 : rows + 1], 0) for name in LOGPROBS if name in case}
        row = {
            "input_ids": case["tokens"][n][:rows],
            "positions": np.arange(rows),
            "targets": case["tokens"][n][1 : rows + 1],
            "action_mask": acts,
            "weights": case["weights"][n] * acts,
            "advantages": np.full(rows, case["advantages"][n]),
        }
        found.append({name: values.tolist() for name, values in (row | logprobs).items()})
    return found


def sequences(batch: MicroBatch) -> list[dict[str, Any]]:
    names = [name for name, value in batch.items() if isinstance(value, np.ndarray)]
    names = [name for name in names if name not in ("segment_ids", "cu_seqlens")]
    bounds = itertools.pairwise(batch["cu_seqlens"].tolist())
    return [{name: batch[name][a:b].tolist() for name in names} for a, b in bounds]


def counted(rows: list[dict[str, Any]]) -> Counter[str]:
    return Counter(repr(sorted(row.items())) for row in rows)


def is_dummy(batch: MicroBatch) -> bool:
    return not batch["weights"].any()


# ---- micro-batches


@given(cases(), st.integers(1, 4), st.integers(1, 3), st.integers(6, 14), st.booleans())
@settings(max_examples=200)
def test_all_ranks_together_run_all_that_counts_and_each_as_many_micro_batches(
    case, ranks, mini_batches, cap, as_pairs
):
    given = flatten(case) if as_pairs else case
    shares = [pack(**given, cap=cap, ranks=ranks, rank=rank, mini_batches=mini_batches) for rank in range(ranks)]
    assert all(list(map(len, share)) == list(map(len, shares[0])) for share in shares)
    assert len(shares[0]) == mini_batches
    batches = [batch for share in shares for batch in itertools.chain(*share)]
    real = [batch for batch in batches if not is_dummy(batch)]
    assert counted([row for batch in real for row in sequences(batch)]) == counted(expected(case))
    for batch in batches:
        assert 0 < len(batch["input_ids"]) <= cap and set(case) - set(batch) == {"tokens", "sampled"}
        assert batch["actions"] == batch["action_mask"].sum()
        assert batch["weight_sum"] == batch["weights"].sum()
    for rank in range(ranks):  # some rank has something to do in every round
        for mini in range(mini_batches):
            for turn in range(len(shares[rank][mini])):
                assert not all(is_dummy(share[mini][turn]) for share in shares)


def test_a_rank_with_nothing_left_runs_the_shortest_without_weight():
    tokens = [np.arange(5), np.arange(10, 13), np.arange(20, 24)]
    case = {"tokens": tokens, "sampled": [np.ones(len(t), np.bool_) for t in tokens]}
    case |= {"advantages": [1.0, 2.0, 3.0], "weights": [1.0, 1.0, 1.0]}
    shares = [pack(**case, cap=8, ranks=5, rank=rank)[0] for rank in range(5)]
    assert [len(share) for share in shares] == [1] * 5
    assert [int(share[0]["weight_sum"]) for share in shares] == [4, 3, 2, 0, 0]  # the most expensive first
    for share in shares[3:]:
        (dummy,) = share
        assert dummy["input_ids"].tolist() == [10, 11] and dummy["cu_seqlens"].tolist() == [0, 2]
        assert dummy["actions"] == 0 and not dummy["weights"].any() and not dummy["action_mask"].any()


@pytest.mark.parametrize("tree", [False, True])
def test_nothing_that_counts_is_no_micro_batch_on_any_rank(tree):
    nothing = {"tokens": [], "sampled": [], "advantages": [], "weights": []}
    assert pack(**nothing, cap=1, ranks=3, rank=2, tree=tree) == [[]]
    silent = {"tokens": (np.arange(4), np.array([0, 2, 4])), "sampled": (np.ones(4, np.bool_), np.array([0, 2, 4]))}
    assert pack(**silent, advantages=[1, 1], weights=[0, 0], cap=1, ranks=2, tree=tree) == [[]]
    if not tree:
        assert pack(**nothing, cap=1, mini_batches=3) == [[], [], []]


def test_more_mini_batches_than_trajectories_leave_the_others_empty_on_every_rank():
    one = {"tokens": [np.arange(3)], "sampled": [np.ones(3, np.bool_)], "advantages": [1.0], "weights": [1.0]}
    for rank in range(2):
        assert sorted(map(len, pack(**one, cap=4, mini_batches=3, ranks=2, rank=rank))) == [0, 0, 1]


def test_groups_share_a_micro_batch():
    tokens = [np.arange(3) for _ in range(6)]
    case = {"tokens": tokens, "sampled": [np.ones(3, np.bool_)] * 6, "weights": [1, 1, 0, 1, 1, 1]}
    (batches,) = pack(**case, advantages=[1, 2, 3, 1, 2, 3], cap=4, groups=np.array([1, 2, 3, 1, 2, 3]))
    assert sorted(sorted(set(b["advantages"].tolist())) for b in batches) == [[1], [2], [3]]


@pytest.mark.parametrize("form", ["lists of int", "arrow", "arrow slice", "chunked"])
def test_forms_of_the_columns_are_alike(form):
    rows = [[5, 6, 7], [8, 9], [1, 2, 3, 4]]
    make = {
        "lists of int": lambda: rows,
        "arrow": lambda: pa.array(rows, pa.list_(pa.int64())),
        "arrow slice": lambda: pa.array([[0], *rows, [0]], pa.large_list(pa.int64()))[1:4],
        "chunked": lambda: pa.chunked_array([rows], pa.list_(pa.int64())),
    }
    sampled = pa.array([[0, 1, 1], [0, 1], [0, 0, 1, 0]], pa.list_(pa.uint8()))
    rest = {"sampled": sampled, "advantages": [1, 2, 3], "weights": [1, 1, 1], "cap": 8}
    (got,), (usual,) = (pack(tokens, **rest) for tokens in (make[form](), [np.array(row) for row in rows]))
    assert [sequences(b) for b in got] == [sequences(b) for b in usual] and len(got) == 1


@pytest.mark.parametrize("tree", [False, True])
def test_the_arena_keeps_what_is_held_and_takes_again_what_is_not(tree):
    arena = _packing.Arena()
    bounds, tokens = np.array([0, 9]), np.arange(9)
    one = {"sampled": (np.ones(9, np.bool_), bounds), "advantages": [1.0], "weights": [1.0], "cap": 8, "tree": tree}
    ((held,),) = pack((tokens, bounds), **one, arena=arena)
    ((other,),) = pack((tokens + 100, bounds), **one, arena=arena)
    assert held["input_ids"].tolist() == list(range(8)) and other["input_ids"].tolist() == list(range(100, 108))
    size, address = arena.held, other["input_ids"].ctypes.data
    del other
    ((again,),) = pack((tokens, bounds), **one, arena=arena)
    assert arena.held == size and again["input_ids"].ctypes.data == address


# ---- plans


@given(cases(), st.integers(1, 4), st.integers(1, 3), st.integers(6, 14), st.data())
def test_a_rank_that_reads_only_its_own_fills_the_same(case, ranks, mini_batches, cap, data):
    """The plan needs only the numbers of rows."""
    rank = data.draw(st.integers(0, ranks - 1))
    options = {"cap": cap, "ranks": ranks, "rank": rank, "mini_batches": mini_batches}
    usual, asked = pack(**case, **options), []

    def read(ids_K: np.ndarray) -> Case:
        asked.append(ids_K.tolist())
        return {name: [case[name][n] for n in ids_K] for name in case if name not in ("advantages", "weights")}

    rows_N = [0 if not any(each) else int(np.flatnonzero(each)[-1]) for each in case["sampled"]]
    got = pack(None, None, case["advantages"], case["weights"], rows=rows_N, read=read, **options)
    assert repr(got) == repr(usual)
    (ids,) = asked
    assert ids == sorted(set(ids))
    assert sum(len(batch["cu_seqlens"]) - 1 for batch in itertools.chain(*usual)) >= len(ids)


def test_the_cost_decides_what_runs_side_by_side():
    """One long sequence costs as much as many short ones of more rows."""
    rows_N = np.array([10, 5, 5, 5, 5], np.int64)
    by_rows = plan_batches(rows_N, 30, ranks=2, cost=(1.0, 0.0))[0][0].ids_B
    by_squares = plan_batches(rows_N, 30, ranks=2, cost=(0.0, 1.0))[0][0].ids_B
    assert rows_N[by_rows].sum() == 15 and sorted(rows_N[by_squares].tolist()) != sorted(rows_N[by_rows].tolist())


# ---- trees


def decoded(batch: MicroBatch) -> list[dict[str, Any]]:
    """Return each trajectory of a tree of unmerged rows: the tokens of its path, and its prediction rows in order."""
    found, names = [], ("targets", "weights", "advantages", *(name for name in LOGPROBS if name in batch))
    for place, leaf in enumerate(batch["leaf"]):
        path = batch["tree_kv_index"][slice(*batch["tree_cu_seqlens_k"][leaf : leaf + 2])]
        rows = np.flatnonzero(batch["segment_id"] == place)
        at = [path.tolist().index(token) for token in batch["token_index"][rows]]
        columns = {name: batch[name][rows].tolist() for name in names}
        found.append({"input_ids": batch["input_ids"][path].tolist(), "at": at, **columns})
    return found


def expected_in_trees(case: Case) -> list[dict[str, Any]]:
    found = []
    for row in expected(case):
        at = np.flatnonzero(row["action_mask"])
        names = ("targets", "weights", "advantages", *(name for name in LOGPROBS if name in case))
        columns = {name: [row[name][i] for i in at] for name in names}
        found.append({"input_ids": row["input_ids"], "at": at.tolist(), **columns})
    return found


@given(cases(shortest=1), st.integers(1, 4), st.integers(6, 14))
@settings(max_examples=200)
def test_trees_of_all_ranks_hold_all_that_counts(case, ranks, cap):
    given = flatten(case)
    shares = [pack(**given, cap=cap, ranks=ranks, rank=rank, tree=True, merge=False)[0] for rank in range(ranks)]
    assert len(set(map(len, shares))) == 1
    real = [batch for share in shares for batch in share if not is_dummy(batch)]
    got = counted([row for batch in real for row in decoded(batch)])
    counts = counted(expected_in_trees(case))
    left_out = got - counts
    assert got & counts == counts
    assert all("('at', [])" in row for row in left_out)  # these have no prediction rows
    turns = list(zip(*shares, strict=True))
    costs = [0 if is_dummy(batch) else len(batch["input_ids"]) for turn in turns for batch in turn]
    assert costs == sorted(costs, reverse=True)  # side by side by cost, the dearest first
    assert not any(is_dummy(turn[0]) for turn in turns)
    assert all(0 < len(batch["input_ids"]) <= cap for share in shares for batch in share)


def test_one_tree_is_split_where_ranks_would_be_idle():
    """Four trajectories that share 2 of 12 tokens fit one micro-batch; on two ranks 2 tokens more halve the time."""
    tokens = np.array([[1, 2, *range(10 * n, 10 * n + 11)] for n in range(1, 5)])
    bounds = np.arange(5) * 13
    case = {"tokens": (tokens.ravel(), bounds), "sampled": (np.ones(52, np.bool_), bounds)}
    case |= {"advantages": np.ones(4), "weights": np.ones(4), "cap": 64, "tree": True}
    assert [len(batch["input_ids"]) for batch in pack(**case)[0]] == [2 + 4 * 10]
    assert [len(pack(**case, ranks=2, rank=rank)[0][0]["input_ids"]) for rank in range(2)] == [22, 22]


def test_a_rank_without_a_tree_runs_the_shortest_trajectory_without_weight():
    given = {"tokens": (np.array([1, 2, 3, 7, 8]), np.array([0, 3, 5]))}
    given |= {"sampled": (np.ones(5, np.bool_), np.array([0, 3, 5])), "advantages": [1, 1], "weights": [1, 1]}
    first, second, third = (pack(**given, cap=9, ranks=3, rank=rank, tree=True)[0] for rank in range(3))
    assert [b["input_ids"].tolist() for b in (*first, *second, *third)] == [[1, 2], [7], [7]]
    assert [float(b["weights"].sum()) for b in (*first, *second, *third)] == [2, 1, 0]


def test_squares_in_the_cost_of_a_tree_count_depth():
    """Two trees of 6 tokens: one deep trajectory costs more than three short ones."""
    rows_N = np.array([2, 2, 2, 6], np.int64)
    tokens, bounds = np.arange(12), np.array([0, 2, 4, 6, 12])
    (flat_cost,) = plan_trees(tokens, bounds, rows_N, 6)
    (squared,) = plan_trees(tokens, bounds, rows_N, 6, cost=(1.0, 0.5))
    assert [b.cost for b in flat_cost] == [6, 6]
    assert [(b.ids_B.tolist(), b.cost) for b in squared] == [([3], 6 + 18), ([0, 1, 2], 6 + 6)]


# ---- mistakes

FINE = {"tokens": [np.arange(4)], "sampled": [np.ones(4, np.bool_)], "advantages": [1.0], "weights": [1.0], "cap": 8}
FLAT = {name: (each[0], np.array([0, 4])) for name, each in FINE.items() if name in ("tokens", "sampled")}


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"rank": 2, "ranks": 2}, "rank: 2 given: expected from 0 to below the 2 ranks"),
        ({"rank": -1}, "rank: -1 given: expected from 0 to below the 1 ranks"),
        ({"ranks": 0}, "ranks: 0 given: expected at least 1"),
        ({"cap": 2}, r"lengths\[0\] is 3, more than cap 2"),
        ({"cap": 2, "tree": True} | FLAT, r"rows\[0\] is 3"),
        ({"mini_batches": 0}, "mini_batches must be from 1"),
        ({"sampled": [np.ones(3, np.bool_)]}, "sampled: row 0 has 3 entries: expected 4, as tokens has"),
        ({"sampled": []}, "sampled: 0 rows given: expected 1, as tokens has"),
        ({"old_logprobs": [np.ones(5, np.float32)]}, "old_logprobs: row 0 has 5 entries: expected 4"),
        ({"ref_logprobs": [np.ones(4)]}, r"ref_logprobs\[0\] must be .* float32"),
        ({"weights": [1.0, 2.0]}, r"weights: an array of shape \(2,\) given: expected \(1,\), one for each trajectory"),
        ({"advantages": 1.0}, r"advantages: an array of shape \(\) given"),
        ({"advantages": [np.nan]}, r"advantages\[0\] is nan"),
        ({"groups": np.zeros(2, np.int64)}, r"groups: an array of shape \(2,\) given: expected \(1,\)"),
        ({"groups": np.zeros(1)}, "groups must be .* int64, got a float64"),
        ({"tokens": np.arange(4)}, "tokens: a int64 array of shape .* given: expected a pair"),
        ({"tree": True}, "tokens: a list of arrays given: expected one flat array for a tree; np.concatenate copies"),
        ({"tree": True, "tokens": FLAT["tokens"]}, "sampled: a list of arrays given"),
        (
            {"tree": True, "groups": np.zeros(1, np.int64)},
            "tree: True given with groups or mini_batches: expected neither",
        ),
        ({"tree": True, "mini_batches": 2}, "tree: True given with groups or mini_batches: expected neither"),
        ({"tree": True, "cost": (1.0, -1.0)} | FLAT, r"cost: \(1.0, -1.0\) given: expected two finite numbers"),
        ({"tree": True, "ranks": 0} | FLAT, "ranks: 0 given"),
        ({"tree": True, "weights": [-1.0]} | FLAT, r"weights\[0\] is -1"),
    ],
)
def test_mistakes_are_named(wrong, match):
    with pytest.raises(ValueError, match=match):
        pack(**FINE | wrong)


READ = {"tokens": [np.arange(4)], "sampled": [np.ones(4, np.bool_)]}
UNREAD = FINE | {"tokens": None, "sampled": None, "rows": [3], "read": lambda ids_K: READ}


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"tokens": [np.arange(4)]}, "tokens: given together with read: expected None, read returns it"),
        ({"ref_logprobs": [np.ones(4)]}, "ref_logprobs: given together with read"),
        ({"read": None}, "rows: given without read: expected None"),
        ({"rows": None}, "rows: None given with read: expected the number of rows of each trajectory"),
        ({"rows": [3.0]}, r"rows: float64 of shape \(1,\) given: expected integers, in one dimension"),
        ({"rows": [3, 3]}, r"weights: an array of shape \(1,\) given: expected \(2,\), one for each trajectory"),
        ({"tree": True}, "read: given with tree=True"),
        ({"rows": [2]}, "read: trajectory 0 with 3 rows returned: expected 2, as `rows` says"),
        ({"read": lambda ids_K: {"tokens": [np.arange(4)]}}, r"read: columns \['tokens'\] returned: expected tokens,"),
        ({"read": lambda ids_K: READ | {"logits": [np.ones(4)]}}, "read: columns .*'logits'.* returned"),
        ({"read": lambda ids_K: {name: [] for name in READ}}, r"weights: an array of shape \(1,\) given"),
        ({"cap": 2}, r"lengths\[0\] is 3, more than cap 2"),
    ],
)
def test_mistakes_of_a_caller_that_reads_are_named(wrong, match):
    assert len(pack(**UNREAD)[0]) == 1
    with pytest.raises(ValueError, match=match):
        pack(**UNREAD | wrong)
