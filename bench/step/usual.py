"""Take one optimisation step the usual way, and in ways that leave out one needless piece of work after another.

The usual way combines what public trainers do (each does some of it): rollouts copied until each has D calls,
Python lists padded to the longest of the step (as in TRL), micro-batches of equally many sequences, a second forward
for the log-probs of all of them before the update (verl; TRL only where it must), logits for every token. It is written
plainly and uses only what all ways must share with the engine: the model, its fp32 master weights, the optimizer, and
the random choice of the copies. From "no padding" on attention is the engine's; the last way is the engine's own step.

Legend: B sequences, L tokens of the longest, P tokens of a packed row, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from mgrpo.bench.step.case import LR, Case
from mgrpo.engine.batch.advantages import Credit, main_reward, objective, sub_reward, weigh
from mgrpo.engine.batch.micro_batches import Batch
from mgrpo.engine.batch.select import drop, merge
from mgrpo.engine.model.attention import Packed
from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.run.trajectories import read
from mgrpo.engine.store import CallRecord
from mgrpo.engine.training.trainer import AgentTrainer
from mgrpo.engine.types import MAIN, Trajectory

PAD = 0


@dataclass(frozen=True)
class Way:
    """Say which needless work a step does. The defaults are the usual way."""

    copies: bool = True  # copy trajectories that the alignment repeats
    merged: bool = False  # merge identical trajectories
    dropped: bool = False  # leave out trajectories without advantage
    old_pass: bool = True  # a forward for old log-probs, which equal the current ones
    packed: bool = False  # no padding
    compact: bool = False  # apply the head to the agent's own tokens only
    fused: bool = False  # keep no logits
    engine: bool = False  # no Python lists: plan and fill in C++


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
    """Take a step, from sealed groups to new weights."""
    if way.engine:
        trainer.train(0, case.groups)
        return
    samples = samples_of(way, case)
    update = _packed_update if way.packed else _padded_update
    update(way, case, policy, samples)
    policy.optim_step(LR)


# ---- which trajectories


@dataclass(frozen=True)
class Sample:
    """Hold a trajectory, its advantage and the loss weight of each of its action tokens."""

    trajectory: Trajectory
    advantage: float
    weight: float


def samples_of(way: Way, case: Case) -> list[Sample]:
    """Return the trajectories that a way trains on, with advantages and loss weights."""
    algorithm, reward = case.config.algorithm, case.config.reward
    credit = weigh(case.agent, case.index, case.groups, algorithm, reward, case.config.seed)
    samples = _copied(case, credit) if way.copies else _aligned(case, credit)
    if way.merged:
        found = merge([s.trajectory.digest for s in samples], *_columns(samples))
        samples = [
            Sample(samples[i].trajectory, adv, weight)
            for i, adv, weight in zip(found.ids, found.adv.tolist(), found.weight.tolist(), strict=True)
        ]
    if way.dropped:
        rows_N = np.array([s.trajectory.rows for s in samples], np.int64)
        samples = [samples[i] for i in drop(rows_N, *_columns(samples), keep_zero_advantage=False)]
    return samples


def _columns(samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([s.advantage for s in samples]), np.array([s.weight for s in samples])


def _copied(case: Case, credit: Credit[CallRecord]) -> list[Sample]:
    """Return each trajectory as often as it was drawn; advantages are computed over all copies of a group."""
    config, samples = case.config, list[Sample]()
    times = {call.position: int(m) for call, m in zip(credit.calls, credit.multiplicities, strict=True)}
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


def _normalised(case: Case, calls: list[CallRecord], rewards: list[float], share: float) -> list[Sample]:
    mean, std = np.mean(rewards), np.std(rewards)
    trajectories = read(case.trajectories, [call.position for call in calls])
    samples = []
    for trajectory, reward in zip(trajectories, rewards, strict=True):
        actions = max(1, sum(trajectory.sampled.tolist()))
        advantage = (reward - mean) / std if std > case.config.algorithm.std_eps else 0.0
        norm = {"trajectory": actions, "constant": case.config.algorithm.length_constant}
        samples.append(Sample(trajectory, float(advantage), share / norm[case.config.algorithm.length_norm]))
    return samples


def _aligned(case: Case, credit: Credit[CallRecord]) -> list[Sample]:
    """Return each trajectory once, with the alignment in its weight."""
    trajectories = read(case.trajectories, [call.position for call in credit.calls])
    rows = zip(trajectories, credit.adv.tolist(), credit.weight.tolist(), strict=True)
    return [Sample(*row) for row in rows if row[2]]


# ---- padded


@dataclass(frozen=True)
class Padded:
    """Hold one micro-batch. attended_BL: not padding; counts_BL: the agent's own tokens."""

    ids_BL: Tensor
    attended_BL: Tensor
    counts_BL: Tensor
    advantages_B1: Tensor
    weights_B1: Tensor


