"""Leaving work out changes nothing: nothing that is not computed has a gradient.

The naive path is the paper's (arXiv 2511.13288, Eqs. 4-17), word for word: every trajectory copied as often as the
alignment says, each copy through the plain `transformers` model with its own attention, full logits, `log_softmax`,
ratio, clip, mean after mean, autograd. Ours is `trainer.optimise` itself. Gradients agree in float64 to 1e-9.

Legend: L tokens of a trajectory, S its sampled tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from cases.exactness import (
    LONGEST,
    NORMS,
    RATIOS,
    REWARD,
    Actors,
    Case,
    actors,
    gradient,
    make_case,
    make_policy,
    naive_loss,
    plain_model,
    wide_pack,
)
from mgrpo import _packing
from mgrpo.engine.batch import select
from mgrpo.engine.batch.advantages import Credit, objective, weigh
from mgrpo.engine.policy import forward
from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.training import trainer
from mgrpo.engine.types import Trajectory
from mgrpo.kernels import Loss
from mgrpo.kernels.reference import linear_grpo_loss_ref

__all__ = ["actors"]  # a fixture
TOLERANCE = 1e-9


def credit_of(case: Case) -> Credit[Trajectory]:
    """Return the credit of a case, of its trajectories instead of the store's records."""
    found = weigh(case.agent, 1, case.groups, case.algorithm, REWARD, seed=5)
    calls = [case.trajectories[call.position.row] for call in found.calls]
    return Credit(calls, found.rewards, found.adv, found.multiplicities, found.weight, found.zero_std)


@pytest.fixture(scope="module", autouse=True)
def wide_norms() -> Iterator[None]:
    """Replace the norms of both paths: those of transformers round to float32, which is too coarse for these tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the work is too small to share: on busy cores the threads would wait for each other
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", lambda n, x: F.rms_norm(x, n.weight.shape, n.weight, n.variance_epsilon))
        patch.setattr(trainer, "pack_calls", wide_pack)
        patch.setattr(trainer, "matmul_ceiling", lambda *_: 1.0)  # seconds of measuring
        yield
    torch.set_num_threads(threads)


def our_gradients(actors: Actors, case: Case) -> list[dict[str, Tensor]]:
    """Return gradients on-policy at the first weights, then off-policy at the moved ones."""
    policy = actors.policy
    policy.gradients, policy.moved = [], actors.moved.state_dict()
    policy.model.load_state_dict(actors.first.state_dict())
    trainer.optimise(policy, credit_of(case), objective(case.algorithm), 1e-3, LONGEST + 7, epochs=2)
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


def no_merge(digests_N: Sequence[str], adv_N: np.ndarray, weight_N: np.ndarray, **_: bool) -> select.Merged:
    return select.Merged(np.arange(len(digests_N)), adv_N, weight_N)


def no_drop(rows_N: np.ndarray, adv_N: np.ndarray, weight_N: np.ndarray, **_: bool) -> np.ndarray:
    return np.flatnonzero(weight_N)


def untrimmed_rows(offsets_N1: np.ndarray, sampled_T: np.ndarray) -> np.ndarray:
    return np.diff(offsets_N1) - 1


def full_logits_loss(*given: Any, buffer_bytes: None, master_VH: None, **keywords: Any) -> Loss:
    """Return the loss with no row left out before the head, whose logits are whole."""
    assert buffer_bytes is None and master_VH is None
    loss, logprobs_N, entropy_N = linear_grpo_loss_ref(*given, **keywords)
    return Loss(loss, logprobs_N.detach(), entropy_N.detach(), {})


trim = [
    (_packing, "trainable_rows", untrimmed_rows),
    (Trajectory, "rows", property(lambda trajectory: len(trajectory) - 1)),
]
OFF = {  # a trimmed trajectory without an action has no row, so it is kept only without trimming
    "drop": [(select, "drop", no_drop), *trim],
    "merge": [(select, "merge", no_merge)],
    "trim": trim,
    "compact": [(forward, "linear_grpo_loss", full_logits_loss)],
    "all": [(select, "drop", no_drop), (select, "merge", no_merge), *trim],
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
    row = trainer.optimise(policy, credit_of(case), objective(case.algorithm), lr, LONGEST + 7, epochs=3)
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
        credit, everything = credit_of(case), case.algorithm.kl_coef > 0 or case.algorithm.entropy_coef > 0
        rows_N = np.array([t.rows for t in credit.calls])
        live = select.drop(rows_N, credit.adv, credit.weight, keep_zero_advantage=everything)
        calls, adv_M, weight_M = select.compact(credit, objective(case.algorithm))
        signs = Counter(t.tokens.tobytes() for t in calls)
        moved = {
            "dropped": len(live) < len(credit.calls),
            "merged": len(calls) < len(live),
            "merged unlike rewards": len({(credit.calls[i].tokens.tobytes(), credit.adv[i]) for i in live})
            > len(calls),
            "alike but kept apart": max(signs.values(), default=0) > 1,
            "many micro-batches": len(wide_pack(calls, adv_M, weight_M, LONGEST + 7)) > 3,
            "no action": any(not t.sampled.any() for t in credit.calls),
            "observation last": any(not credit.calls[i].sampled[-1] for i in live),
            "chosen": (credit.weight == 0).any(),
            "main": case.agent == "main",
        }
        seen = {name: seen.get(name, 0) + holds for name, holds in moved.items()}
    assert min(seen.values()) >= 4, seen
