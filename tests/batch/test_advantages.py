"""Rewards, members of a group, copies, weights and advantages, against a plain loop over physical copies."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo.engine.batch.advantages import Credit, main_reward, sub_reward, weigh
from mgrpo.engine.config.schema import AlgorithmConfig, RewardConfig
from mgrpo.engine.run.trajectories import Position
from mgrpo.engine.store import CallRecord, Group, RolloutRecord

PAPER = RewardConfig()
OTHER = RewardConfig(main_format=0.5, main_correct=2.0, sub_format=0.25, sub_correct=-1.0, sub_expert=3.0)


def rollout(
    number: int, correct: float = 0.0, query: int = 0, status: str = "scored", valid: bool = True
) -> RolloutRecord:
    return RolloutRecord(query, number, status, valid, correct, 1.0)


def call(
    number: int, index: int = 0, expert: float | None = 0.0, query: int = 0, valid: bool = True, agent: str = "sub"
) -> CallRecord:
    position = Position("f", query, 100 * number + index)
    return CallRecord(agent, query, number, index, valid, expert, 0, 9, 3, 1, False, "answer", position)


def sub_group(query: int, experts: Sequence[Sequence[float]]) -> Group:
    """Return a query whose rollouts are all correct and made calls with these expert scores."""
    rollouts = [rollout(n, 1.0, query) for n in range(len(experts))]
    calls = [call(n, i, expert, query) for n, scores in enumerate(experts) for i, expert in enumerate(scores)]
    return Group(query, "task", 0, rollouts, calls)


def main_group(query: int, corrects: Sequence[float]) -> Group:
    rollouts = [rollout(n, correct, query) for n, correct in enumerate(corrects)]
    return Group(query, "task", 0, rollouts, [call(n, 0, None, query, agent="main") for n in range(len(corrects))])


def weighted(
    groups: list[Group],
    agent: str = "sub",
    seed: int = 0,
    reward: RewardConfig = PAPER,
    index: int = 1,
    **algorithm: Any,
) -> Credit[CallRecord]:
    """Weigh groups, by default with a length of 1 for all, so that a weight is a share times a multiplicity."""
    lengths = {"length_norm": "constant", "length_constant": 1.0}
    return weigh(agent, index, groups, AlgorithmConfig(**lengths | algorithm), reward, seed)


def shares(credit: Credit[CallRecord]) -> np.ndarray:
    """Return what one copy of each trajectory counts."""
    return credit.weight / credit.multiplicities


def by_position(w: Credit[CallRecord]) -> dict[Position, tuple[float, float, float]]:
    """Return reward, multiplicity and advantage of each call."""
    rows = zip(w.rewards.tolist(), w.multiplicities.tolist(), w.adv.tolist(), strict=True)
    return dict(zip([c.position for c in w.calls], rows, strict=True))


# ---- rewards


@pytest.mark.parametrize(
    ("valid", "correct", "paper", "other"), [(True, 1.0, 1.0, 2.5), (True, 0.5, 0.55, 1.5), (False, 1.0, 0.0, 0.0)]
)
def test_main_reward_is_equation_4(valid, correct, paper, other):
    assert main_reward(rollout(0, correct, valid=valid), PAPER) == pytest.approx(paper)
    assert main_reward(rollout(0, correct, valid=valid), OTHER) == pytest.approx(other)


@pytest.mark.parametrize("main_valid", [True, False])
@pytest.mark.parametrize(
    ("valid", "correct", "expert", "paper", "other"),
    [
        (True, 1.0, 1.0, 1.0, 2.25),
        (True, 1.0, 0.0, 0.5, -0.75),
        (True, 0.0, 0.5, 0.35, 1.75),
        (False, 1.0, 1.0, 0.0, 0.0),
    ],
)
def test_sub_reward_is_equation_5_by_its_own_format(main_valid, valid, correct, expert, paper, other):
    of = rollout(0, correct, valid=main_valid)
    assert sub_reward(call(0, expert=expert, valid=valid), of, PAPER) == pytest.approx(paper)
    assert sub_reward(call(0, expert=expert, valid=valid), of, OTHER) == pytest.approx(other)


def test_every_call_of_a_rollout_shares_the_main_agents_correctness():
    group = Group(0, "task", 0, [rollout(0, 1.0), rollout(1, 0.0)], [call(0, 0), call(0, 1), call(1, 0)])
    assert weighted([group]).rewards == pytest.approx([0.5, 0.5, 0.1])


def test_the_configured_reward_is_used():
    assert weighted([main_group(0, [1, 0])], "main", reward=OTHER).rewards == pytest.approx([2.5, 0.5])


# ---- who is in a group


@pytest.mark.parametrize("status", ["unscored", "failed"])
@pytest.mark.parametrize("agent", ["main", "sub"])
def test_a_rollout_without_a_score_leaves_the_group_as_if_never_made(agent, status):
    """Its calls are left out, and K is the number of scored rollouts: it does not count as a low score."""
    kept = main_group(4, [1, 0, 0]) if agent == "main" else sub_group(4, [[1, 0.5], [], [0.25]])
    out = call(3, 0, None if agent == "main" else 1.0, 4, agent=agent)
    more = Group(4, "task", 0, [*kept.rollouts, rollout(3, 1.0, 4, status)], [*kept.calls, out])
    expected, got = weighted([kept], agent), weighted([more], agent)
    assert got.calls == expected.calls
    assert by_position(got) == by_position(expected)
    assert shares(got).tolist() == shares(expected).tolist()


def test_a_query_without_any_score_is_no_query():
    lost = replace(main_group(9, [1, 1]), rollouts=[rollout(n, 0, 9, "failed") for n in range(2)])
    alone, both = weighted([main_group(0, [1, 0])], "main"), weighted([lost, main_group(0, [1, 0])], "main")
    assert shares(both).tolist() == shares(alone).tolist() == [0.5, 0.5]
    assert both.zero_std.tolist() == [True, False] and both.calls == alone.calls


def test_a_rollout_that_never_called_the_sub_agent_keeps_its_place_in_the_mean_alone():
    """d_k = 0: K stays, the group's mean and std do not see it."""
    got = weighted([sub_group(0, [[1], [], [0]])], aligned_calls=2)
    assert shares(got) == pytest.approx([1 / 6, 1 / 6])  # K * D = 3 * 2
    assert got.adv == pytest.approx([1, -1]) and got.multiplicities.tolist() == [2, 2]


