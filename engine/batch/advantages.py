"""Turn scored rollouts into credit: reward, multiplicity, advantage and loss weight (M-GRPO, Eqs. 4-10).

One agent's batch is a list of groups, one per query. In a group the main agent has one trajectory per rollout, and a
sub-agent has d_k >= 0 of them in rollout k. Groups are never mixed. M-GRPO (arXiv 2511.13288) copies trajectories, or
leaves some out, until each rollout has D of them. Here each trajectory is kept once, with a multiplicity: the number of
copies that it stands for.

Every denominator, multiplicity and length normalisation goes into one loss weight per trajectory. The loss is then a
plain weighted sum, which does not depend on how trajectories are split into micro-batches and ranks.

`align` and `advantages` take and return plain arrays, for any trainer; `weigh` applies them to the store's groups.

Legend: N trajectories, G groups, P (query, rollout) pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from mgrpo import _packing
from mgrpo.engine.batch.ragged import integers, one_each
from mgrpo.engine.config.schema import AlgorithmConfig, RewardConfig
from mgrpo.engine.system.imports import load_function, takes
from mgrpo.engine.types import MAIN
from mgrpo.kernels import Objective, group_advantages

if TYPE_CHECKING:  # `align` and `advantages` must not import the database
    from mgrpo.engine.store import CallRecord, Group, RolloutRecord

ADVANTAGE, OBJECTIVE = "algorithm.advantage", "algorithm.objective"
Floats = NDArray[np.float64]


class Summary(Protocol):
    """Describe what a plan needs of a trajectory before its tokens are read; the store's record has it too.

    rows: how many of its tokens are computed. digest, sampler_digest: equal for trajectories with the same tokens and
    flags, and for those that also have the same sampler's log-probs.
    """

    @property
    def rows(self) -> int: ...
    @property
    def digest(self) -> str: ...
    @property
    def sampler_digest(self) -> str: ...


Call = TypeVar("Call", bound=Summary)


@dataclass(frozen=True)
class Credit(Generic[Call]):
    """Hold what each of N trajectories of one agent counts in a training step.

    calls: the trajectories, or the store's records of them, in the order of the arrays. Then, by level:
    * trajectory, (N,) float64: rewards; adv, the advantage within the group; multiplicities, the number of copies that
      the trajectory stands for, >= 0; weight, the loss weight of each of its action tokens, denominators included.
    * group, (G,) bool: zero_std, whether all rewards of the group are equal, as they are in an empty group.
    """

    calls: Sequence[Call]
    rewards: Floats
    adv: Floats
    multiplicities: Floats
    weight: Floats
    zero_std: NDArray[np.bool_]

    @classmethod
    def uniform(cls, calls: Sequence[Call], weight: float) -> Credit[Call]:
        """Return the credit of trajectories outside any group: advantage 1 and the same weight for all."""
        ones_N = np.ones(len(calls))
        return cls(calls, ones_N, ones_N, ones_N, ones_N * weight, np.zeros(0, np.bool_))


@dataclass(frozen=True)
class Origin:
    """Hold what a user's estimator gets in its parameter `origin`, if it has one.

    agent: the agent whose trajectories they are. seconds (N,) float64: the duration of the rollout of each trajectory.
    The queries of a colocated step all begin at once, so there it gives the order in which rollouts arrived.
    """

    agent: str
    seconds: Floats


class GroupAdvantages(NamedTuple):
    """Hold values (N,) float64, and for each group the mean and population std (G,) float64 and zero_std (G,) bool.

    zero_std: whether all rewards of the group are equal.
    """

    values: Floats
    mean: Floats
    std: Floats
    zero_std: NDArray[np.bool_]


# ---- from groups to credit


def main_reward(rollout: RolloutRecord, reward: RewardConfig) -> float:
    """Return R_M = a1 * format + a2 * correct if the format is valid, else 0 (Eq. 4)."""
    return reward.main_format + reward.main_correct * rollout.correct if rollout.format else 0.0


def sub_reward(call: CallRecord, rollout: RolloutRecord, reward: RewardConfig) -> float:
    """Return R_S = b1 * format + b2 * correct_main + b3 * expert if the format is valid, else 0 (Eq. 5)."""
    if not call.format:
        return 0.0
    assert call.expert is not None
    return reward.sub_format + reward.sub_correct * rollout.correct + reward.sub_expert * call.expert


def weigh(
    agent: str, agent_index: int, groups: Sequence[Group], algorithm: AlgorithmConfig, reward: RewardConfig, seed: int
) -> Credit[CallRecord]:
    """Return the credit of one agent's trajectories, group by group and rollout by rollout.

    Unscored and failed rollouts are left out of their group: K is the number of scored ones. A rollout without a call
    of a sub-agent (d_k = 0) adds nothing to that sub-agent's group.
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
    offsets_G1 = [0]
    for group in groups:
        scored = [r for r in group.rollouts if r.status == "scored"]
        for rollout in scored:
            made = [call for call in group.calls if call.rollout == rollout.rollout]
            calls += made
            rewards += [main_reward(rollout, reward) if is_main else sub_reward(c, rollout, reward) for c in made]
            seconds += [rollout.seconds] * len(made)
            shares += [1.0 / (asked * len(scored) * copies)] * len(made)
            counts_P.append(len(made))
            keys_P.append(_key(agent_index, group.query, rollout.rollout))
        offsets_G1.append(len(calls))
    multiplicities = align(counts_P, copies, algorithm.alignment, seed, np.array(keys_P, np.uint64))
    rewards_N, actions_N = np.array(rewards), np.array([call.actions for call in calls])
    origin = Origin(agent, np.array(seconds))
    found = _estimate(rewards_N, np.array(offsets_G1), multiplicities, algorithm, origin)
    weight_N = _loss_weights(algorithm, np.array(shares), multiplicities, actions_N)
    return Credit(calls, rewards_N, found.values, multiplicities, weight_N, found.zero_std)


