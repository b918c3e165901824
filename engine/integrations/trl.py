"""Put our loss under the step of TRL's `GRPOTrainer`: class MyTrainer(FusedGRPO, GRPOTrainer), all else unchanged.

TRL's step runs padded rows through the model, keeps a log-prob and an entropy of every completion token for autograd,
and computes the loss from them. Here the tokens of a micro-batch lie side by side without padding. The tokens after a
sequence's last action, and without a KL term also sequences of advantage 0, never enter the model. Loss and gradient
are computed together (`mgrpo.kernels.linear_grpo_loss`). Both are TRL's, up to rounding.

Unlike TRL, it logs only means of "entropy", "clip_ratio/…" and "kl" (without the correcting ratio), over the rows that
were computed, each counting once; it logs neither the minimum and maximum of a sequence nor CISPO's clip. What one pass
over rows cannot compute (`_is_ours`), TRL computes as usual, from our packed log-probs.

Checked against trl 1.16, in one process and under DistributedDataParallel, in float32 and under bfloat16's autocast.
Adapters of PEFT, but for those on the LM head (refused), are trained too. Models that a sharding strategy has wrapped
are not supported. Dropout is kept, with other random numbers, but in attention it is refused.

Legend: B sequences, T columns of the completions; P rows, L live rows, S their sequences, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from mgrpo.engine.integrations.flat import Flat, causal_lm, flatten, run_flat
from mgrpo.kernels import Loss, Objective, Rule, RuleRows, linear_grpo_loss, linear_logprob

Result = TypeVar("Result")
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


class FusedGRPO:
    """Mix this in before `GRPOTrainer`. Raises ValueError for a model that cannot run over flat rows."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for model in (self._trl.model, self._trl.ref_model):
            if model is not None:
                run_flat(causal_lm(self._trl.accelerator.unwrap_model(model)))

    @property
    def _trl(self) -> Any:
        """Return self, without types for what TRL defines."""
        return self

    def _is_ours(self, inputs: dict[str, Any]) -> bool:
        """Return whether the fused loss can do what TRL's options ask for."""
        t = self._trl
        return (
            t.loss_type in (*CLIPPED, "cispo", "sapo")
            and "pixel_values" not in inputs
            and t.off_policy_mask_threshold is None
            and t.top_entropy_quantile == 1.0
            and not (t._entropy_bonus_enabled or t.aux_loss_enabled)
            and (t.args.delta is None or t.args.delta >= 1 + t.epsilon_high)
        )

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if not self._is_ours(inputs):
            loss: Tensor = super()._compute_loss(model, inputs)  # type: ignore[misc]
            return loss
        input_ids_BC, valid_BC, mask_BT = _joined(inputs)
        weights_BT = self._weights(mask_BT, inputs)
        advantages_BT = self._advantages(mask_BT, inputs)
        objective = self._objective()
        action_BC = _behind(valid_BC, _counted(mask_BT.bool(), advantages_BT, objective))
        flat = flatten(input_ids_BC, valid_BC, action_BC)
        found: Loss = self._run(model, flat, self._work(flat, objective, inputs, weights_BT, advantages_BT))
        self._log_metrics(found)
        return found.loss

    def _work(
        self, flat: Flat, objective: Objective, inputs: dict[str, Any], weights_BT: Tensor, advantages_BT: Tensor
    ) -> Callable[..., Loss]:
        def row(values_BT: Tensor | None) -> Tensor | None:
            return None if values_BT is None else flat.take(_behind(flat.kept, values_BT, 1))

        def work(hidden_PH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, softcap: float | None) -> Loss:
            return linear_grpo_loss(
                hidden_PH,
                weight_VH,
                flat.targets,
                flat.take(_behind(flat.kept, advantages_BT, 1)),
                flat.take(_behind(flat.kept, weights_BT, 1)),
                objective,
                old_logprobs_N=row(inputs.get("old_per_token_logps")),
                ref_logprobs_N=row(inputs.get("ref_per_token_logps")) if objective.kl_coef else None,
                cu_seqlens=flat.layout.cu_seqlens,
                bias_V=bias_V,
                temperature=self._trl.temperature,
                softcap=softcap,
            )

        return work

    def _objective(self) -> Objective:
        t = self._trl
        return Objective(
            clip_low=t.epsilon_low,
            clip_high=t.epsilon_high,
            dual_clip=t.args.delta,
            importance=t.importance_sampling_level,
            kl_coef=t.beta,
            kl="k3",
            sampler_cap=None,
            rule=self._rule(),
        )

    def _rule(self) -> Rule | None:
        """Return the term of a row as a rule, or None if it is the clipped one with a plain KL."""
        t = self._trl
        corrected = bool(t.beta and t.args.use_bias_correction_kl)
        if t.loss_type in CLIPPED and not corrected:
            return None

        def rule(rows: RuleRows, objective: Objective) -> Tensor:
            ratio_L = _ratio(rows, objective.importance == "sequence")
            terms_L = -self._gain(ratio_L, rows)
            if not t.beta:
                return terms_L
            assert rows.ref is not None
            behind_L = rows.ref - rows.logprobs
            kl_L = behind_L.exp() - behind_L - 1
            return terms_L + t.beta * kl_L * (ratio_L if corrected else 1)

        return rule

    def _gain(self, ratio_L: Tensor, rows: RuleRows) -> Tensor:
        """Return the gain of each row by CISPO (arXiv 2506.13585), SAPO (arXiv 2511.20347) or the clipped surrogate."""
        t, advantages_L = self._trl, rows.advantages
        if t.loss_type == "cispo":
            return ratio_L.clamp(max=t.epsilon_high).detach() * advantages_L * rows.logprobs
        if t.loss_type == "sapo":
            heat_L = torch.where(advantages_L > 0, t.args.sapo_temperature_pos, t.args.sapo_temperature_neg)
            return torch.sigmoid(heat_L * (ratio_L - 1)) * 4 / heat_L * advantages_L
        held_L = ratio_L.clamp(1 - t.epsilon_low, 1 + t.epsilon_high)
        return torch.minimum(ratio_L.clamp(max=t.args.delta or torch.inf) * advantages_L, held_L * advantages_L)

    def _weights(self, mask_BT: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Return what each token counts in the loss, every denominator included."""
        t = self._trl
        training = t.model.training
        if t.loss_type in ("dapo", "cispo"):
            count = inputs["num_items_in_batch"].clamp(min=1.0) / t.accelerator.num_processes
            if training:  # the count is of the generation batch, and a step sees a part of it
                count = count * t.current_gradient_accumulation_steps / t.args.steps_per_generation
            return mask_BT / count
        of_sequence = mask_BT.sum(1, keepdim=True).clamp(min=1) * len(mask_BT)
        count = {
            "grpo": of_sequence,
            "sapo": of_sequence,
            "bnpo": mask_BT.sum().clamp(min=1),
            "dr_grpo": len(mask_BT) * t.max_completion_length,
            "luspo": len(mask_BT),
        }[t.loss_type]
        return mask_BT / (count * (t.current_gradient_accumulation_steps if training else 1))

    def _advantages(self, mask_BT: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Return each token's advantage times the weight that corrects the sampler's rounding.

        The clipped term is homogeneous in the advantage, so that the weight may be part of it.
        """
        advantages = inputs["advantages"]
        advantages_BT = (advantages[:, None] if advantages.ndim == 1 else advantages).expand(mask_BT.shape)
        if self._trl.use_vllm and self._trl.vllm_importance_sampling_correction:
            advantages_BT = advantages_BT * inputs["importance_sampling_ratio"]
        return advantages_BT

    def _run(self, model: Any, flat: Flat, work: Callable[..., Result]) -> Result:
        if self._trl.args.cast_lm_head_to_fp32:
            work = _in_float32(work)
        with self._trl.accelerator.autocast():
            found: Result = model(flat=flat, work=work)
        return found

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **rest: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return (B, logits_to_keep) log-probs, and entropies if asked, from flat rows; 0 at padding."""
        if compute_aux_loss or any(value is not None for value in rest.values()):
            return super()._get_per_token_logps_and_entropies(  # type: ignore[misc]
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **rest,
            )
        size = batch_size or len(input_ids)
        parts = [
            self._rows(model, ids_BC, valid_BC.bool(), logits_to_keep)
            for ids_BC, valid_BC in zip(input_ids.split(size), attention_mask.split(size), strict=True)
        ]
        logprobs_BT, entropies_BT = (torch.cat(columns) for columns in zip(*parts, strict=True))
        return logprobs_BT, entropies_BT if compute_entropy else None, None

    def _rows(self, model: Any, input_ids_BC: Tensor, valid_BC: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        action_BC = valid_BC.clone()
        action_BC[:, :-keep] = False
        flat = flatten(input_ids_BC, valid_BC, action_BC)
        live_P = flat.take(action_BC)

        def work(
            hidden_PH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, softcap: float | None
        ) -> tuple[Tensor, Tensor]:
            return linear_logprob(
                hidden_PH[live_P],
                weight_VH,
                flat.targets[live_P],
                bias_V=bias_V,
                temperature=self._trl.temperature,
                softcap=softcap,
            )

        found = self._run(model, flat, work)
        whole = (values_L.new_zeros(len(live_P)).masked_scatter(live_P, values_L) for values_L in found)
        logprobs_BT, entropies_BT = (flat.put(values_P, keep) for values_P in whole)
        return logprobs_BT, entropies_BT

    def _log_metrics(self, found: Loss) -> None:
        """Log means over the rows of all processes, by TRL's names."""
        t = self._trl
        names = {"entropy_sum": "entropy"} | ({"kl_sum": "kl"} if t.beta else {})
        if t.loss_type in CLIPPED:
            names |= {"clip_low": "clip_ratio/low_mean", "clip_high": "clip_ratio/high_mean"}
        sums = torch.stack([found.metrics[name] for name in ("rows", *names)])
        rows, *totals = t.accelerator.reduce(sums, reduction="sum").tolist()
        if not rows:
            return
        log = t._metrics["train" if t.model.training else "eval"]
        means = {name: total / rows for name, total in zip(names.values(), totals, strict=True)}
        if t.loss_type in CLIPPED:
            means["clip_ratio/region_mean"] = means["clip_ratio/low_mean"] + means["clip_ratio/high_mean"]
        for name, mean in means.items():
            log[name].append(mean)


def _in_float32(work: Callable[..., Result]) -> Callable[..., Result]:
    """Return `work` without autocast: hidden states come in the dtype of the head, which TRL has made float32."""

    def wide(hidden_PH: Tensor, *head: Any) -> Result:
        with torch.autocast(hidden_PH.device.type, enabled=False):
            return work(hidden_PH, *head)

    return wide


def _ratio(rows: RuleRows, of_sequence: bool) -> Tensor:
    """Return exp of the log-prob's gain, or of the mean gain over the sequence."""
    gained_L = rows.logprobs - rows.old
    if not of_sequence:
        return gained_L.exp()
    assert rows.segments is not None
    zeros_S = gained_L.new_zeros(rows.sequences)
    total_S = zeros_S.index_add(0, rows.segments, gained_L)
    count_S = zeros_S.index_add(0, rows.segments, torch.ones_like(gained_L))
    return (total_S / count_S.clamp(min=1))[rows.segments].exp()


def _counted(mask_BT: Tensor, advantages_BT: Tensor, objective: Objective) -> Tensor:
    """Return the actions that the loss depends on: those with an advantage, or that share the ratio of one with it."""
    if objective.needs_every_row:
        return mask_BT
    useful_BT = mask_BT & (advantages_BT != 0)
    return useful_BT if objective.importance == "token" else mask_BT & useful_BT.any(1, keepdim=True)


def _joined(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens (B, C), which of them are not padding (B, C), and which completion tokens are actions (B, T)."""
    input_ids_BC = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    valid_BC = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1).bool()
    mask_BT = inputs["completion_mask"]
    return input_ids_BC, valid_BC, mask_BT * inputs["tool_mask"] if "tool_mask" in inputs else mask_BT


def _behind(whole: Tensor, values_BT: Tensor, missing: int = 0) -> Tensor:
    """Return (B, columns of `whole` + missing): zeros, and then the values in the last columns."""
    columns = whole.shape[1] + missing - values_BT.shape[1]
    return torch.nn.functional.pad(values_BT, (columns, 0))
