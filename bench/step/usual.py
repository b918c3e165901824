"""One optimisation step the usual way, and on the way from there to the engine's: one elimination after the other.

The usual way is what public trainers of groups do, each some of it: rollouts copied until every one has D calls, Python
lists padded to the longest of the step (TRL too), micro-batches of equally many sequences, the log-probs of all of them
once more before the update (verl; TRL only where it must), logits for every token. Written plainly and without anything
of the engine but the model, its fp32 master weights and the optimizer, the same for all, and the random choice of the
copies, which has to be. From "no padding" on attention is the engine's; the last way is its own step.

Legend: B sequences, L tokens of the longest, P tokens of a packed row, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from mgrpo.bench.step.case import LR, Case
from mgrpo.engine.batch.advantages import Weighted, main_reward, sub_reward, weigh
from mgrpo.engine.batch.micro_batches import Batch, Weighed, drop, merge
from mgrpo.engine.batch.objective import objective, token_weights
from mgrpo.engine.model.causal_lm import Packed
from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.run.trajectories import read
from mgrpo.engine.store.groups import CallRecord
from mgrpo.engine.training.trainer import AgentTrainer
from mgrpo.engine.types import MAIN, Trajectory

PAD = 0


@dataclass(frozen=True)
class Way:
    """What a step does needlessly, and what it does not. All as given: the usual way."""

    copies: bool = True  # of a trajectory that the alignment repeats
    merged: bool = False  # identical trajectories are one
    dropped: bool = False  # trajectories without advantage are left out
    old_pass: bool = True  # a forward for log-probs that are the current ones
    packed: bool = False  # no padding
    compact: bool = False  # the head on the agent's own tokens only
    fused: bool = False  # no logits are kept
    engine: bool = False  # no lists: planned and filled in C++


def _ladder(**steps: str) -> dict[str, Way]:
    ways, way = {}, Way()
    for flag, name in steps.items():
        way = replace(way, **{flag: not getattr(way, flag)})
        ways[name] = way
    return ways


USUAL, OURS = "the usual way", "no lists: the engine"
WAYS: dict[str, Way] = {USUAL: Way()} | _ladder(
    copies="no copies for the alignment",
    merged="identical trajectories once",
    dropped="none without advantage",
    old_pass="no second forward",
    packed="no padding",
    compact="the head on the agent's tokens only",
    fused="no logits kept",
    engine=OURS,
)


def step(way: Way, case: Case, policy: Policy, trainer: AgentTrainer) -> None:
    """From sealed groups to new weights."""
    if way.engine:
        trainer.train(0, case.groups)
        return
    samples = samples_of(way, case)
    update = _packed_update if way.packed else _padded_update
    update(way, case, policy, samples)
    policy.optim_step(LR)


# ---- which trajectories


def samples_of(way: Way, case: Case) -> list[Weighed]:
    """Trajectories with their advantage and the loss weight of each of their action tokens."""
    algorithm, reward = case.config.algorithm, case.config.reward
    weighted = weigh(case.agent, case.index, case.groups, algorithm, reward, case.config.seed)
    samples = _copied(case, weighted) if way.copies else _weighed(case, weighted)
    if way.merged:
        samples = merge(samples, by_sampler_logprobs=False)
    return drop(samples, keep_zero_advantage=False) if way.dropped else samples


def _copied(case: Case, weighted: Weighted) -> list[Weighed]:
    """Every trajectory as often as it was drawn; group by group, the advantages of all these copies."""
    config, samples = case.config, list[Weighed]()
    times = {call.position: int(m) for call, m in zip(weighted.calls, weighted.multiplicities, strict=True)}
    aligned = 1 if case.agent == MAIN else config.algorithm.aligned_calls
    asked = sum(any(r.status == "scored" for r in group.rollouts) for group in case.groups)
    for group in case.groups:
        scored = {r.rollout: r for r in group.rollouts if r.status == "scored"}
        calls = [call for call in group.calls if call.rollout in scored for _ in range(times[call.position])]
        if case.agent == MAIN:
            rewards = [main_reward(scored[call.rollout], config.reward) for call in calls]
        else:
            rewards = [sub_reward(call, scored[call.rollout], config.reward) for call in calls]
        if calls:
            samples += _normalised(case, calls, rewards, 1 / (asked * len(scored) * aligned))
    return samples


def _normalised(case: Case, calls: list[CallRecord], rewards: list[float], share: float) -> list[Weighed]:
    mean, std = np.mean(rewards), np.std(rewards)
    trajectories = read(case.trajectories, [call.position for call in calls])
    samples = []
    for trajectory, reward in zip(trajectories, rewards, strict=True):
        actions = max(1, sum(trajectory.sampled.tolist()))
        advantage = (reward - mean) / std if std > case.config.algorithm.std_eps else 0.0
        norm = {"trajectory": actions, "constant": case.config.algorithm.length_constant}
        samples.append(Weighed(trajectory, float(advantage), share / norm[case.config.algorithm.length_norm]))
    return samples


def _weighed(case: Case, weighted: Weighted) -> list[Weighed]:
    """Every trajectory once; the alignment is in its weight."""
    actions_N = np.array([call.actions for call in weighted.calls])
    weights_N = token_weights(case.config.algorithm, weighted.shares, weighted.multiplicities, actions_N)
    trajectories = read(case.trajectories, [call.position for call in weighted.calls])
    rows = zip(trajectories, weighted.advantages.tolist(), weights_N.tolist(), strict=True)
    return [Weighed(*row) for row in rows if row[2]]


# ---- padded


@dataclass(frozen=True)
class Padded:
    """One micro-batch. attended_BL: no padding; counts_BL: the agent's own tokens."""

    ids_BL: Tensor
    attended_BL: Tensor
    counts_BL: Tensor
    advantages_B1: Tensor
    weights_B1: Tensor


