"""Compute gradients of small groups by definition, from whole logits in float64, and by the engine's policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mgrpo.engine.batch.advantages import weigh
from mgrpo.engine.batch.micro_batches import Batch, pack_calls
from mgrpo.engine.config.schema import AgentConfig, AlgorithmConfig, RewardConfig
from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.run.trajectories import Position
from mgrpo.engine.store import CallRecord, Group, RolloutRecord
from mgrpo.engine.types import Trajectory
from toy import make_model, toy_config

VOCABULARY, LONGEST, TEMPERATURE, REWARD = 257, 17, 0.8, RewardConfig()
COMMON = 12  # a multiple of each number of calls in `expected` cases, so that copies (D / d_k) are whole trajectories
CHOICES: dict[str, list[Any]] = {
    "aligned_calls": [1, 3, 4],
    "alignment": ["sampled", "expected", "none"],
    "dual_clip": [None, 1.5],
    "clip_low": [0.05, 0.2],
    "kl_coef": [0.0, 0.0, 0.3],
    "kl": ["k1", "k2", "k3"],
    "entropy_coef": [0.0, 0.0, 0.2],
    "sampler_cap": [None, 1.5],
}
NORMS, RATIOS = ("trajectory", "token", "constant"), ("token", "sequence", "trajectory")


@dataclass(frozen=True)
class Case:
    """Groups of one agent, in which the row of a call's position is the number of its trajectory."""

    agent: str
    groups: list[Group]
    trajectories: list[Trajectory]
    algorithm: AlgorithmConfig


def make_case(seed: int, length_norm: str, importance: str) -> Case:
    rng = np.random.default_rng([seed, NORMS.index(length_norm), RATIOS.index(importance)])
    chosen = {name: values[rng.integers(len(values))] for name, values in CHOICES.items()}
    algorithm = AlgorithmConfig(length_norm=length_norm, importance=importance, length_constant=7.0, **chosen)  # type: ignore[arg-type]
    agent = "main" if rng.random() < 0.25 else "clerk"
    counts = [1] if agent == "main" else [0, 1, 2, 3, 4, 6] if algorithm.alignment == "expected" else range(8)
    bodies = [random_body(rng) for _ in range(5)]
    groups, trajectories = [], []
    for query in (7, 3, 1 << 20):
        group = Group(query, "task", 0, [], [])
        for rollout in range(4):
            correct, valid = (1.0, True) if query == 3 else (float(rng.choice([0, 0.5, 1])), bool(rng.random() < 0.8))
            status = rng.choice(["scored", "scored", "scored", "unscored", "failed"])
            group.rollouts.append(RolloutRecord(query, rollout, status, valid, correct, 1.0))
            for number in range(rng.choice(counts)):
                expert = None if agent == "main" else 1.0 if query == 3 else float(rng.choice([0, 0.3, 1]))
                valid_call = valid if agent == "main" or query == 3 else bool(rng.random() < 0.8)
                tokens, sampled = bodies[rng.integers(5)] if rng.random() < 0.7 else random_body(rng)
                position, actions = Position("", 0, len(trajectories)), int(sampled.sum())
                spread = -5.5 + 0.4 * (tokens % 3) * rng.integers(2)  # two samplers, far from the trainer
                logprobs = np.where(sampled, spread, 0).astype(np.float32)
                trajectories.append(Trajectory(tokens, sampled, logprobs, 0))
                facts = (len(tokens), actions, 1, False, "answer", position)
                group.calls.append(CallRecord(agent, query, rollout, number, valid_call, expert, 0, *facts))
        groups.append(group)
    return Case(agent, groups, trajectories, algorithm)


