"""One agent's optimisation step: sealed groups in, new weights out. Agents share nothing but the store."""

from __future__ import annotations

import time

import numpy as np

from mgrpo.engine.advantage import Weighted, weigh
from mgrpo.engine.batch import Weighed, drop, merge, pack
from mgrpo.engine.config import Config
from mgrpo.engine.objective import objective, token_weights
from mgrpo.engine.policy import Policy, learning_rate
from mgrpo.engine.process import matmul_ceiling
from mgrpo.engine.store import Group, Store
from mgrpo.engine.trajectories import read
from mgrpo.engine.types import MAIN, Trajectory
from mgrpo.kernels import Objective

Row = dict[str, float]


class AgentTrainer:
    """Trains one agent from the store: claim, weigh, pack, step. `ack` follows when the step is in a checkpoint."""

    def __init__(self, config: Config, policy: Policy, store: Store, trajectories: str):
        self.config, self.policy, self.store, self.trajectories = config, policy, store, trajectories
        self.name = policy.name
        self.index = list(config.agents).index(self.name)
        self.objective = objective(config.algorithm)
        self.unacked: list[int] = []

    def step(self, step: int) -> Row:
        """Train on the step's groups; returns the agent's metrics, without its name before them."""
        started = time.monotonic()
        groups = self.store.claim(self.name, self.config.queries_per_step, holder=self.name).groups
        self.unacked += [group.query for group in groups]
        weighted = weigh(self.name, self.index, groups, self.config.algorithm, self.config.reward, self.config.seed)
        trajectories = read(self.trajectories, [call.position for call in weighted.calls])
        row = group_metrics(self.name, groups, weighted)
        version = self.policy.version
        if self.policy.agent.train and weighted.calls:
            row |= self._optimise(step, weighted, trajectories)
        staleness = [version - call.version for call in weighted.calls]
        row |= {"staleness_mean": _mean(staleness), "staleness_worst": max(staleness, default=0)}
        return row | {"time/train": time.monotonic() - started}

    def ack(self) -> None:
        """What was claimed since the last call is in a checkpoint now."""
        self.store.ack(self.name, self.unacked)
        self.unacked = []

    def _optimise(self, step: int, weighted: Weighted, trajectories: list[Trajectory]) -> Row:
        config = self.config
        actions_N = np.array([call.actions for call in weighted.calls])
        weights_N = token_weights(config.algorithm, weighted.shares, weighted.multiplicities, actions_N)
        weighed = [
            Weighed(*row) for row in zip(trajectories, weighted.advantages.tolist(), weights_N.tolist(), strict=True)
        ]
        lr = learning_rate(self.policy.agent, step, config.steps)
        return optimise(
            self.policy, weighed, self.objective, lr, config.compute.max_tokens, epochs=config.algorithm.epochs
        )


def optimise(
    policy: Policy, weighed: list[Weighed], objective: Objective, lr: float, max_tokens: int, *, epochs: int = 1
) -> Row:
    """`epochs` optimizer steps on weighed trajectories in micro-batches of at most `max_tokens`, and what they cost."""
    everything = objective.kl_coef != 0 or objective.entropy_coef != 0
    live = drop(weighed, keep_zero_advantage=everything)
    unique = merge(live, by_sampler_logprobs=objective.sampler_cap is not None)
    batches = pack(unique, max_tokens)
    started = time.monotonic()
    row = policy.step(batches, objective, lr, epochs)
    seconds = time.monotonic() - started
    rows = sum(map(len, batches)) * epochs
    return row | {
        "trajectories": len(weighed),
        "trajectories_trained": len(unique),
        "micro_batches": len(batches),
        "tokens_trained": rows,
        "perf/tokens_per_second": rows / seconds,
        "perf/mfu": 6 * rows * policy.parameters / seconds / matmul_ceiling(policy.model.device, policy.model.dtype),
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