def pad(samples: Sequence[Weighed], max_tokens: int, dtype: torch.dtype, device: torch.device) -> list[Padded]:
    """Micro-batches of as many sequences as fit, were all as long as the step's longest."""
    longest = max((len(_tokens(sample)) for sample in samples), default=1)
    size = max(1, max_tokens // longest)
    return [_collate(samples[first : first + size], longest, dtype, device) for first in range(0, len(samples), size)]


def _collate(samples: Sequence[Weighed], longest: int, dtype: torch.dtype, device: torch.device) -> Padded:
    ids, attended, counts = [], [], []
    for sample in samples:
        tokens, gap = _tokens(sample), longest - len(_tokens(sample))
        ids.append(tokens + [PAD] * gap)
        attended.append([1] * len(tokens) + [0] * gap)
        counts.append([int(flag) for flag in _trajectory(sample).sampled] + [0] * gap)
    return Padded(
        torch.tensor(ids, device=device),
        torch.tensor(attended, device=device),
        torch.tensor(counts, device=device),
        torch.tensor([[sample.advantage] for sample in samples], dtype=dtype, device=device),
        torch.tensor([[sample.weight] for sample in samples], dtype=dtype, device=device),
    )


def _padded_update(way: Way, case: Case, policy: Policy, samples: Sequence[Weighed]) -> None:
    with _own_attention(policy.model):
        batches = pad(samples, case.config.compute.max_tokens, _wide(policy), policy.model.device)
        with torch.no_grad():
            old = [_padded_logprobs(policy, batch) if way.old_pass else None for batch in batches]
        for batch, old_BL in zip(batches, old, strict=True):
            logprobs_BL = _padded_logprobs(policy, batch)
            gain_BL = clipped(case, logprobs_BL, old_BL, batch.advantages_B1)
            (-(gain_BL * batch.counts_BL[:, 1:]).sum(1, keepdim=True) * batch.weights_B1).sum().backward()


def _padded_logprobs(policy: Policy, batch: Padded) -> Tensor:
    """(B, L-1): of each token but the first."""
    out = policy.model(input_ids=batch.ids_BL, attention_mask=batch.attended_BL, use_cache=False)
    return plain_logprobs(out.logits[:, :-1], batch.ids_BL[:, 1:], policy)


@contextmanager
def _own_attention(model: PreTrainedModel) -> Iterator[None]:
    """As transformers runs the model, with a mask."""
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation("mgrpo")


# ---- packed


def pack_lists(samples: Sequence[Weighed], max_tokens: int, dtype: torch.dtype, device: torch.device) -> list[Batch]:
    """Sequences end to end, in the order given; a new micro-batch when the next one does not fit."""
    parts: list[list[Weighed]] = [[]]
    for sample in samples:
        if sum(len(_tokens(s)) - 1 for s in [*parts[-1], sample]) > max_tokens and parts[-1]:
            parts.append([])
        parts[-1].append(sample)
    return [_concatenate(part, dtype, device) for part in parts if part]


def _concatenate(samples: Sequence[Weighed], dtype: torch.dtype, device: torch.device) -> Batch:
    ids, places, targets, advantages, weights, logprobs, bounds = [], [], [], [], [], [], [0]
    for sample in samples:
        tokens, trajectory = _tokens(sample), _trajectory(sample)
        rows = len(tokens) - 1
        ids += tokens[:-1]
        targets += tokens[1:]
        places += list(range(rows))
        advantages += [sample.advantage] * rows
        weights += [sample.weight if flag else 0.0 for flag in trajectory.sampled[1:].tolist()]
        logprobs += trajectory.logprobs[1:].tolist()
        bounds.append(bounds[-1] + rows)
    return Batch(
        input_ids_P=torch.tensor(ids, device=device),
        positions_P=torch.tensor(places, device=device),
        targets_P=torch.tensor(targets, device=device),
        cu_seqlens_B1=torch.tensor(bounds, dtype=torch.int32, device=device),
        max_seqlen=int(np.diff(bounds).max()),
        advantages_P=torch.tensor(advantages, dtype=dtype, device=device),
        weights_P=torch.tensor(weights, dtype=dtype, device=device),
        sampler_logprobs_P=torch.tensor(logprobs, dtype=dtype, device=device),
    )


def _packed_update(way: Way, case: Case, policy: Policy, samples: Sequence[Weighed]) -> None:
    for batch in pack_lists(samples, case.config.compute.max_tokens, _wide(policy), policy.model.device):
        if way.fused:
            policy.forward_backward([batch], objective(case.config.algorithm))
        else:
            _packed_loss(way, case, policy, batch).backward()


def _packed_loss(way: Way, case: Case, policy: Policy, batch: Batch) -> Tensor:
    kept_P = batch.weights_P != 0 if way.compact else torch.ones_like(batch.weights_P, dtype=torch.bool)

    def work(hidden_PH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
        return plain_logprobs(F.linear(hidden_PH[kept_P], weight_VH, bias_V), batch.targets_P[kept_P], policy)

    layout = Packed(batch.cu_seqlens_B1, batch.max_seqlen)
    logprobs_L = policy.actor(batch.input_ids_P, batch.positions_P, layout, work)
    gain_L = clipped(case, logprobs_L, None, batch.advantages_P[kept_P])
    return -(gain_L * batch.weights_P[kept_P]).sum()


# ---- the loss


def plain_logprobs(logits_XV: Tensor, targets_X: Tensor, policy: Policy) -> Tensor:
    """log p of the targets, in at least float32."""
    logits_XV = logits_XV.to(_wide(policy))
    if policy.agent.temperature != 1:
        logits_XV = logits_XV / policy.agent.temperature
    return logits_XV.log_softmax(-1).gather(-1, targets_X[..., None])[..., 0]


def clipped(case: Case, logprobs: Tensor, old: Tensor | None, advantages: Tensor) -> Tensor:
    """min(rho A, clip(rho) A) of each token. old None: they are the current ones."""
    ratio = (logprobs - (logprobs.detach() if old is None else old)).exp()
    bounded = ratio.clamp(1 - case.config.algorithm.clip_low, 1 + case.config.algorithm.clip_high)
    return torch.minimum(ratio * advantages, bounded * advantages)


def _wide(policy: Policy) -> torch.dtype:
    return torch.promote_types(policy.model.dtype, torch.float32)


def _trajectory(sample: Weighed) -> Trajectory:
    return cast(Trajectory, sample.trajectory)


def _tokens(sample: Weighed) -> list[int]:
    tokens: list[int] = _trajectory(sample).tokens.tolist()
    return tokens
