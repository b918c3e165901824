"""Turn padded batches into flat rows for other trainers: the tokens that run, their places, and a model's forward.

Legend: B sequences, C columns; P rows, H hidden size.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from mgrpo.engine.model.attention import (
    Packed,
    UnsupportedAttentionError,
    hidden_states,
    output_head,
    run_backbone,
)
from mgrpo.engine.model.causal_lm import lay_out
from mgrpo.engine.model.logits import logit_map
from mgrpo.engine.model.probe import with_dropout, without_dropout
from mgrpo.engine.model.routers import balance_loss, coefficient, routers_of

ASKED = "model: output_router_logits = true"  # how a model says that its loss has the balance loss of its routers


class Flat(NamedTuple):
    """Hold some tokens of a padded batch side by side.

    kept (B, C - 1) bool: which tokens; input_ids, targets (the token after each) and positions (P,) int64, columns: in
    the padded batch. balanced: whether the routers' balance loss of these tokens is asked for.
    """

    kept: Tensor
    input_ids: Tensor
    targets: Tensor
    positions: Tensor
    columns: Tensor
    layout: Packed
    balanced: bool = False

    def take(self, values_BC: Tensor) -> Tensor:
        """Return (P,) of the values at the predicted tokens."""
        return values_BC[:, 1:][self.kept]

    def put(self, values_P: Tensor, columns: int) -> Tensor:
        """Return (B, columns) with the values at the predicted tokens of the last columns, and 0 elsewhere."""
        return values_P.new_zeros(self.kept.shape).masked_scatter(self.kept, values_P)[:, -columns:]


def flatten(input_ids_BC: Tensor, valid_BC: Tensor, action_BC: Tensor) -> Flat:
    """Return the tokens that are followed by some action, as rows.

    valid_BC and action_BC are bool, C > 1; the valid tokens of a sequence lie together. Without any action, one token
    of the first sequence is returned, because something must run.
    """
    follows_BC = action_BC.flip(1).cummax(1).values.flip(1)
    kept = valid_BC[:, :-1] & follows_BC[:, 1:]
    if not kept.any():
        kept[0, min(int(valid_BC[0].int().argmax()), kept.shape[1] - 1)] = True
    lengths_B = kept.sum(1)
    lengths_B = lengths_B[lengths_B > 0]
    ends_B = lengths_B.cumsum(0)
    positions = torch.arange(int(ends_B[-1]), device=kept.device) - (ends_B - lengths_B).repeat_interleave(lengths_B)
    cu_seqlens = torch.nn.functional.pad(ends_B, (1, 0)).int()
    layout = Packed(cu_seqlens, int(lengths_B.max()))
    columns = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)[kept]
    return Flat(kept, input_ids_BC[:, :-1][kept], input_ids_BC[:, 1:][kept], positions, columns, layout)


def run_flat(model: PreTrainedModel) -> None:
    """Give a model's forward a second form: model(flat=…, work=…) -> work(hidden, head's weight, its bias, softcap).

    hidden: (P, H). softcap: the bound of the logits, None if the model does not cap them (see `mgrpo.kernels`).
    The second form is part of the forward because a wrapper, such as DistributedDataParallel, has the model's weights
    ready there. Dropout is kept: what it draws for a token does not depend on where the token stands. Raises ValueError
    as `lay_out` does, and for dropout in attention, which is drawn for pairs of tokens.
    """
    dropout = without_dropout(model)
    try:
        with _without_autocast(model):
            lay_out(model)
            by_column = _counts_padding(model)
    finally:
        with_dropout(dropout)
    if any(value for _, _, value in dropout):
        _refuse_attention_dropout(model)
    forward = model.forward

    def either(self: PreTrainedModel, *args: Any, flat: Flat | None = None, work: Any = None, **kwargs: Any) -> Any:
        if flat is None:
            return forward(*args, **kwargs)
        if by_column:
            flat = flat._replace(positions=flat.columns)
        if flat.balanced:
            return _with_balance_loss(self, flat, work)
        return work(*_head_inputs(self, hidden_states(self, flat.input_ids, flat.positions, flat.layout)))

    either.__wrapped__ = type(model).forward  # type: ignore[attr-defined]  # trainers read its signature
    model.forward = types.MethodType(either, model)


@torch.no_grad()
def _counts_padding(model: PreTrainedModel) -> bool:
    """Return whether padding before a text changes its tokens' logits: learned positions are then those of the columns.

    With RoPE nothing depends on where a text begins; other models, such as OPT, count the tokens that the mask shows.
    """
    if getattr(model.config.get_text_config(), "rope_parameters", None):
        return False
    text, pads = torch.tensor([[1, 2, 3, 4]], device=model.device), 3
    padded, mask = F.pad(text, (pads, 0), value=1), F.pad(torch.ones_like(text), (pads, 0))
    alone = type(model).forward(model, input_ids=text, use_cache=False).logits
    behind = type(model).forward(model, input_ids=padded, attention_mask=mask, use_cache=False).logits[:, pads:]
    return not torch.allclose(alone, behind, rtol=1e-2, atol=1e-2 * float(alone.abs().max()))


def causal_lm(model: Any) -> PreTrainedModel:
    """Return the model itself, or that inside the wrapper of peft's adapters, whose forward calls it.

    Raises ValueError for an adapter that adds tokens of its own to a text.
    """
    if not hasattr(model, "get_base_model"):
        whole: PreTrainedModel = model
        return whole
    if model.active_peft_config.is_prompt_learning:
        kind = model.active_peft_config.peft_type
        raise ValueError(
            f"model: an adapter of kind {kind} given: expected one without tokens of its own, such as LoRA"
        )
    inside: PreTrainedModel = model.get_base_model()
    return inside


@torch.no_grad()
def _refuse_attention_dropout(model: PreTrainedModel) -> None:
    """Raise ValueError if the model's attention has dropout in training."""
    before = [(module, module.training) for module in model.modules()]
    ids = torch.zeros(2, dtype=torch.int64, device=model.device)
    layout = Packed(torch.tensor([0, 2], dtype=torch.int32, device=model.device), 2)
    model.train()
    try:
        with _untouched(model.device), _without_autocast(model):
            hidden_states(model, ids, torch.arange(2, device=model.device), layout)
    except UnsupportedAttentionError as error:
        raise ValueError(
            f"model: {type(model).__name__} {error}: expected none over flat rows, set it to 0 in the model's config; "
            "other dropout is kept"
        ) from error
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def _untouched(device: torch.device) -> Iterator[None]:
    """Leave random numbers as they are, and say nothing of checkpoints without a gradient."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _head_inputs(model: PreTrainedModel, hidden_PH: Tensor) -> tuple[Tensor, Tensor, Tensor | None, float | None]:
    """Return what the model's logits are made of: hidden states, the head's weight, its bias, the logits' bound."""
    head = output_head(model)
    found = logit_map(model)
    scale = found.scale  # the model scales its logits: scaling the head's input and bias, and the bound, is the same
    softcap = None if found.softcap is None else found.softcap * scale
    bias_V = head.bias if head.bias is None or scale == 1 else head.bias * scale
    hidden_PH = hidden_PH if scale == 1 else hidden_PH * scale
    return hidden_PH.to(head.weight.dtype), head.weight, bias_V, softcap