def test_a_query_whose_sub_agent_was_never_called_counts_in_the_mean_over_queries():
    got = weighted([sub_group(0, [[1], [0]]), sub_group(1, [[], []])], aligned_calls=3)
    assert shares(got) == pytest.approx([1 / 12] * 2)
    assert got.zero_std.tolist() == [False, True]


def test_no_group_and_no_call_give_nothing():
    for groups, flags in ([], []), ([sub_group(0, [[], []])], [True]):
        got = weighted(groups)
        assert got.calls == [] and got.zero_std.tolist() == flags
        assert [len(x) for x in (got.rewards, got.adv, got.multiplicities, got.weight)] == [0] * 4


# ---- copies and weights


def test_the_main_agent_is_never_copied():
    got = weighted([main_group(0, [1, 0, 0]), main_group(1, [1, 1])], "main", aligned_calls=4)
    assert got.multiplicities.tolist() == [1] * 5
    assert shares(got) == pytest.approx([1 / 6] * 3 + [1 / 4] * 2)


@pytest.mark.parametrize("count", range(1, 8))
@pytest.mark.parametrize("seed", range(4))
def test_sampled_alignment_gives_each_rollout_whole_copies_that_sum_to_D(count, seed):
    got = weighted([sub_group(0, [[0.5] * count, [1]])], seed=seed, aligned_calls=4)
    copies, other = got.multiplicities[:-1], got.multiplicities[-1]
    assert copies.sum() == other == 4 and np.all(copies == copies.round())
    assert np.all(copies >= 1) if count <= 4 else np.all(copies <= 1)
    assert got.weight.sum() == pytest.approx(1)


def test_without_alignment_every_call_counts_once_and_a_rollout_as_often_as_it_called():
    got = weighted([sub_group(0, [[1, 0, 1], [], [0.5]])], alignment="none", aligned_calls=2)
    assert got.multiplicities.tolist() == [1, 1, 1, 1]
    assert shares(got).tolist() == [1 / 6] * 4  # of K = 3 rollouts and D = 2, as with it
    rewards = [1.0, 0.5, 1.0, 0.75]
    mean, std = statistics.mean(rewards), statistics.pstdev(rewards)
    assert got.adv == pytest.approx([(reward - mean) / std for reward in rewards])


def test_expected_alignment_is_D_over_d():
    got = weighted([sub_group(0, [[1, 0], [], [1, 1, 0, 0, 0, 1]])], alignment="expected", aligned_calls=3)
    assert got.multiplicities == pytest.approx([1.5] * 2 + [0.5] * 6)
    assert shares(got) == pytest.approx([1 / 9] * 8)


