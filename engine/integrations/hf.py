"""Put our cross-entropy under the step of transformers' `Trainer`: class MyTrainer(Fused, Trainer), for causal LMs.

The model runs on tokens side by side, without padding and without the tokens after a sequence's last label. The head
runs on the tokens with a label, and no logits are kept. Losses and gradients are the Trainer's, up to rounding.

The gradient is computed as that of the policy loss with advantage 1 at ratio 1, in the forward, with three matmuls
(`mgrpo.kernels.linear_grpo_loss`). The Trainer itself computes what needs logits (`_is_ours`): requested outputs, label
smoothing, a loss function of the user's, inputs other than tokens, and labels that padding predicts.

A mixture of experts with output_router_logits keeps the balance loss of its routers, over all tokens of a micro-batch
that are not padding. Dropout is kept, with other random numbers, but in attention it is refused.

Checked against transformers 5, in one process, in float32 and under bfloat16's autocast. Adapters of PEFT, but for
those on the LM head (refused), are trained too. Models that a sharding strategy has wrapped are not supported.

Legend: B sequences, C columns; P rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mgrpo.engine.integrations.flat import Flat, asks_for_balance, causal_lm, flatten, run_flat
from mgrpo.kernels import Objective, linear_grpo_loss

NO_LABEL = -100
INPUTS = {"input_ids", "attention_mask", "labels"}


class Fused:
    """Mix this in before `Trainer`. Raises ValueError for a model that cannot run over flat rows."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        model = causal_lm(self._hf.accelerator.unwrap_model(self._hf.model))
        asks_for_balance(model)  # raises now if it asks for what is not computed here
        run_flat(model)

    @property
    def _hf(self) -> Any:
        """Return self, without types for what the Trainer defines."""
        return self

    def _is_ours(self, inputs: dict[str, Any], return_outputs: bool) -> bool:
        """Return whether only the plain loss is asked for, of labels that follow a token."""
        plain = self._hf.label_smoother is None and self._hf.compute_loss_func is None
        plain = plain and not return_outputs and {"input_ids", "labels"} <= inputs.keys() <= INPUTS
        return plain and _has_plain_padding(inputs["labels"], inputs.get("attention_mask"))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean cross-entropy of the labels; for other losses, return what the Trainer computes."""
        if not self._is_ours(inputs, return_outputs):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        balanced = asks_for_balance(causal_lm(self._hf.accelerator.unwrap_model(model)))
        flat, targets_P = _rows(inputs, balanced)
        counted_P = (targets_P != NO_LABEL).float()
        weights_P = counted_P / (counted_P.sum() if num_items_in_batch is None else num_items_in_batch)

        def work(hidden_PH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, softcap: float | None) -> Tensor:
            ones_P, objective = torch.ones_like(weights_P), Objective(sampler_cap=None)
            found = linear_grpo_loss(
                hidden_PH, weight_VH, targets_P, ones_P, weights_P, objective, bias_V=bias_V, softcap=softcap
            )
            entropy = -(weights_P * found.logprobs_N).sum()
            return found.loss + (entropy - found.loss).detach()

        with self._hf.accelerator.autocast():
            loss = model(flat=flat, work=work)
        if num_items_in_batch is None or not self._hf.args.average_tokens_across_devices:
            return loss
        # The count is that of all processes, and the Trainer averages their losses.
        return loss * self._hf.accelerator.num_processes


def _has_plain_padding(labels_BC: Tensor, mask_BC: Tensor | None) -> bool:
    """Return whether a sequence's tokens lie together and padding predicts no label, as it does before the first."""
    if mask_BC is None:
        return True
    if mask_BC.shape != labels_BC.shape:
        return False
    before_BC, after_BC = mask_BC[:, :-1].bool(), mask_BC[:, 1:].bool()
    pieces_B = mask_BC[:, 0].bool() + (after_BC & ~before_BC).sum(1)
    return not bool((pieces_B > 1).any() | ((labels_BC[:, 1:] != NO_LABEL) & ~before_BC).any())


def _rows(inputs: dict[str, Any], balanced: bool) -> tuple[Flat, Tensor]:
    """Return the tokens to run and the label after each; for a balance loss these are all that are not padding."""
    input_ids_BC, labels_BC = inputs["input_ids"], inputs["labels"]
    valid_BC = inputs.get("attention_mask", torch.ones_like(labels_BC)).bool()
    action_BC = labels_BC != NO_LABEL
    if balanced:  # a column behind the last, of which everything counts as followed
        input_ids_BC, valid_BC = F.pad(input_ids_BC, (0, 1)), F.pad(valid_BC, (0, 1))
        labels_BC, action_BC = F.pad(labels_BC, (0, 1), value=NO_LABEL), F.pad(action_BC, (0, 1), value=True)
    flat = flatten(input_ids_BC, valid_BC, action_BC)._replace(balanced=balanced)
    return flat, flat.take(labels_BC)