def random_body(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a prompt and up to three turns, with observations between them and sometimes after them."""
    runs = [int(rng.integers(2, 5)), *rng.integers(1, 4, rng.integers(0, 5)).tolist()]
    sampled = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return rng.integers(VOCABULARY, size=len(sampled)).astype(np.int32), sampled


def copies_of(case: Case, multiplicities: dict[Position, float]) -> list[list[tuple[Trajectory, float, float]]]:
    """Return trajectory, advantage and share of every physical copy, for each query with a scored rollout."""
    aligned = {"main": 1}.get(
        case.agent, COMMON if case.algorithm.alignment == "expected" else case.algorithm.aligned_calls
    )
    queries = []
    for group in case.groups:
        scored = [r for r in group.rollouts if r.status == "scored"]
        members: list[tuple[Trajectory, float]] = []
        for rollout in scored:
            calls = [call for call in group.calls if call.rollout == rollout.rollout]
            for call in calls:
                expected = case.agent != "main" and case.algorithm.alignment == "expected"
                copies = COMMON // len(calls) if expected else int(multiplicities[call.position])
                copies = 1 if case.algorithm.alignment == "none" else copies
                members += [(case.trajectories[call.position.row], reward_of(call, rollout))] * copies
        if scored:
            mean = sum(reward for _, reward in members) / max(len(members), 1)
            std = (sum((reward - mean) ** 2 for _, reward in members) / max(len(members), 1)) ** 0.5
            share = 1 / (len(scored) * aligned)
            queries.append([(t, (reward - mean) / std if std > 1e-6 else 0.0, share) for t, reward in members])
    return [[(t, a, share / len(queries)) for t, a, share in members] for members in queries]


def reward_of(call: CallRecord, rollout: RolloutRecord) -> float:
    if call.expert is None:
        return 0.1 + 0.9 * rollout.correct if rollout.format else 0.0
    return 0.1 + 0.4 * rollout.correct + 0.5 * call.expert if call.format else 0.0


def all_logits(model: nn.Module, sequences: Sequence[Trajectory], padded: bool) -> list[Tensor]:
    """Return the logits (L, V) of each sequence, from one padded batch or one sequence at a time."""
    ids = [torch.from_numpy(t.tokens.astype(np.int64)) for t in sequences]
    if not padded:
        return [model(input_ids=ids_L[None]).logits[0] for ids_L in ids]
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(ids_L) for ids_L in ids], batch_first=True)
    logits = model(input_ids=nn.utils.rnn.pad_sequence(ids, batch_first=True), attention_mask=mask).logits
    return [row[: len(ids_L)] for row, ids_L in zip(logits, ids, strict=True)]


def sampled_logprobs(t: Trajectory, logits_LV: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-prob (S,) of each sampled token, and the distribution (S, V) that it was drawn from."""
    at = torch.from_numpy(np.flatnonzero(t.sampled))
    logp_SV = (logits_LV / TEMPERATURE).log_softmax(-1)[at - 1]
    return logp_SV.gather(1, torch.from_numpy(t.tokens.astype(np.int64))[at, None])[:, 0], logp_SV


def token_losses(
    t: Trajectory, advantage: float, a: AlgorithmConfig, logits_LV: Tensor, old_LV: Tensor | None, reference_LV: Tensor
) -> Tensor:
    """Return the loss of each sampled token, (S,)."""
    logp_S, logp_SV = sampled_logprobs(t, logits_LV)
    old_S = logp_S.detach() if old_LV is None else sampled_logprobs(t, old_LV)[0]
    log_ratio_S = logp_S - old_S
    if a.importance != "token":
        log_ratio_S = (log_ratio_S.mean() if a.importance == "sequence" else log_ratio_S.sum()).expand(len(logp_S))
    ratio_S = log_ratio_S.exp()
    gain_S = torch.minimum(ratio_S * advantage, ratio_S.clamp(1 - a.clip_low, 1 + a.clip_high) * advantage)
    if a.dual_clip is not None and advantage < 0:
        gain_S = gain_S.clamp(min=a.dual_clip * advantage)
    if a.sampler_cap is not None:
        gain_S = gain_S * (old_S - torch.from_numpy(t.logprobs[t.sampled]).double()).exp().clamp(max=a.sampler_cap)
    delta_S = logp_S - sampled_logprobs(t, reference_LV)[0]
    kl_S = {"k1": delta_S, "k2": delta_S**2 / 2, "k3": (-delta_S).exp() - 1 + delta_S}[a.kl]
    return -gain_S + a.kl_coef * kl_S + a.entropy_coef * (logp_SV.exp() * logp_SV).sum(-1)


def naive_loss(case: Case, model: nn.Module, old: nn.Module | None, reference: nn.Module, padded: bool) -> Tensor:
    """Return the loss of a case by definition. old: the sampling policy; None if on-policy."""
    a, total, tokens = case.algorithm, torch.zeros((), dtype=torch.float64), 0
    for members in copies_of(case, multiplicities_of(case)):
        if not members:
            continue
        sequences = [t for t, _, _ in members]
        logits = all_logits(model, sequences, padded)
        with torch.no_grad():
            reference_logits = all_logits(reference, sequences, padded)
            old_logits = [None] * len(members) if old is None else all_logits(old, sequences, padded)
        for (t, advantage, share), *rows in zip(members, logits, old_logits, reference_logits, strict=True):
            losses_S = token_losses(t, advantage, a, *rows)
            tokens += len(losses_S)
            divisor = {"trajectory": max(len(losses_S), 1), "constant": a.length_constant, "token": 1}[a.length_norm]
            total = total + losses_S.sum() / divisor * (1 if a.length_norm == "token" else share)
    return total / max(tokens, 1) if a.length_norm == "token" else total


def multiplicities_of(case: Case) -> dict[Position, float]:
    """Return how often the seeded alignment drew each trajectory, by the engine's own code (see test_advantages.py)."""
    credit = weigh(case.agent, 1, case.groups, case.algorithm, REWARD, seed=5)
    return {call.position: m for call, m in zip(credit.calls, credit.multiplicities, strict=True)}


class Recorder(Policy):
    """Keep each epoch's gradient, and take a given step in place of the optimizer's: the next epoch is off-policy."""

    def optim_step(self, lr: float | None = None) -> float:
        self.gradients.append({name: gradient(weight) for name, weight in self.masters.params.items()})
        self.model.zero_grad()
        self.model.load_state_dict(self.moved)
        return 0.0


def gradient(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()


def wide_pack(
    calls: Sequence[Any], adv_N: np.ndarray, weight_N: np.ndarray, max_tokens: int, **options: Any
) -> list[Batch]:
    """Pack with float64 numbers: `pack` fills float32 buffers, so it carries labels that are replaced afterwards."""
    weights, advantages = (torch.from_numpy(np.concatenate([[0.0], values])) for values in (weight_N, adv_N))
    batches = pack_calls(calls, np.ones(len(calls)), 1.0 + np.arange(len(calls)), max_tokens, **options)
    return [
        replace(b, weights_P=weights[b.weights_P.long()], advantages_P=advantages[b.weights_P.long()]) for b in batches
    ]


@dataclass
class Actors:
    """The engine's policy and the plain models in float64: the weights as made, and those after the first step."""

    policy: Recorder
    first: nn.Module
    moved: nn.Module
    reference: nn.Module
    folder: Path


def plain_model(folder: Path, noise: float, seed: int = 0) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.data += noise * torch.randn(weight.shape, dtype=torch.float64, generator=generator)
    return model


def make_policy(kind: type[Policy], folder: Path, reference: nn.Module, **changes: Any) -> Any:
    """Load a policy in float64; the model is still its own master, and the optimizer holds the same tensors."""
    agent = AgentConfig(model=str(folder), temperature=TEMPERATURE, max_context=64, **changes)
    policy = kind("clerk", agent, toy_config(folder).compute)
    policy.model.double()
    policy.keep_reference()
    assert policy.reference is not None
    policy.reference.load_state_dict(reference.state_dict())
    return policy


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def actors(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Actors:
    folder = make_model(
        tmp_path_factory.mktemp("model"), request.param, hidden_size=16, intermediate_size=24, num_hidden_layers=1
    )
    first, moved, reference = plain_model(folder, 0.0), plain_model(folder, 0.02, 1), plain_model(folder, 0.02, 2)
    return Actors(make_policy(Recorder, folder, reference), first, moved, reference, folder)