def test_another_seed_and_another_agent_draw_other_copies():
    groups = [sub_group(query, [[1, 0.5, 0]] * 4) for query in range(20)]
    draws = [weighted(groups, seed=s, index=i).multiplicities.tolist() for s, i in ((0, 1), (1, 1), (0, 2), (0, 1))]
    assert draws[0] == draws[3] and draws[0] != draws[1] and draws[0] != draws[2]
    rows = np.array(draws[0]).reshape(-1, 3)
    assert len(np.unique(rows, axis=0)) == 3  # nor do all queries and rollouts draw the same one


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        ("trajectory", [1.5 / 6 / 2, 1.5 / 6 / 4, 3 / 6 / 1]),
        ("token", [1.5 / 12, 1.5 / 12, 3 / 12]),  # 1.5 * 2 + 1.5 * 4 + 3 * 1 action tokens, copies included
        ("constant", [1.5 / 6 / 8, 1.5 / 6 / 8, 3 / 6 / 8]),
    ],
)
def test_the_weight_of_an_action_token_by_each_length_norm(norm, expected):
    """Two rollouts with D = 3: one with calls of 2 and 4 action tokens, one with a call of 1."""
    group = sub_group(0, [[1, 0], [0.5]])
    calls = [replace(call, actions=actions) for call, actions in zip(group.calls, (2, 4, 1), strict=True)]
    settings = {"alignment": "expected", "aligned_calls": 3, "length_norm": norm, "length_constant": 8.0}
    assert weighted([replace(group, calls=calls)], **settings).weight == pytest.approx(expected)


@pytest.mark.parametrize("norm", ["trajectory", "token"])
def test_a_trajectory_without_an_action_has_a_finite_weight(norm):
    group = sub_group(0, [[1]])
    (weight,) = weighted([replace(group, calls=[replace(group.calls[0], actions=0)])], length_norm=norm).weight
    assert np.isfinite(weight)


# ---- advantages


scores = st.sampled_from([0.0, 0.25, 0.5, 1.0])
sub_groups = st.lists(st.lists(st.lists(scores, max_size=7), min_size=1, max_size=4), min_size=1, max_size=4)


def numbered(drawn: list[list[list[float]]]) -> list[Group]:
    return [sub_group(13 * n + 2, experts) for n, experts in enumerate(drawn)]


def baseline_of(kind: str, members: list[tuple[int, float]], call_number: int, reward: float) -> float:
    """Return the baseline of one call; members: (call, reward) of each physical copy."""
    values = [r for _, r in members]
    if kind == "leave_one_out":
        others = [r for c, r in members if c != call_number]
        return statistics.fmean(others) if others else reward
    return statistics.median(values) if kind == "median" else statistics.fmean(values)


@given(
    sub_groups,
    st.sampled_from(["mean", "median", "leave_one_out"]),
    st.sampled_from(["std", "none"]),
    st.integers(0, 9),
)
@settings(max_examples=150)
def test_advantages_are_those_among_the_physical_copies_of_one_query(drawn, baseline, scale, seed):
    groups = numbered(drawn)
    got = weighted(groups, seed=seed, baseline=baseline, scale=scale, aligned_calls=3)
    rows = list(zip(got.calls, got.rewards, got.multiplicities, got.adv, strict=True))
    for group, flag in zip(groups, got.zero_std, strict=True):
        mine = [(n, *row) for n, row in enumerate(rows) if row[0].query == group.query]
        assert [row[1] for row in mine] == group.calls
        members = [(n, reward) for n, _, reward, copies, _ in mine for _ in range(int(copies))]
        std = statistics.pstdev([r for _, r in members]) if members else 0.0
        assert flag == (std < 1e-6)
        for n, record, reward, _, advantage in mine:
            assert reward == pytest.approx(0.5 + 0.5 * record.expert)
            gap = reward - baseline_of(baseline, members, n, reward)
            assert advantage == pytest.approx(0 if flag else gap / (std if scale == "std" else 1), abs=1e-9)


@given(
    sub_groups, st.randoms(use_true_random=False), st.sampled_from(["sampled", "expected", "none"]), st.integers(0, 3)
)
@settings(max_examples=80)
def test_neither_the_order_of_groups_nor_what_else_is_in_the_batch_matters(drawn, random, alignment, seed):
    groups = numbered(drawn)
    shuffled = random.sample(groups, len(groups))
    together, other = (weighted(g, seed=seed, alignment=alignment) for g in (groups, shuffled))
    alone = [by_position(weighted([group], seed=seed, alignment=alignment)) for group in groups]
    assert by_position(together) == by_position(other) == {at: row for rows in alone for at, row in rows.items()}


def test_groups_are_never_mixed():
    """An easy and a hard query: in each the better rollout wins, though the easy one's worst beats all of the other."""
    got = weighted([main_group(0, [1, 0.9]), main_group(1, [0.1, 0])], "main")
    assert got.adv == pytest.approx([1, -1, 1, -1])


def test_alike_rewards_are_flagged_and_give_exactly_zero():
    got = weighted([main_group(0, [0.3] * 7), main_group(1, [0, 0.5])], "main")
    assert got.zero_std.tolist() == [True, False] and not got.adv[:7].any()


def test_std_eps_decides_what_is_alike():
    for eps, flag in (0.3, False), (0.5, True):
        assert weighted([main_group(0, [1, 0])], "main", std_eps=eps).zero_std.tolist() == [flag]  # std 0.45
