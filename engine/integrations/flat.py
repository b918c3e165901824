"""Turn padded batches into flat rows for other trainers: the tokens that run, their places, and a model's forward.

Legend: B sequences, C columns; P rows, H hidden size.
"""

from __future__ import annotations

import types
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mgrpo.engine.model.attention import Packed, hidden_states, output_head
from mgrpo.engine.model.causal_lm import lay_out, logit_scale


class Flat(NamedTuple):
    """Hold some tokens of a padded batch side by side.

    kept (B, C - 1) bool: which tokens; input_ids, targets (the token after each) and positions (P,) int64.
    """

    kept: Tensor
    input_ids: Tensor
    targets: Tensor
    positions: Tensor
    layout: Packed

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
    return Flat(kept, input_ids_BC[:, :-1][kept], input_ids_BC[:, 1:][kept], positions, layout)


def run_flat(model: PreTrainedModel) -> None:
    """Give a model's forward a second form: model(flat=…, work=…) -> work(hidden (P, H), the head's weight, its bias).

    The second form is part of the forward because a wrapper, such as DistributedDataParallel, has the model's weights
    ready there. Raises ValueError as `lay_out` does.
    """
    lay_out(model)
    forward = model.forward

    def either(self: PreTrainedModel, *args: Any, flat: Flat | None = None, work: Any = None, **kwargs: Any) -> Any:
        if flat is None:
            return forward(*args, **kwargs)
        head = output_head(self)
        hidden_PH = hidden_states(self, flat.input_ids, flat.positions, flat.layout)
        scale = logit_scale(self)  # of what the head gives: its input and bias times the factor give the same
        bias_V = head.bias if head.bias is None or scale == 1 else head.bias * scale
        hidden_PH = hidden_PH if scale == 1 else hidden_PH * scale
        return work(hidden_PH.to(head.weight.dtype), head.weight, bias_V)

    either.__wrapped__ = type(model).forward  # type: ignore[attr-defined]  # trainers read its signature
    model.forward = types.MethodType(either, model)