def pad(samples: Sequence[Sample], max_tokens: int, dtype: torch.dtype, device: torch.device) -> list[Padded]:
    """Make micro-batches of as many sequences as fit if all are as long as the step's longest."""
    longest = max((len(_tokens(sample)) for sample in samples), default=1)
    size = max(1, max_tokens // longest)
    return [_collate(samples[first : first + size], longest, dtype, device) for first in range(0, len(samples), size)]


def _collate(samples: Sequence[Sample], longest: int, dtype: torch.dtype, device: torch.device) -> Padded:
    ids, attended, counts = [], [], []
    for sample in samples:
        tokens, gap = _tokens(sample), longest - len(_tokens(sample))
        ids.append(tokens + [PAD] * gap)
        attended.append([1] * len(tokens) + [0] * gap)
        counts.append([int(flag) for flag in sample.trajectory.sampled] + [0] * gap)
    return Padded(
        torch.tensor(ids, device=device),
        torch.tensor(attended, device=device),
        torch.tensor(counts, device=device),
        torch.tensor([[sample.advantage] for sample in samples], dtype=dtype, device=device),
        torch.tensor([[sample.weight] for sample in samples], dtype=dtype, device=device),
    )


def _padded_update(way: Way, case: Case, policy: Policy, samples: Sequence[Sample]) -> None:
    with _own_attention(policy.model):
        batches = pad(samples, case.config.compute.max_tokens, _wide(policy), policy.model.device)
        with torch.no_grad():
            old = [_padded_logprobs(policy, batch) if way.old_pass else None for batch in batches]
        for batch, old_BL in zip(batches, old, strict=True):
            logprobs_BL = _padded_logprobs(policy, batch)
            gain_BL = clipped(case, logprobs_BL, old_BL, batch.advantages_B1)
            (-(gain_BL * batch.counts_BL[:, 1:]).sum(1, keepdim=True) * batch.weights_B1).sum().backward()


def _padded_logprobs(policy: Policy, batch: Padded) -> Tensor:
    """Return log-probs (B, L-1) of each token except the first."""
    out = policy.model(input_ids=batch.ids_BL, attention_mask=batch.attended_BL, use_cache=False)
    return plain_logprobs(out.logits[:, :-1], batch.ids_BL[:, 1:], policy)


@contextmanager
def _own_attention(model: PreTrainedModel) -> Iterator[None]:
    """Run the model as transformers does by default, with a mask."""
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation("mgrpo")


# ---- packed


def pack_lists(samples: Sequence[Sample], max_tokens: int, dtype: torch.dtype, device: torch.device) -> list[Batch]:
    """Concatenate sequences in the order given; begin a new micro-batch when the next one does not fit."""
    parts: list[list[Sample]] = [[]]
    for sample in samples:
        if sum(len(_tokens(s)) - 1 for s in [*parts[-1], sample]) > max_tokens and parts[-1]:
            parts.append([])
        parts[-1].append(sample)
    return [_concatenate(part, dtype, device) for part in parts if part]


def _concatenate(samples: Sequence[Sample], dtype: torch.dtype, device: torch.device) -> Batch:
    ids, places, targets, advantages, weights, logprobs, bounds = [], [], [], [], [], [], [0]
    for sample in samples:
        tokens, trajectory = _tokens(sample), sample.trajectory
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


def _packed_update(way: Way, case: Case, policy: Policy, samples: Sequence[Sample]) -> None:
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
    """Return log p of the targets, computed in at least float32."""
    logits_XV = logits_XV.to(_wide(policy))
    if policy.agent.temperature != 1:
        logits_XV = logits_XV / policy.agent.temperature
    return logits_XV.log_softmax(-1).gather(-1, targets_X[..., None])[..., 0]


def clipped(case: Case, logprobs: Tensor, old: Tensor | None, advantages: Tensor) -> Tensor:
    """Return min(rho A, clip(rho) A) of each token. old None: the old log-probs are the current ones."""
    ratio = (logprobs - (logprobs.detach() if old is None else old)).exp()
    bounded = ratio.clamp(1 - case.config.algorithm.clip_low, 1 + case.config.algorithm.clip_high)
    return torch.minimum(ratio * advantages, bounded * advantages)


def _wide(policy: Policy) -> torch.dtype:
    return torch.promote_types(policy.model.dtype, torch.float32)


def _tokens(sample: Sample) -> list[int]:
    tokens: list[int] = sample.trajectory.tokens.tolist()
    return tokens
