"""Padded batches as flat rows, for the trainers of others: which tokens run, where they stand, and a model's forward.

Legend: B sequences, C columns; P rows, H hidden size.
"""

from __future__ import annotations

import types
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mgrpo.engine.model.attention import Packed, hidden_states
from mgrpo.engine.model.causal_lm import lay_out


class Flat(NamedTuple):
    """Some tokens of a padded batch side by side. kept (B, C - 1): which; targets: the token after each."""

    kept: Tensor
    input_ids: Tensor
    targets: Tensor
    positions: Tensor
    layout: Packed

    def take(self, values_BC: Tensor) -> Tensor:
        """(P,) of values that stand at the tokens that are predicted."""
        return values_BC[:, 1:][self.kept]

    def put(self, values_P: Tensor, columns: int) -> Tensor:
        """(B, columns): where the predicted tokens stand, for the last columns; 0 elsewhere."""
        return values_P.new_zeros(self.kept.shape).masked_scatter(self.kept, values_P)[:, -columns:]


def flatten(input_ids_BC: Tensor, valid_BC: Tensor, action_BC: Tensor) -> Flat:
    """The tokens that some action follows, as rows. valid, action (B, C) bool, C > 1; the valid of a sequence together.

    Without any action one token of the first sequence: something must run.
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

    In its forward, and not beside it, because there whoever has wrapped it has its weights at hand.
    """
    lay_out(model)
    forward = model.forward

    def either(self: PreTrainedModel, *args: Any, flat: Flat | None = None, work: Any = None, **kwargs: Any) -> Any:
        if flat is None:
            return forward(*args, **kwargs)
        head = self.get_output_embeddings()
        hidden_PH = hidden_states(self, flat.input_ids, flat.positions, flat.layout)
        return work(hidden_PH.to(head.weight.dtype), head.weight, head.bias)

    either.__wrapped__ = type(model).forward  # type: ignore[attr-defined]  # whose signature trainers look at
    model.forward = types.MethodType(either, model)
