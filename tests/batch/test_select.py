"""drop, merge and compact: no gradient is lost, nothing is counted twice, and results are those of the naive loop."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cases.weighed import (
    Weighed,
    columns_of,
    naive_drop,
    naive_merge,
    plain,
    trajectory,
    weighed_of,
    weights,
)
from mgrpo.engine.batch.advantages import Credit
from mgrpo.engine.batch.select import compact, drop, merge
from mgrpo.kernels import Objective

# Any float: rounding depends on the order of the operations.
any_weight = st.floats(1e-6, 1e3)
any_advantage = st.floats(-50, 50) | st.sampled_from([0.0, -0.0, 1 / 3, -1 / 3])


def dropped(weighed: list[Weighed], keep: bool) -> list[int]:
    trajectories, adv_N, weight_N = columns_of(weighed)
    rows_N = np.array([t.rows for t in trajectories], np.int64)
    return drop(rows_N, adv_N, weight_N, keep_zero_advantage=keep).tolist()


def merged(weighed: list[Weighed], by_sampler: bool = False, by_advantage: bool = False) -> list[Weighed]:
    trajectories, adv_N, weight_N = columns_of(weighed)
    digests = [t.sampler_digest if by_sampler else t.digest for t in trajectories]
    found = merge(digests, adv_N, weight_N, by_advantage=by_advantage)
    rows = zip(found.ids.tolist(), found.adv.tolist(), found.weight.tolist(), strict=True)
    return [Weighed(trajectories[i], adv, weight) for i, adv, weight in rows]


# ---- drop


@given(weighed_of(st.sampled_from([0.0, 0.5, 1.0])), st.booleans())
def test_drop_leaves_out_exactly_what_has_no_gradient_and_keeps_the_order(weighed, keep):
    kept = [id(w) for w in naive_drop(weighed, keep_zero_advantage=keep)]
    assert [id(weighed[i]) for i in dropped(weighed, keep)] == kept


# ---- merge


@given(weighed_of(any_weight, any_advantage), st.booleans(), st.booleans())
@settings(max_examples=300)
def test_merge_is_the_naive_loop_to_the_bit(weighed, by_sampler, by_advantage):
    expected = naive_merge(weighed, by_sampler_logprobs=by_sampler, by_advantage=by_advantage)
    assert merged(weighed, by_sampler, by_advantage) == expected


def test_many_copies_are_summed_in_the_order_they_came():
    """A sum of floats depends on its order, so another order gives other numbers."""
    random = np.random.default_rng(0)
    kinds = [plain(1, 2, 3), plain(1, 2, 4), plain(5, 6)]
    weighed = [Weighed(kinds[random.integers(3)], float(random.normal()), float(random.random())) for _ in range(999)]
    got, backwards = merged(weighed), merged(weighed[::-1])
    assert got == naive_merge(weighed, by_sampler_logprobs=False) and len(got) == 6
    assert sorted(w.advantage for w in got) != sorted(w.advantage for w in backwards)


def identity(w: Weighed, by_sampler: bool) -> Any:
    t = w.trajectory
    same = tuple(t.tokens), tuple(t.sampled), (w.advantage > 0) - (w.advantage < 0)
    return (*same, tuple(t.logprobs)) if by_sampler else same


def sums(weighed: list[Weighed], by_sampler: bool) -> dict[Any, tuple[float, float]]:
    """Return the weight of each distinct trajectory, and its weight times advantage."""
    found: dict[Any, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for w in weighed:
        found[identity(w, by_sampler)][0] += w.weight
        found[identity(w, by_sampler)][1] += w.weight * w.advantage
    return {key: (weight, pytest.approx(product, rel=1e-12, abs=0)) for key, (weight, product) in found.items()}


@given(weighed_of(weights), st.booleans())
@settings(max_examples=200)
def test_merge_leaves_one_of_each_with_all_of_their_weight_and_gain(weighed, by_sampler):
    got = merged(weighed, by_sampler)
    keys = [identity(w, by_sampler) for w in got]
    assert len(set(keys)) == len(keys) and sums(got, by_sampler) == sums(weighed, by_sampler)
    assert list(dict.fromkeys(identity(w, by_sampler) for w in weighed)) == keys  # in the order they first came


@given(weighed_of(weights), st.booleans())
def test_merging_again_changes_nothing(weighed, by_sampler):
    got = merged(weighed, by_sampler)
    assert merged(got, by_sampler) == got


def test_trajectories_that_gain_and_that_lose_stay_apart():
    """Clipping treats the signs differently: +1 and -1 at weight 1 each are not 0 at weight 2."""
    t = plain(1, 2, 3)
    got = merged([Weighed(t, a, 1.0) for a in (1.0, -1.0, 0.0, 3.0, -3.0)])
    assert [(w.advantage, w.weight) for w in got] == [(2.0, 2.0), (-2.0, 2.0), (0.0, 1.0)]


def test_the_samplers_logprobs_tell_apart_only_if_they_weigh():
    weighed = [Weighed(plain(1, 2, logprob=p), 1.0, 1.0) for p in (-1.0, -1.5, -1.0)]
    assert [w.weight for w in merged(weighed, by_sampler=True)] == [2.0, 1.0]
    assert [w.weight for w in merged(weighed)] == [3.0]


@pytest.mark.parametrize(
    "other", [plain(1, 2, 4), plain(1, 2), plain(1, 2, 3, sampled=".x."), plain(1, 2, 3, 3), plain(9, 2, 3)]
)
def test_what_differs_in_tokens_or_in_what_was_sampled_is_not_merged(other):
    weighed = [Weighed(plain(1, 2, 3), 1.0, 1.0), Weighed(other, 1.0, 1.0)]
    assert merged(weighed) == weighed


def test_versions_do_not_tell_identical_trajectories_apart():
    rows = [(1, False, 0.0), (2, True, -1.0)]
    weighed = [Weighed(trajectory(rows, version), 1.0, 1.0) for version in (3, 4)]
    assert len(merged(weighed, by_sampler=True)) == 1


# ---- both, as an objective asks


@pytest.mark.parametrize(
    ("objective", "keep", "by_sampler", "by_advantage"),
    [
        (Objective(sampler_cap=None), False, False, False),
        (Objective(sampler_cap=2.0), False, True, False),
        (Objective(sampler_cap=None, kl_coef=0.1), True, False, False),
        (Objective(sampler_cap=None, entropy_coef=0.1), True, False, False),
        (Objective(sampler_cap=None, rule=lambda rows, objective: rows.logprobs), True, True, True),
    ],
)
@given(weighed=weighed_of(st.sampled_from([0.0, 0.25, 1.0])))
def test_the_objective_decides_what_is_left_out_and_what_is_identical(
    weighed, objective, keep, by_sampler, by_advantage
):
    trajectories, adv_N, weight_N = columns_of(weighed)
    empty = np.zeros(0)
    calls, adv_M, weight_M = compact(Credit(trajectories, empty, adv_N, empty, weight_N, empty), objective)
    live = naive_drop(weighed, keep_zero_advantage=keep)
    expected = naive_merge(live, by_sampler_logprobs=by_sampler, by_advantage=by_advantage)
    assert list(map(Weighed, calls, adv_M.tolist(), weight_M.tolist())) == expected


def test_of_nothing_nothing_is_left():
    none = np.zeros(0)
    assert drop(none.astype(int), none, none, keep_zero_advantage=True).tolist() == []
    assert [x.tolist() for x in merge([], none, none)] == [[], [], []]
