"""The thesis: nothing that we do not compute had a gradient.

The naive path is the paper's (arXiv 2511.13288, Eqs. 4-17), word for word: every trajectory copied as often as the
alignment says, each copy through the plain `transformers` model with its own attention, full logits, `log_softmax`,
ratio, clip, mean after mean, autograd. Ours is `trainer.optimise` itself. Gradients agree in float64 to 1e-9.

Legend: L tokens of a trajectory, S its sampled tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mgrpo import _packing
from mgrpo.engine.batch.advantages import weigh
from mgrpo.engine.batch.micro_batches import Batch, Weighed, pack
from mgrpo.engine.batch.objective import objective, token_weights
from mgrpo.engine.config.schema import AgentConfig, AlgorithmConfig, RewardConfig
from mgrpo.engine.policy import forward as passes
from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.run.trajectories import Position
from mgrpo.engine.store.groups import CallRecord, Group, RolloutRecord
from mgrpo.engine.training import trainer
from mgrpo.engine.types import Trajectory
from mgrpo.kernels import Loss
from mgrpo.kernels.reference import linear_grpo_loss_ref
from toy import make_model, toy_config

VOCABULARY, LONGEST, TEMPERATURE, REWARD = 257, 17, 0.8, RewardConfig()
TOLERANCE = 1e-9
COMMON = 12  # what every number of calls in `expected` cases divides: copies of whole trajectories, D / d_k of each
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


# ---- random ragged groups


@dataclass(frozen=True)
class Case:
    """Groups of one agent; the row of a call's position is its trajectory's number."""

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
    """A prompt, up to three turns with observations between them and sometimes after; sometimes no turn at all."""
    runs = [int(rng.integers(2, 5)), *rng.integers(1, 4, rng.integers(0, 5)).tolist()]
    sampled = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return rng.integers(VOCABULARY, size=len(sampled)).astype(np.int32), sampled


# ---- the naive path


def copies_of(case: Case, multiplicities: dict[Position, float]) -> list[list[tuple[Trajectory, float, float]]]:
    """Of each query with a scored rollout: trajectory, advantage and share of every physical copy."""
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
    """(L, V) of each sequence, from one padded batch or one sequence at a time."""
    ids = [torch.from_numpy(t.tokens.astype(np.int64)) for t in sequences]
    if not padded:
        return [model(input_ids=ids_L[None]).logits[0] for ids_L in ids]
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(ids_L) for ids_L in ids], batch_first=True)
    logits = model(input_ids=nn.utils.rnn.pad_sequence(ids, batch_first=True), attention_mask=mask).logits
    return [row[: len(ids_L)] for row, ids_L in zip(logits, ids, strict=True)]


def sampled_logprobs(t: Trajectory, logits_LV: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob (S,) of each sampled token, and the distribution (S, V) it was drawn from."""
    at = torch.from_numpy(np.flatnonzero(t.sampled))
    logp_SV = (logits_LV / TEMPERATURE).log_softmax(-1)[at - 1]
    return logp_SV.gather(1, torch.from_numpy(t.tokens.astype(np.int64))[at, None])[:, 0], logp_SV


def token_losses(
    t: Trajectory, advantage: float, a: AlgorithmConfig, logits_LV: Tensor, old_LV: Tensor | None, reference_LV: Tensor
) -> Tensor:
    """The loss of each sampled token, (S,)."""
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
    """old None: on-policy."""
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
    """Which trajectories the seeded alignment drew: the one thing taken from ours (test_advantage looks into it)."""
    weighted = weigh(case.agent, 1, case.groups, case.algorithm, REWARD, seed=5)
    return {call.position: m for call, m in zip(weighted.calls, weighted.multiplicities, strict=True)}


# ---- our path


class Recorder(Policy):
    """Keeps each epoch's gradient, and instead of an optimizer's goes a given step: the next epoch is off-policy."""

    def optim_step(self, lr: float | None = None) -> float:
        self.gradients.append({name: gradient(weight) for name, weight in self.masters.params.items()})
        self.model.zero_grad()
        self.model.load_state_dict(self.moved)
        return 0.0


