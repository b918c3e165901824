"""One agent's optimisation step: sealed groups in, new weights out. Agents share nothing but the store."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from mgrpo import _packing
from mgrpo.engine.batch.advantages import Weighted, estimator, weigh
from mgrpo.engine.batch.micro_batches import Weighed, drop, make_arena, merge, pack
from mgrpo.engine.batch.objective import objective, token_weights
from mgrpo.engine.config.schema import Config
from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.policy.schedule import learning_rate
from mgrpo.engine.run.trajectories import read
from mgrpo.engine.store.groups import CallRecord, Group
from mgrpo.engine.system.process import matmul_ceiling
from mgrpo.engine.types import MAIN, Trajectory
from mgrpo.kernels import Objective

Row = dict[str, float]
WARMUP_METRICS = (  # nothing was sampled: there is no ratio and no gap to speak of
    "logprob_mean",
    "entropy_mean",
    "grad_norm",
    "lr",
    "trajectories",
    "tokens_trained",
    "perf/tokens_per_second",
    "perf/mfu",
    "time/forward_backward",
)


class AgentTrainer:
    """Trains one agent on groups: weigh, pack, step. With several ranks each calls it alike and reads its own share."""

    def __init__(self, config: Config, policy: Policy, trajectories: str):
        self.config, self.policy, self.trajectories = config, policy, trajectories
        self.name = policy.name
        self.arena = make_arena(policy.model.device)
        self.index = list(config.agents).index(self.name)
        self.objective = objective(config.algorithm)
        estimator(config.algorithm)  # one that cannot be found is told of now, not when the first groups are sealed

    def train(self, step: int, groups: list[Group]) -> Row:
        """Train on a step's groups; returns the agent's metrics, without its name before them."""
        started = time.monotonic()
        weighted = weigh(self.name, self.index, groups, self.config.algorithm, self.config.reward, self.config.seed)
        row = group_metrics(self.name, groups, weighted)
        version = self.policy.version
        if self.policy.agent.train and weighted.calls:
            row |= self._optimise(step, weighted)
        staleness = [version - call.version for call in weighted.calls]
        row |= {"staleness_mean": _mean(staleness), "staleness_worst": max(staleness, default=0)}
        return row | {"time/train": time.monotonic() - started}

    def learn(self, demonstrations: list[Trajectory]) -> Row:
        """A warm-up step: on-policy with advantage 1, the gradient is that of the mean log-likelihood of an action."""
        actions = sum(int(trajectory.sampled.sum()) for trajectory in demonstrations)
        weighed = [Weighed(trajectory, 1.0, 1.0 / actions) for trajectory in demonstrations]
        lr, max_tokens = self.config.warmup.lr, self.config.compute.max_tokens
        learnt = optimise(self.policy, weighed, Objective(sampler_cap=None), lr, max_tokens, arena=self.arena)
        return {key: learnt[key] for key in learnt if key in WARMUP_METRICS}

    def _optimise(self, step: int, weighted: Weighted) -> Row:
        config = self.config
        actions_N = np.array([call.actions for call in weighted.calls])
        weights_N = token_weights(config.algorithm, weighted.shares, weighted.multiplicities, actions_N)
        weighed = [
            Weighed(*row) for row in zip(weighted.calls, weighted.advantages.tolist(), weights_N.tolist(), strict=True)
        ]
        lr = learning_rate(self.policy.agent, step, config.steps)
        max_tokens, epochs = config.compute.max_tokens, config.algorithm.epochs
        return optimise(
            self.policy, weighed, self.objective, lr, max_tokens, epochs=epochs, read=self._read, arena=self.arena
        )

    def _read(self, calls: list[CallRecord]) -> list[Trajectory]:
        return read(self.trajectories, [call.position for call in calls])


def optimise(
    policy: Policy,
    weighed: list[Weighed],
    objective: Objective,
    lr: float,
    max_tokens: int,
    *,
    epochs: int = 1,
    read: Callable[[list[Any]], list[Trajectory]] = list,
    arena: _packing.Arena | None = None,
) -> Row:
    """`epochs` optimizer steps on weighed trajectories in micro-batches of at most `max_tokens`, and what they cost.

    read: the trajectories that were given as records of them. arena: memory for the micro-batches, used again by the
    next call.
    """
    live = drop(weighed, keep_zero_advantage=objective.needs_every_row)
    own = objective.rule is not None
    unique = merge(live, by_sampler_logprobs=own or objective.sampler_cap is not None, by_advantage=own)
    batches = pack(unique, max_tokens, read=read, ranks=policy.ranks, rank=policy.rank, arena=arena)
    started = time.monotonic()
    row = policy.step(batches, objective, lr, epochs)
    seconds = time.monotonic() - started
    rows = sum(w.trajectory.rows for w in unique) * epochs
    ceiling = policy.ranks * matmul_ceiling(policy.model.device, policy.dtype)
    return row | {
        "trajectories": len(weighed),
        "trajectories_trained": len(unique),
        "micro_batches": len(batches) * policy.ranks,
        "tokens_trained": rows,
        "perf/tokens_per_second": rows / seconds,
        "perf/mfu": 6 * rows * policy.parameters / seconds / ceiling,
        "time/forward_backward": seconds,
        "time/weight_sync": policy.sync_seconds,
    }


def group_metrics(agent: str, groups: list[Group], weighted: Weighted) -> Row:
    """What the sampled episodes say of one agent, before any training."""
    calls, rewards = weighted.calls, weighted.rewards
    lengths = [call.tokens for call in calls]
    row = {
        "reward_mean": _mean(rewards),
        "reward_std": float(np.std(rewards)) if len(rewards) else 0.0,
        "format": _mean([call.format for call in calls]),
        "zero_std": _mean(weighted.zero_std),
        "length_mean": _mean(lengths),
        "length_min": min(lengths, default=0),
        "length_max": max(lengths, default=0),
        "actions_mean": _mean([call.actions for call in calls]),
        "turns_mean": _mean([call.turns for call in calls]),
        "truncated": _mean([call.truncated for call in calls]),
    }
    scored = [rollout for group in groups for rollout in group.rollouts if rollout.status == "scored"]
    if agent == MAIN:
        return row | {"correct": _mean([rollout.correct for rollout in scored])}
    made = len(calls) / len(scored) if scored else 0.0
    return row | {"expert": _mean([call.expert for call in calls]), "calls_mean": made}


def _mean(values: object) -> float:
    array = np.asarray(values, np.float64)
    return float(array.mean()) if array.size else 0.0