def _key(agent_index: int, query: int, rollout: int) -> int:
    """Return the key of one rollout's random alignment, which must not depend on its place in a batch."""
    assert 0 <= agent_index < 1 << 8 and 0 <= query < 1 << 36 and 0 <= rollout < 1 << 20
    return agent_index << 56 | query << 20 | rollout


def _estimate(
    rewards_N: Floats, offsets_G1: NDArray[np.int64], weights_N: Floats, algorithm: AlgorithmConfig, origin: Origin
) -> GroupAdvantages:
    """Return the advantages by the config's estimator. A user's estimator gets copies, and replaces only the values."""
    a = algorithm
    ours = advantages(rewards_N, offsets_G1, weights_N, baseline=a.baseline, scale=a.scale, eps=a.std_eps)
    custom = estimator(algorithm)
    if custom is None:
        return ours
    more = {"origin": origin} if takes(custom, "origin") else {}
    values = custom(rewards_N.copy(), offsets_G1.copy(), weights_N.copy(), **more)
    values_N = one_each(ADVANTAGE, values, len(rewards_N), np.float64)
    if not np.isfinite(values_N).all():
        raise ValueError(f"{ADVANTAGE}: {values_N[~np.isfinite(values_N)][0]} returned: expected finite advantages")
    return ours._replace(values=values_N)


def _loss_weights(algorithm: AlgorithmConfig, shares_N: Floats, multiplicities_N: Floats, actions_N: Any) -> Floats:
    """Return the loss weight of each action token of each trajectory, by `length_norm`.

    shares_N: what one copy counts in the mean over queries and their K (main) or K * D (sub) members.
    trajectory: the mean over a trajectory's action tokens, then over trajectories by their shares; token: all action
    tokens of the batch count alike, copies included; constant: a trajectory's sum is divided by length_constant.
    """
    if algorithm.length_norm == "token":
        total = (multiplicities_N * actions_N).sum()
        return multiplicities_N / max(total, 1.0)
    length_N = np.maximum(actions_N, 1) if algorithm.length_norm == "trajectory" else algorithm.length_constant
    return shares_N * multiplicities_N / length_N


# ---- functions that the config names


def estimator(algorithm: AlgorithmConfig) -> Callable[..., Any] | None:
    """Return the advantage estimator that the config names, or None. Raises ValueError if it cannot be found."""
    return load_function(algorithm.advantage, ADVANTAGE) if algorithm.advantage else None


def objective(algorithm: AlgorithmConfig) -> Objective:
    """Return the objective of the rl stage. Raises ValueError if a function of the user's own cannot be found."""
    return Objective(
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        dual_clip=algorithm.dual_clip,
        importance=algorithm.importance,
        kl_coef=algorithm.kl_coef,
        kl=algorithm.kl,
        entropy_coef=algorithm.entropy_coef,
        sampler_cap=algorithm.sampler_cap,
        rule=load_function(algorithm.objective, OBJECTIVE) if algorithm.objective else None,
    )


# ---- plain arrays in and out


def align(
    counts: Any,
    target: int,
    mode: Literal["sampled", "expected", "none"] = "sampled",
    seed: int = 0,
    keys: Any = None,
) -> NDArray[np.float64]:
    """Return how often each trajectory counts, so that those of one rollout count `target` times together (Eqs. 8-9).

    counts (P,) integers: the number of trajectories that an agent has in each rollout, which may be 0. target: D >= 1.
    Returns (N,) float64 >= 0, N being the sum of counts, rollout by rollout; the sum over a rollout is D, or 0 where it
    has no trajectory. mode "sampled": each counts once and the rest is drawn with replacement, or D of them are drawn
    without; "expected": each counts D / count, which is the same without the noise; "none": each counts once, so that
    the sum is the count and nothing is aligned. keys (P,) integers: what the draw of each rollout depends on besides
    the seed; None: its place. Raises ValueError, naming the argument.
    """
    counts_P = integers("counts", counts)
    keys_P = np.arange(len(counts_P)) if keys is None else one_each("keys", keys, len(counts_P))
    drawn = "expected" if mode == "none" else mode
    copies_N = _packing.align(counts_P, target, drawn, seed, keys_P.astype(np.uint64))
    return np.ones_like(copies_N) if mode == "none" else copies_N


def advantages(
    rewards: Any,
    offsets: Any,
    weights: Any = None,
    *,
    baseline: Literal["mean", "leave_one_out", "median"] = "mean",
    scale: Literal["std", "none"] = "std",
    eps: float = 1e-6,
) -> GroupAdvantages:
    """Return (reward - baseline) / scale of each trajectory within its group (Eqs. 6-7), in float64.

    rewards (N,). offsets (G + 1,) integers: the bounds of the groups, from 0 to N. weights (N,) >= 0: multiplicities;
    None: 1 each. A group with a std below eps has values of 0. `mgrpo.kernels.group_advantages` has the details, and
    takes tensors. Raises ValueError, naming the argument.
    """
    rewards_N = np.asarray(rewards, np.float64)
    weights_N = None if weights is None else one_each("weights", weights, len(rewards_N), np.float64)
    found = group_advantages(
        torch.from_numpy(rewards_N),
        torch.from_numpy(integers("offsets", offsets)),
        None if weights_N is None else torch.from_numpy(weights_N),
        baseline=baseline,
        scale=scale,
        eps=eps,
    )
    return GroupAdvantages(*(x.numpy() for x in (found.values_R, found.mean_G, found.std_G, found.zero_std_G)))
