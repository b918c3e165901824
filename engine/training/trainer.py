"""Take one agent's optimisation step: sealed groups in, new weights out. Agents share only the store."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from mgrpo import _packing
from mgrpo.engine.batch.advantages import Call, Credit, estimator, objective, weigh
from mgrpo.engine.batch.micro_batches import make_arena, pack_calls
from mgrpo.engine.batch.select import compact
from mgrpo.engine.config.schema import Config
from mgrpo.engine.model.routers import routers_of
from mgrpo.engine.policy.optimizer import learning_rate
from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.run.metrics import Row
from mgrpo.engine.run.trajectories import read
from mgrpo.engine.store import CallRecord, Group
from mgrpo.engine.system import distributed
from mgrpo.engine.system.device import matmul_ceiling
from mgrpo.engine.system.retry import Retry
from mgrpo.engine.types import MAIN, Trajectory
from mgrpo.kernels import Objective

DAMAGE = (ValueError, FileNotFoundError)  # what `read` raises for trajectories that are damaged or lost
WARMUP_METRICS = (  # in the warm-up nothing is sampled, so ratios and gaps to a sampler mean nothing
    "logprob_mean",
    "entropy_mean",
    "router_aux",
    "grad_norm",
    "lr",
    "trajectories",
    "tokens_trained",
    "perf/tokens_per_second",
    "perf/mfu",
    "time/forward_backward",
)

log = logging.getLogger(__name__)
waiting = Retry(final=(FileNotFoundError,))  # for an object store that is out of reach


class DamagedGroupsError(ValueError):
    """Report groups that cannot be trained on, as trajectories of theirs are lost or damaged; queries says which."""

    def __init__(self, agent: str, queries: list[int]):
        super().__init__(f"agent {agent}: trajectories of queries {queries} are lost or damaged")
        self.queries = queries


class AgentTrainer:
    """Train one agent on groups: weigh, pack, step. All ranks call it with the same groups; each reads its own share.

    trajectories: folder or URL of the run's trajectory files.
    """

    def __init__(self, config: Config, policy: Policy, trajectories: str):
        self.config, self.policy, self.trajectories = config, policy, trajectories
        self.name = policy.name
        self.arena = make_arena(policy.model.device)
        self.index = list(config.agents).index(self.name)
        self.objective = objective(config.algorithm)
        if policy.agent.train and (coef := config.algorithm.router_aux_coef):
            routers_of(policy.model, f"config: algorithm.router_aux_coef: {coef}")
        estimator(config.algorithm)  # raises now if it cannot be found, not when the first groups are sealed

    def train(self, step: int, groups: list[Group]) -> Row:
        """Train on a step's groups and return the agent's metrics, whose keys do not have its name in front.

        Raises DamagedGroupsError on all ranks, with nothing changed, if any rank cannot read a trajectory as it was
        written.
        """
        started = time.monotonic()
        credit = weigh(self.name, self.index, groups, self.config.algorithm, self.config.reward, self.config.seed)
        row = group_metrics(self.name, groups, credit)
        version = self.policy.version
        if self.policy.agent.train and credit.calls:
            row |= self._optimise(step, credit)
        staleness = [version - call.version for call in credit.calls]
        row |= {"staleness_mean": _mean(staleness), "staleness_worst": max(staleness, default=0)}
        return row | {"time/train": time.monotonic() - started}

    def learn(self, demonstrations: list[Trajectory]) -> Row:
        """Take a warm-up step and return its metrics.

        It is a policy step with advantage 1 and ratio 1, so its gradient is that of the mean log-likelihood of actions.
        """
        actions = sum(int(trajectory.sampled.sum()) for trajectory in demonstrations)
        credit = Credit.uniform(demonstrations, 1.0 / actions)
        lr, max_tokens = self.config.warmup.lr, self.config.compute.max_tokens
        coef = self.config.algorithm.router_aux_coef
        learnt = optimise(
            self.policy, credit, Objective(sampler_cap=None), lr, max_tokens, arena=self.arena, router_aux_coef=coef
        )
        return {key: learnt[key] for key in learnt if key in WARMUP_METRICS}

    def _optimise(self, step: int, credit: Credit[CallRecord]) -> Row:
        config = self.config
        lr = learning_rate(self.policy.agent, step, config.steps)
        return optimise(
            self.policy,
            credit,
            self.objective,
            lr,
            config.compute.max_tokens,
            epochs=config.algorithm.epochs,
            read=self._read,
            arena=self.arena,
            router_aux_coef=config.algorithm.router_aux_coef,
        )

    def _read(self, calls: list[CallRecord]) -> list[Trajectory]:
        """Read the trajectories of this rank's calls, and hear from the other ranks whether they could read theirs."""
        found, damaged = [], list[int]()
        try:
            found = self._read_intact(calls)
        except DAMAGE:
            damaged = self._damaged(calls)
        known = distributed.gather(damaged, list[int], self.policy.group)
        if queries := sorted({query for those in known for query in those}):
            raise DamagedGroupsError(self.name, queries)
        return found

    def _read_intact(self, calls: list[CallRecord]) -> list[Trajectory]:
        """Read the trajectories of some calls. Raises ValueError or FileNotFoundError if one is damaged or lost."""
        digests = [call.sampler_digest for call in calls]
        return waiting(read, self.trajectories, [call.position for call in calls], digests)

    def _damaged(self, calls: list[CallRecord]) -> list[int]:
        """Return the queries with calls that cannot be read."""
        by_query: dict[int, list[CallRecord]] = {}
        for call in calls:
            by_query.setdefault(call.query, []).append(call)
        damaged = []
        for query, made in by_query.items():
            try:
                self._read_intact(made)
            except DAMAGE as error:
                log.warning("agent %s: query %d is left out, a trajectory cannot be read: %s", self.name, query, error)
                damaged.append(query)
        return damaged


