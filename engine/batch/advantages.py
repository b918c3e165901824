"""From scores to weighted advantages: rewards, alignment to D, group-relative normalisation (M-GRPO, Eqs. 4-10).

One agent's batch is a list of groups (queries). Within a group the main agent has one trajectory per rollout; a
sub-agent has d_k >= 0, aligned to D by multiplicities instead of copies. Groups are never mixed.

Legend: N trajectories, Q queries, P (query, rollout) pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mgrpo.engine.batch.groups import GroupAdvantages, advantages, align
from mgrpo.engine.batch.planning import each_of
from mgrpo.engine.config.schema import AlgorithmConfig, RewardConfig
from mgrpo.engine.store.groups import CallRecord, Group, RolloutRecord
from mgrpo.engine.system.imports import load_function, takes
from mgrpo.engine.types import MAIN

ADVANTAGE = "algorithm.advantage"


@dataclass(frozen=True)
class Weighted:
    """The trajectories of one agent's scored rollouts, by query and rollout.

    rewards, advantages (N,) float64; multiplicities (N,) float64: aligned copies each one stands for; shares (N,)
    float64: what one copy counts in the mean over queries and their K (main) or K * D (sub) members;
    zero_std (Q,) bool: groups whose rewards are all alike; empty groups count as such.
    """

    calls: list[CallRecord]
    rewards: np.ndarray
    advantages: np.ndarray
    multiplicities: np.ndarray
    shares: np.ndarray
    zero_std: np.ndarray


@dataclass(frozen=True)
class Origin:
    """What an estimator of the user's is told, if it has a parameter `origin`, beyond rewards, groups and weights.

    agent: whose trajectories they are. seconds (N,) float64: how long the rollout of each took, from its begin to its
    end. Queries of a colocated step all begin at once: there this is the order in which rollouts arrived.
    """

    agent: str
    seconds: np.ndarray


def main_reward(rollout: RolloutRecord, reward: RewardConfig) -> float:
    """R_M = a1 * format + a2 * correct if the format is valid, else 0 (Eq. 4)."""
    return reward.main_format + reward.main_correct * rollout.correct if rollout.format else 0.0


def sub_reward(call: CallRecord, rollout: RolloutRecord, reward: RewardConfig) -> float:
    """R_S = b1 * format + b2 * correct_main + b3 * expert if the format is valid, else 0 (Eq. 5)."""
    if not call.format:
        return 0.0
    assert call.expert is not None
    return reward.sub_format + reward.sub_correct * rollout.correct + reward.sub_expert * call.expert


def weigh(
    agent: str, agent_index: int, groups: Sequence[Group], algorithm: AlgorithmConfig, reward: RewardConfig, seed: int
) -> Weighted:
    """Rewards, multiplicities, shares and advantages of one agent's trajectories.

    Unscored and failed rollouts are out of their group: K is the number of scored ones. A rollout without a call of a
    sub-agent (d_k = 0) adds nothing to that sub-agent's group.
    """
    is_main = agent == MAIN
    copies = 1 if is_main else algorithm.aligned_calls
    asked = sum(any(r.status == "scored" for r in group.rollouts) for group in groups)
    calls: list[CallRecord] = []
    rewards: list[float] = []
    seconds: list[float] = []
    shares: list[float] = []
    counts_P: list[int] = []
    keys_P: list[int] = []
    offsets_Q1 = [0]
    for group in groups:
        scored = {r.rollout: r for r in group.rollouts if r.status == "scored"}
        for number, rollout in scored.items():
            made = [call for call in group.calls if call.rollout == number]
            calls += made
            rewards += [main_reward(rollout, reward) if is_main else sub_reward(c, rollout, reward) for c in made]
            seconds += [rollout.seconds] * len(made)
            shares += [1.0 / (asked * len(scored) * copies)] * len(made)
            counts_P.append(len(made))
            keys_P.append(_key(agent_index, group.query, number))
        offsets_Q1.append(len(calls))
    multiplicities = align(counts_P, copies, algorithm.alignment, seed, np.array(keys_P, np.uint64))
    origin = Origin(agent, np.array(seconds))
    estimated = _estimate(np.array(rewards), np.array(offsets_Q1), multiplicities, algorithm, origin)
    return Weighted(calls, np.array(rewards), estimated.values, multiplicities, np.array(shares), estimated.zero_std)


def _estimate(
    rewards_N: np.ndarray,
    offsets_Q1: np.ndarray,
    weights_N: np.ndarray,
    algorithm: AlgorithmConfig,
    origin: Origin,
) -> GroupAdvantages:
    """By the estimator of the config; one of the user's own says the values only."""
    a = algorithm
    ours = advantages(rewards_N, offsets_Q1, weights_N, baseline=a.baseline, scale=a.scale, eps=a.std_eps)
    own = estimator(algorithm)
    if own is None:
        return ours
    more = {"origin": origin} if takes(own, "origin") else {}
    values_N = each_of(ADVANTAGE, own(rewards_N, offsets_Q1, weights_N, **more), len(rewards_N), np.float64)
    if not np.isfinite(values_N).all():
        raise ValueError(f"{ADVANTAGE}: {values_N[~np.isfinite(values_N)][0]} returned: expected finite advantages")
    return ours._replace(values=values_N)


def estimator(algorithm: AlgorithmConfig) -> Callable[..., Any] | None:
    """The user's own, if there is one. Raises ValueError if it cannot be found."""
    return load_function(algorithm.advantage, ADVANTAGE) if algorithm.advantage else None


def _key(agent_index: int, query: int, rollout: int) -> int:
    """What the random alignment of one rollout depends on besides the seed: never its place in a batch."""
    assert 0 <= agent_index < 1 << 8 and 0 <= query < 1 << 36 and 0 <= rollout < 1 << 20
    return agent_index << 56 | query << 20 | rollout