def gradient(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()


def weighed_of(case: Case) -> list[Weighed]:
    weighted = weigh(case.agent, 1, case.groups, case.algorithm, REWARD, seed=5)
    actions_N = np.array([call.actions for call in weighted.calls], np.int64)
    weights_N = token_weights(case.algorithm, weighted.shares, weighted.multiplicities, actions_N)
    trajectories = [case.trajectories[call.position.row] for call in weighted.calls]
    return [Weighed(*w) for w in zip(trajectories, weighted.advantages.tolist(), weights_N.tolist(), strict=True)]


def wide_pack(weighed: Sequence[Weighed], max_tokens: int, **options: Any) -> list[Batch]:
    """`pack` fills float32 buffers: let it carry labels there, and put each label's float64 numbers in their place."""
    labelled = [replace(w, weight=float(i + 1), advantage=1.0) for i, w in enumerate(weighed)]
    weights = torch.tensor([0.0, *(w.weight for w in weighed)], dtype=torch.float64)
    advantages = torch.tensor([0.0, *(w.advantage for w in weighed)], dtype=torch.float64)
    return [
        replace(b, weights_P=weights[b.weights_P.long()], advantages_P=advantages[b.weights_P.long()])
        for b in pack(labelled, max_tokens, **options)
    ]


@dataclass
class Actors:
    """Our policy and the plain models, in float64: first the weights as made, then those they are moved to."""

    policy: Recorder
    first: nn.Module
    moved: nn.Module
    reference: nn.Module
    folder: Path


@pytest.fixture(scope="module", autouse=True)
def wide_norms() -> Iterator[None]:
    """Of both paths: transformers rounds to float32 within its norms, which is coarser than what is told apart here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the work is too small to share: on busy cores the threads would wait for each other
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", lambda n, x: F.rms_norm(x, n.weight.shape, n.weight, n.variance_epsilon))
        patch.setattr(trainer, "pack", wide_pack)
        patch.setattr(trainer, "matmul_ceiling", lambda *_: 1.0)  # seconds of measuring
        yield
    torch.set_num_threads(threads)


def plain_model(folder: Path, noise: float, seed: int = 0) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.data += noise * torch.randn(weight.shape, dtype=torch.float64, generator=generator)
    return model


def make_policy(kind: type[Policy], folder: Path, reference: nn.Module, **changes: Any) -> Any:
    """In float64: the model is then its own master still, and the optimizer holds the same tensors."""
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


def our_gradients(actors: Actors, case: Case) -> list[dict[str, Tensor]]:
    """On-policy at the first weights, then off-policy at the moved ones."""
    policy = actors.policy
    policy.gradients, policy.moved = [], actors.moved.state_dict()
    policy.model.load_state_dict(actors.first.state_dict())
    trainer.optimise(policy, weighed_of(case), objective(case.algorithm), 1e-3, LONGEST + 7, epochs=2)
    return policy.gradients


def naive_gradients(actors: Actors, case: Case, padded: bool) -> list[dict[str, Tensor]]:
    found = []
    for model, old in ((actors.first, None), (actors.moved, actors.first)):
        model.zero_grad()
        naive_loss(case, model, old, actors.reference, padded).backward()
        found.append({name: gradient(weight) for name, weight in model.named_parameters()})
    return found


def assert_same(ours: list[dict[str, Tensor]], naive: list[dict[str, Tensor]]) -> None:
    for epoch, (got, truth) in enumerate(zip(ours, naive, strict=True)):
        assert got.keys() == truth.keys()
        for name in truth:
            off = (got[name] - truth[name]).abs().max()
            assert off <= TOLERANCE * truth[name].abs().max() + 1e-15, (epoch, name, off)


# ---- the tests

CASES = [(seed, norm, ratio) for norm, ratio in itertools.product(NORMS, RATIOS) for seed in range(6)]


@pytest.mark.parametrize(("seed", "norm", "ratio"), CASES)
def test_gradients_are_the_naive_ones(actors, seed, norm, ratio):
    case = make_case(seed, norm, ratio)
    assert_same(our_gradients(actors, case), naive_gradients(actors, case, padded=seed % 3 > 0))


def no_merge(weighed: list[Weighed], **_: bool) -> list[Weighed]:
    return weighed


def no_drop(weighed: list[Weighed], *, keep_zero_advantage: bool) -> list[Weighed]:
    return [w for w in weighed if w.weight]


def untrimmed_rows(offsets_N1: np.ndarray, sampled_T: np.ndarray) -> np.ndarray:
    return np.diff(offsets_N1) - 1


def full_logits_loss(*given: Any, **keywords: Any) -> Loss:
    """No row is left out before the head."""
    loss, logprobs_N, entropy_N = linear_grpo_loss_ref(*given, **keywords)
    return Loss(loss, logprobs_N.detach(), entropy_N.detach(), {})


trim = (_packing, "trainable_rows", untrimmed_rows)
OFF = {  # a trajectory without an action has no row once it is trimmed, so dropping stops only where trimming does
    "drop": [(trainer, "drop", no_drop), trim],
    "merge": [(trainer, "merge", no_merge)],
    "trim": [trim],
    "compact": [(passes, "linear_grpo_loss", full_logits_loss)],
    "all": [(trainer, "drop", no_drop), (trainer, "merge", no_merge), trim],
}


@pytest.mark.parametrize("off", OFF)
@pytest.mark.parametrize("seed", range(100, 106))
def test_each_elimination_alone_changes_nothing(actors, off, seed, monkeypatch):
    case = make_case(seed, NORMS[seed % 3], RATIOS[seed // 3 % 3])
    usual = our_gradients(actors, case)
    for patch in OFF[off]:
        monkeypatch.setattr(*patch)
    assert_same(our_gradients(actors, case), usual)


@pytest.mark.parametrize("seed", range(200, 203))
def test_optimizer_steps_are_the_naive_ones(actors, seed):
    """Three epochs with clipped gradients: each moves the weights, and is off-policy to the first."""
    case, lr = make_case(seed, "trajectory", RATIOS[seed % 3]), 0.01
    policy = make_policy(Policy, actors.folder, actors.reference, grad_clip=0.05, weight_decay=0.01)
    row = trainer.optimise(policy, weighed_of(case), objective(case.algorithm), lr, LONGEST + 7, epochs=3)
    plain = plain_model(actors.folder, 0.0)
    optimizer = torch.optim.AdamW(plain.parameters(), lr, policy.agent.betas, weight_decay=0.01)
    for epoch in range(3):
        optimizer.zero_grad()
        loss = naive_loss(case, plain, actors.first if epoch else None, actors.reference, padded=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        optimizer.step()
    assert row["loss"] == pytest.approx(loss.item(), rel=TOLERANCE, abs=1e-12)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=TOLERANCE) and norm > 0.05
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(policy.masters.weights[name], weight, rtol=0, atol=TOLERANCE)


def test_the_cases_hold_what_could_go_wrong(actors):
    seen: dict[str, int] = {}
    for given in CASES:
        case = make_case(*given)
        weighed, everything = weighed_of(case), case.algorithm.kl_coef > 0 or case.algorithm.entropy_coef > 0
        live = trainer.drop(weighed, keep_zero_advantage=everything)
        unique = trainer.merge(live, by_sampler_logprobs=case.algorithm.sampler_cap is not None)
        signs = Counter(w.trajectory.tokens.tobytes() for w in unique)
        moved = {
            "dropped": len(live) < len(weighed),
            "merged": len(unique) < len(live),
            "merged unlike rewards": len({(w.trajectory.tokens.tobytes(), w.advantage) for w in live}) > len(unique),
            "alike but kept apart": max(signs.values(), default=0) > 1,
            "many micro-batches": len(wide_pack(unique, LONGEST + 7)) > 3,
            "no action": any(not w.trajectory.sampled.any() for w in weighed),
            "observation last": any(not w.trajectory.sampled[-1] and w.trajectory.sampled.any() for w in live),
            "chosen": any(w.weight == 0 for w in weighed),
            "main": case.agent == "main",
        }
        seen = {name: seen.get(name, 0) + holds for name, holds in moved.items()}
    assert min(seen.values()) >= 4, seen
