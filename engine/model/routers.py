"""Balance the routers of a mixture of experts by the auxiliary loss that transformers computes for such models.

The loss is E * sum_e f_e * P_e (Switch Transformer, arXiv 2101.03961, Eqs. 4-6): f_e is how often a token was sent to
expert e, P_e the probability that its router gave to e, both averaged over all tokens and over all layers that have a
router. Only P has a gradient. A product of two averages is not the sum of those of its parts, so the loss of a step is
that of all its tokens together: f is counted over all micro-batches first (`Usage`), and each then adds its share of P.

Legend: P rows of a micro-batch, E experts.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

FUNCTION = "load_balancing_loss_func"  # of the modules of transformers that have such a loss
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")  # attributes of a model: what its own forward multiplies by
Logits = Sequence[Tensor]  # of each layer with a router, (P, E)


class Routers(NamedTuple):
    """Describe a model's routers: how many experts there are, and to how many each token is sent."""

    experts: int
    chosen: int


class Usage(NamedTuple):
    """Count over layers and tokens how often each expert was chosen, and the number of choices: (E,) and 0-dim."""

    times_E: Tensor
    rows: Tensor


def routers_of(model: PreTrainedModel, given: str) -> Routers:
    """Return a model's routers.

    given: what asks for their balance loss, for the error. Raises ValueError if the model has no routers, or if
    transformers computes no balance loss for them, or another than the one above.
    """
    kind, classes = type(model).__name__, type(model).__mro__
    forward_of = next(each for each in classes if "forward" in vars(each))  # a subclass may have one of its own
    its_own = getattr(sys.modules[forward_of.__module__], FUNCTION, None)
    if its_own is None:
        why = "which has no routers, or none that transformers balances"
        raise ValueError(f"{given} given: expected no balance loss of {kind}, {why}")
    text = model.config.get_text_config()
    experts, chosen = (getattr(model, name, getattr(text, name, 0)) for name in ("num_experts", "num_experts_per_tok"))
    if not (isinstance(experts, int) and isinstance(chosen, int) and 0 < chosen <= experts):
        raise ValueError(f"{given} given: expected no balance loss of {kind}, whose config has {experts!r} experts")
    routers = Routers(experts, chosen)
    if not _agrees(its_own, routers):
        raise ValueError(f"{given} given: expected no balance loss of {kind}, as its own is another than Switch's")
    return routers


@torch.no_grad()
def _agrees(its_own: Any, routers: Routers) -> bool:
    """Return whether a model's own function is the loss above, on random logits."""
    if list(inspect.signature(its_own).parameters)[:3] != ["gate_logits", "num_experts", "top_k"]:
        return False
    generator = torch.Generator().manual_seed(0)
    logits = tuple(torch.randn(5, routers.experts, generator=generator, dtype=torch.float64) for _ in range(2))
    found = its_own(logits, routers.experts, routers.chosen)
    return bool(torch.isclose(balance_loss(logits, routers, torch.ones(5)), found.double(), rtol=1e-5))


def coefficient(model: PreTrainedModel) -> float:
    """Return by what the model's own forward multiplies the balance loss that it adds."""
    return float(next(getattr(model, name) for name in COEFFICIENTS if hasattr(model, name)))


def usage(logits: Logits, routers: Routers, counted_P: Tensor) -> Usage:
    """Count the choices of the tokens where counted_P, (P,) of 0 and 1, is 1. Raises ValueError for other logits."""
    rows = counted_P.sum(dtype=torch.float64) * len(logits)
    times_E = torch.zeros(routers.experts, dtype=torch.float64, device=rows.device)
    for layer in logits:
        if layer.numel() != len(counted_P) * routers.experts:
            given, expected = tuple(layer.shape), (len(counted_P), routers.experts)
            raise ValueError(f"model: a router with logits {given} given: expected {expected}")
        chosen = layer.detach().reshape(-1, routers.experts).topk(routers.chosen).indices
        weights = counted_P.to(times_E)[:, None].expand_as(chosen)
        times_E = times_E.index_add(0, chosen.flatten(), weights.flatten())
    return Usage(times_E, rows)


def balance_loss(logits: Logits, routers: Routers, counted_P: Tensor, whole: Usage | None = None) -> Tensor:
    """Return the share of some tokens in the balance loss, float32 or wider, differentiable in their routers' logits.

    counted_P: as in `usage`. whole: of all tokens of the step; None: these are all. Raises ValueError if no layer has a
    router, or one has other experts.
    """
    if not logits:
        raise ValueError("model: no layer with a router given: expected one, as its balance loss is asked for")
    times_E, rows = whole or usage(logits, routers, counted_P)
    dtype = torch.promote_types(logits[0].dtype, torch.float32)
    share_E = (times_E / rows.clamp(min=1) ** 2 * routers.experts).to(dtype)
    probs = (layer.reshape(-1, routers.experts).to(dtype).softmax(-1) for layer in logits)
    return torch.stack([counted_P.to(dtype) @ probs_PE @ share_E for probs_PE in probs]).sum()
