"""Put our cross-entropy under the step of transformers' `Trainer`: class MyTrainer(Fused, Trainer), for causal LMs.

The model runs on tokens side by side, without padding and without the tokens after a sequence's last label. The head
runs on the tokens with a label, and no logits are kept. Losses and gradients are the Trainer's, up to rounding.

The gradient is computed as that of the policy loss with advantage 1 at ratio 1, in the forward, with three matmuls
(`mgrpo.kernels.linear_grpo_loss`). The Trainer itself computes what needs logits (`_is_ours`): requested outputs, label
smoothing, a loss function of the user's, and inputs other than tokens.

Checked against transformers 5, in one process. Models that PEFT or a sharding strategy has wrapped are not supported.

Legend: B sequences, C columns; P rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mgrpo.engine.integrations.flat import flatten, run_flat
from mgrpo.kernels import Objective, linear_grpo_loss

NO_LABEL = -100
INPUTS = {"input_ids", "attention_mask", "labels"}


class Fused:
    """Mix this in before `Trainer`. Raises ValueError for a model that cannot run over flat rows."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        run_flat(self._hf.accelerator.unwrap_model(self._hf.model))

    @property
    def _hf(self) -> Any:
        """Return self, without types for what the Trainer defines."""
        return self

    def _is_ours(self, inputs: dict[str, Any], return_outputs: bool) -> bool:
        """Return whether only the plain loss is asked for."""
        plain = self._hf.label_smoother is None and self._hf.compute_loss_func is None
        return plain and not return_outputs and {"input_ids", "labels"} <= inputs.keys() <= INPUTS

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean cross-entropy of the labels, or whatever the Trainer computes if it is not plain."""
        if not self._is_ours(inputs, return_outputs):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        labels_BC = inputs["labels"]
        valid_BC = inputs.get("attention_mask", torch.ones_like(labels_BC)).bool()
        flat = flatten(inputs["input_ids"], valid_BC, labels_BC != NO_LABEL)
        targets_P = flat.take(labels_BC)
        counted_P = (targets_P != NO_LABEL).float()
        weights_P = counted_P / (counted_P.sum() if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self._hf.args.average_tokens_across_devices:
            # The count is that of all processes, and the Trainer averages their losses.
            weights_P = weights_P * self._hf.accelerator.num_processes

        def work(hidden_PH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
            ones_P, objective = torch.ones_like(weights_P), Objective(sampler_cap=None)
            found = linear_grpo_loss(hidden_PH, weight_VH, targets_P, ones_P, weights_P, objective, bias_V=bias_V)
            entropy = -(weights_P * found.logprobs_N).sum()
            return found.loss + (entropy - found.loss).detach()

        with self._hf.accelerator.autocast():
            return model(flat=flat, work=work)