def asks_for_balance(model: PreTrainedModel) -> bool:
    """Return whether a mixture of experts adds the balance loss of its routers to the loss that it returns.

    Raises ValueError as `routers_of` does if it does, and the loss is not computed here.
    """
    asked = bool(getattr(model.config.get_text_config(), "output_router_logits", False))
    if asked:
        routers_of(model, ASKED)
    return asked


def _with_balance_loss(model: PreTrainedModel, flat: Flat, work: Callable[..., Tensor]) -> Tensor:
    """Return the loss that `work` gives plus the routers' balance loss, which the model's own forward adds to it."""
    out = run_backbone(model, flat.input_ids, flat.positions, flat.layout, output_router_logits=True)
    loss = work(*_head_inputs(model, out.last_hidden_state[0]))
    ones_P = torch.ones_like(flat.input_ids, dtype=torch.bool)
    return loss + coefficient(model) * balance_loss(out.router_logits, routers_of(model, ASKED), ones_P)


@contextmanager
def _without_autocast(model: PreTrainedModel) -> Iterator[None]:
    """Take off the autocast that accelerate has put around a prepared model's forward, for the check at start."""
    forward, own = model.forward, vars(model).get("_original_forward")
    if own is None:
        yield
        return
    model.forward = own
    try:
        yield
    finally:
        model.forward = forward
