"""Reproduce the loss values of Liger's and TRL's own code with our kernels: every variant that we share.

Neither project publishes numbers with its package, only code. `PUBLISHED` holds what that code computed on the data
below, which is made without a random generator (Liger 0.8.5's `LigerFusedLinearGRPOLoss`, TRL 1.16.0's
`GRPOTrainer._compute_loss`, float32). Our values are always compared with it, and values and gradients with the code
itself if it is installed. The TRL adapter gives the weight of a token and our name of a variant. VESPO is not among
ours.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mgrpo.kernels import linear_grpo_loss

pytest.importorskip("transformers")  # the other tests of the kernels need torch and triton alone

from mgrpo.engine.integrations.trl import FusedGRPO

BATCH, COLUMNS, HIDDEN, VOCABULARY = 4, 6, 5, 11
TEMPERATURE = 0.9
KLS: dict[str, dict[str, Any]] = {
    "no KL": {"beta": 0.0},
    "KL": {"beta": 0.1},
    "corrected KL": {"beta": 0.1, "use_bias_correction_kl": True},
}
EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two-sided": {"delta": 1.4},
    "truncated importance": {"use_vllm": True},
    "on-policy": {"on_policy": True},
}
VARIANTS = list(itertools.product(("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo"), ("token", "sequence")))
PUBLISHED = {  # without KL, with KL, with corrected KL
    ("grpo", "token"): (0.367046, 0.372064, 0.371653),
    ("grpo", "sequence"): (0.269928, 0.274946, 0.274931),
    ("bnpo", "token"): (0.224328, 0.231206, 0.230690),
    ("bnpo", "sequence"): (0.108115, 0.114994, 0.115029),
    ("dr_grpo", "token"): (0.081007, 0.083491, 0.083305),
    ("dr_grpo", "sequence"): (0.039042, 0.041526, 0.041538),
    ("dapo", "token"): (0.171545, 0.176805, 0.176410),
    ("dapo", "sequence"): (0.082676, 0.087936, 0.087964),
    ("luspo", "token"): (0.729066, 0.751421, 0.749743),
    ("luspo", "sequence"): (0.351375, 0.373730, 0.373845),
    ("cispo", "token"): (-0.400795, -0.395535, -0.395930),
    ("cispo", "sequence"): (-0.536327, -0.531067, -0.531040),
    ("sapo", "token"): (0.485834, 0.490852, 0.490441),
    ("sapo", "sequence"): (0.467598, 0.472616, 0.472600),
}


class Ours(FusedGRPO):
    """Return the adapter's reading of TRL's settings, without a trainer."""

    def __init__(self, loss_type: str, level: str, **changes: Any):
        names = ("delta", "use_bias_correction_kl")
        args = {"delta": None, "use_bias_correction_kl": False} | {k: v for k, v in changes.items() if k in names}
        sapo = {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}
        self.__dict__ |= {
            "loss_type": loss_type,
            "importance_sampling_level": level,
            "beta": changes["beta"],
            "epsilon_low": 0.2,
            "epsilon_high": 1.3 if loss_type == "cispo" else 0.28,
            "max_completion_length": 9,
            "temperature": TEMPERATURE,
            "use_vllm": changes.get("use_vllm", False),
            "vllm_importance_sampling_correction": True,
            "model": SimpleNamespace(training=False),
            "args": SimpleNamespace(**args | sapo),
            "accelerator": SimpleNamespace(num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x),
            "top_entropy_quantile": 1.0,
            "off_policy_mask_threshold": None,
            "aux_loss_enabled": False,
            "_entropy_bonus_enabled": False,
            "_metrics": defaultdict(lambda: defaultdict(list)),
        }


def wave(*shape: int, step: float) -> Tensor:
    """Make numbers in (-1, 1) without a generator, which another version of torch might change."""
    count = int(torch.tensor(shape).prod())
    return torch.sin(step * torch.arange(1, count + 1, dtype=torch.float64)).reshape(shape)


def data(dtype: torch.dtype, on_policy: bool = False) -> tuple[list[Tensor], dict[str, Any]]:
    """Make hidden states, head and bias, and TRL's inputs of four sequences of 6, 3, 0 and 4 tokens."""
    leaves = [
        2 * wave(BATCH, COLUMNS, HIDDEN, step=1.7),
        wave(VOCABULARY, HIDDEN, step=2.3),
        wave(VOCABULARY, step=0.9),
    ]
    ids = (torch.arange(BATCH * COLUMNS).reshape(BATCH, COLUMNS) * 7) % VOCABULARY
    current = token_logprobs(leaves, ids)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": (torch.arange(COLUMNS) < torch.tensor([6, 3, 0, 4])[:, None]).long(),
        "advantages": torch.tensor([1.2, -0.7, 0.4, -1.5], dtype=dtype),
        "old_per_token_logps": None if on_policy else (current + 0.6 * wave(*ids.shape, step=1.1)).to(dtype),
        "ref_per_token_logps": (current + 0.5 * wave(*ids.shape, step=0.7)).to(dtype),
        "importance_sampling_ratio": (1 + 0.5 * wave(*ids.shape, step=1.3)).to(dtype),
        "num_items_in_batch": torch.tensor(17.0, dtype=dtype),
    }
    return [leaf.to(dtype).requires_grad_() for leaf in leaves], inputs


