"""Register our policy loss, advantages and fused log-probs with verl, when this module is loaded.

verl loads it itself if this variable of the environment is set:

    VERL_USE_EXTERNAL_MODULES=mgrpo.engine.integrations.verl

Then `actor.policy_loss.loss_mode` may be "mgrpo" (the ratio of each token, what "vanilla" computes),
"mgrpo_sequence" (what "gspo" computes) or "mgrpo_trajectory" (the product, the paper's literal form, which verl does
not have). `algorithm.adv_estimator` may be "mgrpo". With `model.use_fused_kernels=true` and verl's default backend
"torch", log-probs and entropies come from `mgrpo.kernels.linear_logprob`. verl's own aggregation still decides what a
token counts, in every `loss_agg_mode`, over any number of ranks.

Unlike in verl, a sequence's ratio is differentiated as one number ("gspo" gives each token the slope of its own term,
which is the same unless advantages or rollout weights differ within a sequence). A log-ratio beyond 20 is not clamped,
only clipped. The std of the advantages is that of the population, and a rollout that is alone in its group has
advantage 0. Entropies stay float32.

verl's fused kernels take the head's output for the logits: leave `use_fused_kernels` false for models that multiply or
cap it (Granite, Gemma 2).

Checked against verl 0.9.1. Megatron computes log-probs on another path, which remains verl's.

Legend: B sequences, T columns of the responses; N all tokens of them, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, register_adv_est, register_policy_loss
from verl.utils.experimental.torch_functional import FusedLinearForPPO

from mgrpo.kernels import Objective, group_advantages, linear_logprob, logprob_loss

Importance = Literal["token", "sequence", "trajectory"]


def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
    *,
    importance: Importance = "token",
) -> tuple[Tensor, dict[str, float]]:
    """Return the clipped loss of a micro-batch and its metrics by verl's names; the tensors are (B, T)."""
    mask_BT = response_mask.bool()
    if rollout_is_weights is not None:
        advantages = advantages * rollout_is_weights  # the clipped term is homogeneous in them
    dtype = torch.promote_types(log_prob.dtype, torch.float32)
    rows, columns = mask_BT.shape
    found = logprob_loss(
        log_prob.flatten().to(dtype),
        advantages.flatten(),
        _weights(mask_BT, loss_agg_mode, config, dtype).flatten(),
        _objective(config, importance),
        old_logprobs_N=old_log_prob.flatten(),
        cu_seqlens=torch.arange(0, rows * columns + 1, columns, device=mask_BT.device),
    )
    tokens = mask_BT.sum().clamp(min=1)
    held = found.metrics["clip_low"] + found.metrics["clip_high"]
    moved = ((old_log_prob - log_prob.detach()) * mask_BT).sum()
    return found.loss, {"actor/pg_clipfrac": float(held / tokens), "actor/ppo_kl": float(moved / tokens)}


def _objective(config: Any, importance: Importance) -> Objective:
    """Return the objective of verl's config.

    verl limits the log of a sequence's ratio to 10. For a negative advantage that is a dual_clip of exp(10).
    """
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return Objective(
        clip_low=config.clip_ratio if low is None else low,
        clip_high=config.clip_ratio if high is None else high,
        dual_clip=math.exp(10) if importance == "sequence" else config.get("clip_ratio_c", 3.0),
        importance=importance,
        sampler_cap=None,
    )


def _weights(mask_BT: Tensor, loss_agg_mode: str, config: Any, dtype: torch.dtype) -> Tensor:
    """Return what each token counts: the slope of verl's aggregation, which is linear in the terms; 0 outside."""
    with torch.enable_grad():
        terms_BT = torch.zeros_like(mask_BT, dtype=dtype, requires_grad=True)
        total = agg_loss(terms_BT, mask_BT, loss_agg_mode, **config.global_batch_info)
        (weights_BT,) = torch.autograd.grad(total, terms_BT)
    return torch.where(mask_BT, weights_BT, 0)


def outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, index: np.ndarray, config: Any = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """Return group-relative advantages (B, T) of the summed rewards, twice; index (B,): the query of each sequence."""
    by_std = config is None or config.get("norm_adv_by_std_in_grpo", True)
    groups_B = np.unique(index, return_inverse=True)[1]
    order_B = torch.from_numpy(np.argsort(groups_B, kind="stable")).to(token_level_rewards.device)
    offsets = torch.from_numpy(np.concatenate([[0], np.bincount(groups_B).cumsum()])).to(order_B.device)
    rewards_B = token_level_rewards.detach().sum(-1)
    found_B = group_advantages(rewards_B[order_B], offsets, scale="std" if by_std else "none").values_R
    advantages_BT = torch.empty_like(found_B).index_copy(0, order_B, found_B)[:, None] * response_mask
    return advantages_BT, advantages_BT


def fused_forward(
    self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Replace verl's `FusedLinearForPPO.forward`: (…, H), (V, H), (…) -> log-probs and entropies (…)."""
    if self.impl_backend != "torch":
        found: tuple[Tensor, Tensor] = VERL_FORWARD(self, hidden_states, vocab_weights, input_ids, temperature)
        return found
    hidden_NH, targets_N = hidden_states.flatten(0, -2), input_ids.flatten().long()
    logprobs_N, entropies_N = linear_logprob(hidden_NH, vocab_weights, targets_N, temperature=temperature)
    return logprobs_N.view(input_ids.shape), entropies_N.view(input_ids.shape)


VERL_FORWARD = FusedLinearForPPO.forward
FusedLinearForPPO.forward = fused_forward
register_adv_est("mgrpo")(outcome_advantage)
register_policy_loss("mgrpo")(policy_loss)
register_policy_loss("mgrpo_sequence")(partial(policy_loss, importance="sequence"))
register_policy_loss("mgrpo_trajectory")(partial(policy_loss, importance="trajectory"))
