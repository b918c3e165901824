"""Run every path that only a GPU takes once, against its reference: on the CPU, and in a wider dtype.

Legend: N rows, H hidden, V vocabulary, T tokens, A query heads, G key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from mgrpo.bench.gpu.session import Session
from mgrpo.kernels import Objective, group_advantages, grpo_loss, linear_grpo_loss, token_logprob
from mgrpo.kernels.reference import linear_grpo_loss_ref, token_logprob_ref

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
# Relative distance in the 2-norm from the truth in float64, of what is computed in each dtype.
LIMIT = {BF16: 2e-2, F32: 1e-5, F64: 1e-10}
LENGTHS = (300, 17, 195)
FULL: dict[str, Any] = {"kl_coef": 0.1, "entropy_coef": 0.05, "dual_clip": 3.0}
IMPORTANCES: tuple[Literal["token", "sequence", "trajectory"], ...] = ("token", "sequence", "trajectory")


def flash(session: Session) -> None:
    """Compare flash attention with shared heads, windows and narrower values with attention on the CPU in float64."""
    for window in (None, 64):
        for own in (64, 48):
            _attention(session, f"window {window}, values of {own}", BF16, window, 64, own)


def blocks(session: Session) -> None:
    """Compare what flash attention does not take: float32, and heads wider than 256."""
    for window in (None, 64):
        _attention(session, f"float32, window {window}", F32, window, 64, 64)
    _attention(session, "heads of 320", BF16, None, 320, 320)


def _attention(session: Session, name: str, dtype: torch.dtype, window: int | None, size: int, own: int) -> None:
    from mgrpo.engine.model.attention import Local, Packed, Rule

    generator = torch.Generator().manual_seed(0)
    shapes = ((8, size), (2, size), (2, own))
    given = [torch.randn(heads, sum(LENGTHS), width, generator=generator).to(dtype) for heads, width in shapes]
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)

    def run(device: torch.device, wide: torch.dtype) -> list[Tensor]:
        leaves = [x.to(device, wide).requires_grad_() for x in given]
        layout = Packed(bounds.to(device), max(LENGTHS))
        q_ATD, k_GTD, v_GTD = leaves
        out = layout.attend(0, q_ATD, k_GTD, v_GTD, Rule(size**-0.5, Local(window=window)))
        out.float().square().sum().backward()
        return [out, *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    truth = run(torch.device("cpu"), F64)
    for what, a, b in zip(("output", "dq", "dk", "dv"), run(session.device, dtype), truth, strict=True):
        session.near(f"{name}: {what}", a, b, LIMIT[dtype])


def losses(session: Session) -> None:
    """Compare the losses, by each kind of ratio and in each dtype, with their definition in float64."""
    for importance in IMPORTANCES:
        for dtype in (BF16, F32, F64):
            _loss(session, Objective(importance=importance, **FULL), dtype)


def _loss(session: Session, objective: Objective, dtype: torch.dtype) -> None:
    heads, rows = _inputs(dtype, session.device)
    truth_heads = [x.detach().double().requires_grad_() for x in heads]
    wide = {name: x.double() if x.is_floating_point() else x for name, x in rows.items()}
    truth, *_ = linear_grpo_loss_ref(truth_heads[0], truth_heads[1], objective=objective, **wide)
    truth.backward()
    found = linear_grpo_loss(heads[0], heads[1], objective=objective, **rows)
    found.loss.backward()
    pairs = zip(("dX", "dW"), heads, truth_heads, strict=True)
    results = [("loss", found.loss, truth), *((what, a.grad, b.grad) for what, a, b in pairs)]
    for what, got, true in results:
        assert got is not None and true is not None
        session.near(f"{objective.importance} {dtype}: {what}", got, true, 3 * LIMIT[dtype])
    known = linear_grpo_loss(truth_heads[0].detach(), truth_heads[1].detach(), objective=objective, **wide).metrics
    names = [name for name in known if "clip" not in name and "capped" not in name]  # a ratio at a bound may round over
    got, true = (torch.stack([metrics[name].double() for name in names]) for metrics in (found.metrics, known))
    session.near(f"{objective.importance} {dtype}: metrics", got, true, 3 * LIMIT[dtype])
    _loss_of_logits(session, objective, heads, rows, (truth, truth_heads))


def _loss_of_logits(
    session: Session, objective: Objective, heads: list[Tensor], rows: dict[str, Any], true: tuple[Tensor, list[Tensor]]
) -> None:
    """Compare loss and gradient of logits, in a buffer and over the logits, scaled by a third."""
    truth, (hidden_NH, weight_VH), dtype = *true, heads[0].dtype
    assert hidden_NH.grad is not None
    for inplace in (False, True):
        leaf_NV = (heads[0].detach() @ heads[1].detach().t()).requires_grad_()
        loss = grpo_loss(leaf_NV * 1, objective=objective, inplace=inplace, **rows).loss
        (loss / 3).backward()
        assert leaf_NV.grad is not None
        name = f"{objective.importance} {dtype}: {'in place, ' if inplace else ''}"
        session.near(f"{name}loss of logits", loss, truth, 3 * LIMIT[dtype])
        dhidden_NH = leaf_NV.grad.double() @ weight_VH.detach()
        session.near(f"{name}gradient of logits", dhidden_NH, hidden_NH.grad / 3, 3 * LIMIT[dtype])


def _inputs(dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], dict[str, Any]]:
    """Return hidden states and head, and the rows of a loss, a third of them left out."""
    generator = torch.Generator().manual_seed(1)
    rows, width, vocabulary = 512, 128, 3001
    hidden_NH = torch.randn(rows, width, generator=generator).to(device, dtype)
    weight_VH = (torch.randn(vocabulary, width, generator=generator) * 2 / width**0.5).to(device, dtype)
    targets_N = torch.randint(vocabulary, (rows,), generator=generator).to(device)
    true_N = token_logprob_ref(hidden_NH.double() @ weight_VH.double().t(), targets_N)[0].to(F32)

    def vector(spread: float) -> Tensor:
        return (torch.randn(rows, generator=generator) * spread).to(device)

    given = {
        "targets_N": targets_N,
        "advantages_N": vector(1.0),
        "loss_weights_N": (torch.arange(rows) % 3 > 0).to(device, F32) / rows,
        "old_logprobs_N": true_N + vector(0.1),
        "sampler_logprobs_N": true_N + vector(0.1),
        "ref_logprobs_N": true_N + vector(0.3),
        "cu_seqlens": torch.tensor([0, 100, 101, 350, rows], dtype=torch.int32, device=device),
    }
    return [hidden_NH.requires_grad_(), weight_VH.requires_grad_()], given


def logprobs(session: Session) -> None:
    """Compare log-probs and entropies of logits, and their gradient written over the logits, with float64."""
    for dtype in (BF16, F32):
        logits_NV = torch.randn(256, 3001, generator=torch.Generator().manual_seed(2)).mul(3).to(session.device, dtype)
        targets_N = torch.arange(256, device=session.device)
        leaf, wide = logits_NV.clone().requires_grad_(), logits_NV.double().requires_grad_()
        found = token_logprob(leaf * 1, targets_N, inplace=True)
        truth = token_logprob_ref(wide, targets_N)
        for result in (found, truth):
            (result[0].sum() + result[1].sum()).backward()
        assert leaf.grad is not None and wide.grad is not None
        session.near(f"{dtype}: log-probs", found[0], truth[0], LIMIT[F32])
        session.near(f"{dtype}: entropies", found[1], truth[1], LIMIT[F32])
        session.near(f"{dtype}: gradient", leaf.grad, wide.grad, LIMIT[dtype])


def advantages(session: Session) -> None:
    """Compare the advantages of one launch with those of the CPU in float64, by each estimator."""
    rewards_R = torch.randn(4096, generator=torch.Generator().manual_seed(3))
    offsets_G1 = torch.tensor([0, *range(7, 4096, 8), 4096])
    for baseline in ("mean", "leave_one_out", "median"):
        truth = group_advantages(rewards_R.double(), offsets_G1, baseline=baseline).values_R
        given = rewards_R.to(session.device), offsets_G1.to(session.device)
        session.near(baseline, group_advantages(*given, baseline=baseline).values_R, truth, LIMIT[F32])


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def sampling(session: Session) -> None:
    """Draw under deterministic algorithms, twice the same, and as the CPU draws but for rounding."""
    from mgrpo.engine.inference.in_process import draw

    logits_RV = torch.randn(256, 30_001, generator=torch.Generator().manual_seed(4)) * 3
    uniforms = torch.rand(256, generator=torch.Generator().manual_seed(5)).tolist()
    for top_p in (1.0, 0.9):
        settings: Any = (0.8, top_p, uniforms, [False] * 256)
        with _deterministic():
            found, again = (draw(logits_RV.to(session.device), *settings) for _ in range(2))
        assert found == again, "the same draw gave other tokens"
        truth = draw(logits_RV, *settings)
        other = sum(a != b for a, b in zip(found[0], truth[0], strict=True)) / 256
        session.add(f"top_p {top_p}: tokens that are not the CPU's", other, "relative", at_most=0.02)


def policy(session: Session) -> None:
    """Compare the gradient of two micro-batches of a small model in bf16 with that of the CPU in float32."""
    _policy(session, False)


def compiled(session: Session) -> None:
    """Do the same with compiled layers."""
    if session.on_gpu:
        _policy(session, True)
    else:
        session.add("left out", None, "", why="layers are compiled on a GPU only")


def _policy(session: Session, compiled: bool) -> None:
    from mgrpo.bench.gpu.model import batches, causal_lm
    from mgrpo.bench.step.models import TINY
    from mgrpo.engine.config.schema import ComputeConfig
    from mgrpo.engine.policy.policy import Policy

    def gradient(device: torch.device, dtype: torch.dtype, compiled: bool) -> dict[str, Tensor]:
        compute = ComputeConfig(device=str(device), compile=compiled)
        held = Policy.of(causal_lm(TINY, dtype), compute=compute)
        held.forward_backward(batches(TINY, 2, (120, 300, 44)), Objective())
        found = {name: weight.grad for name, weight in held.masters.weights.items() if weight.grad is not None}
        kept = {name: weight.clone() for name, weight in found.items()}
        session.add(f"{dtype} on {device}: norm of the gradient", held.optim_step(), "")
        return kept

    truth = gradient(torch.device("cpu"), F32, False)
    found = gradient(session.device, BF16, compiled)
    assert truth.keys() == found.keys()
    got, true = (torch.cat([x[name].double().cpu().flatten() for name in truth]) for x in (found, truth))
    session.near("gradient", got, true, 0.1)