def optimise(
    policy: Policy,
    credit: Credit[Call],
    objective: Objective,
    lr: float,
    max_tokens: int,
    *,
    epochs: int = 1,
    read: Callable[[list[Call]], Any] = list,
    arena: _packing.Arena | None = None,
    router_aux_coef: float = 0.0,
) -> Row:
    """Take `epochs` optimizer steps in micro-batches of at most `max_tokens` rows; return metrics and what they cost.

    read: returns the trajectories of some of credit's records. arena: memory for the micro-batches, which the next call
    uses again.
    """
    calls, adv_M, weight_M = compact(credit, objective)
    batches = pack_calls(
        calls, adv_M, weight_M, max_tokens, read=read, ranks=policy.ranks, rank=policy.rank, arena=arena
    )
    started = time.monotonic()
    row = policy.step(batches, objective, lr, epochs, router_aux_coef=router_aux_coef)
    seconds = time.monotonic() - started
    rows = sum(call.rows for call in calls) * epochs
    ceiling = policy.ranks * matmul_ceiling(policy.model.device, policy.dtype)
    return row | {
        "trajectories": len(credit.calls),
        "trajectories_trained": len(calls),
        "micro_batches": len(batches) * policy.ranks,
        "tokens_trained": rows,
        "perf/tokens_per_second": rows / seconds,
        "perf/mfu": 6 * rows * policy.parameters / seconds / ceiling,
        "time/forward_backward": seconds,
        "time/weight_sync": policy.sync_seconds,
    }


def group_metrics(agent: str, groups: list[Group], credit: Credit[CallRecord]) -> Row:
    """Return the metrics of one agent's sampled episodes, before any training."""
    calls, rewards = credit.calls, credit.rewards
    lengths = [call.tokens for call in calls]
    row = {
        "reward_mean": _mean(rewards),
        "reward_std": float(np.std(rewards)) if len(rewards) else 0.0,
        "format": _mean([call.format for call in calls]),
        "zero_std": _mean(credit.zero_std),
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