def token_logprobs(leaves: list[Tensor], ids: Tensor) -> Tensor:
    hidden, head, bias = leaves
    return ((hidden @ head.T + bias) / TEMPERATURE).log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def our_loss(settings: Ours, leaves: list[Tensor], inputs: dict[str, Any]) -> Tensor:
    mask = inputs["completion_mask"]
    rows = {name: None if inputs[name] is None else inputs[name].flatten() for name in inputs if "logps" in name}
    hidden, head, bias = leaves
    return linear_grpo_loss(
        hidden.flatten(0, 1),
        head,
        inputs["completion_ids"].flatten(),
        settings._advantages(mask, inputs).flatten(),
        settings._weights(mask, inputs).flatten().to(hidden.dtype),
        settings._objective(),
        old_logprobs_N=rows["old_per_token_logps"],
        ref_logprobs_N=rows["ref_per_token_logps"] if settings.beta else None,
        cu_seqlens=torch.arange(0, BATCH * COLUMNS + 1, COLUMNS),
        bias_V=bias,
        temperature=TEMPERATURE,
    ).loss


def trl_loss(settings: Ours, leaves: list[Tensor], inputs: dict[str, Any]) -> Tensor:
    """Compute TRL's own arithmetic on log-probs of the same head."""
    trainer = pytest.importorskip("trl", reason="needs trl: pip install 'mgrpo[dev]'").GRPOTrainer
    logprobs = token_logprobs(leaves, inputs["completion_ids"])
    settings.__dict__["_get_per_token_logps_and_entropies"] = lambda *_, **__: (
        logprobs,
        torch.zeros_like(logprobs),
        None,
    )
    loss: Tensor = trainer._compute_loss(settings, None, inputs)
    return loss


def liger_loss(settings: Ours, leaves: list[Tensor], inputs: dict[str, Any]) -> Tensor:
    reason = "needs liger-kernel: pip install 'mgrpo[dev]'"
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason=reason).LigerFusedLinearGRPOLoss
    loss = liger(
        beta=settings.beta,
        compiled=False,
        use_ref_model=settings.beta != 0,
        chunk_size=2,
        epsilon_low=settings.epsilon_low,
        epsilon_high=settings.epsilon_high,
        loss_type=settings.loss_type,
        max_completion_length=settings.max_completion_length,
        importance_sampling_level=settings.importance_sampling_level,
        temperature=TEMPERATURE,
        **vars(settings.args),
    )
    found, _ = loss(
        leaves[0],
        leaves[1],
        inputs["completion_ids"],
        inputs["completion_mask"],
        inputs["advantages"],
        bias=leaves[2],
        ref_per_token_logps=inputs["ref_per_token_logps"] if settings.beta else None,
        old_per_token_logps=inputs["old_per_token_logps"],
        vllm_is_ratio=inputs["importance_sampling_ratio"] if settings.use_vllm else None,
        num_items_in_batch=inputs["num_items_in_batch"],
    )
    return found


def in_liger(loss_type: str, level: str, kl: str, extra: str) -> bool:
    """Compare with Liger.

    Its LUSPO counts masked tokens too, unless a sequence is one term; its CISPO and SAPO are by
    token only.
    """
    if loss_type == "luspo":
        return level == "sequence" and kl == "no KL" and extra != "truncated importance"
    return level == "token" or loss_type not in ("cispo", "sapo")


def assert_same(theirs: Any, loss_type: str, level: str, kl: str, extra: str) -> None:
    """Compare values and gradients in float32."""
    changes = KLS[kl] | EXTRAS[extra]
    found = []
    for loss_of in (our_loss, theirs):
        leaves, inputs = data(torch.float32, changes.get("on_policy", False))
        loss = loss_of(Ours(loss_type, level, **changes), leaves, inputs)
        found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5, msg=f"{kl}, {extra}: {ours} {expected}")
    assert float(found[1][1].abs().max()) > 1e-3


@pytest.mark.parametrize(("loss_type", "level"), VARIANTS)
def test_values_are_the_published_ones(loss_type: str, level: str) -> None:
    leaves, inputs = data(torch.float64)
    found = [float(our_loss(Ours(loss_type, level, **kl), leaves, inputs).detach()) for kl in KLS.values()]
    assert found == pytest.approx(PUBLISHED[loss_type, level], abs=2e-6)


@pytest.mark.parametrize(("loss_type", "level"), VARIANTS)
def test_the_published_values_are_trls(loss_type: str, level: str) -> None:
    leaves, inputs = data(torch.float32)
    found = [float(trl_loss(Ours(loss_type, level, **kl), leaves, inputs).detach()) for kl in KLS.values()]
    assert found == pytest.approx(PUBLISHED[loss_type, level], abs=2e-6)


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize(("loss_type", "level"), VARIANTS)
def test_values_and_gradients_are_trls(loss_type: str, level: str, extra: str) -> None:
    for kl in KLS:
        assert_same(trl_loss, loss_type, level, kl, extra)


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize(("loss_type", "level"), [v for v in VARIANTS if any(in_liger(*v, "no KL", e) for e in EXTRAS)])
def test_values_and_gradients_are_ligers(loss_type: str, level: str, extra: str) -> None:
    shared = [kl for kl in KLS if in_liger(loss_type, level, kl, extra)]
    if not shared:
        pytest.skip("Liger's LUSPO counts masked tokens here")
    for kl in shared:
        assert_same(liger_loss, loss_type, level, kl, extra)
