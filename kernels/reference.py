"""Define each quantity as the paper writes it, on whole (N x V) logits, with plain autograd.

These functions are slow, literal and independent of the fast path; the tests compare it with them in float64.

Legend: N rows, H hidden, V vocabulary, S sequences.
"""

import math

import torch
from torch import Tensor

from .objective import Objective


def token_logprob_ref(
    logits_NV: Tensor, targets_N: Tensor, temperature: float | Tensor = 1.0, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return log p(target) and the entropy of each row of softmax(logits / temperature), the logits capped first."""
    scaled_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    if softcap is not None:
        scaled_NV = softcap * torch.tanh(scaled_NV / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(scaled_NV.dtype).reshape(-1, 1)
    logp_NV = torch.log_softmax(scaled_NV / temperature, dim=-1)
    return logp_NV.gather(1, targets_N[:, None])[:, 0], -(logp_NV.exp() * logp_NV).sum(-1)


def log_ratio_ref(
    logprobs_N: Tensor, old_N: Tensor, weights_N: Tensor, cu_seqlens: Tensor | None, importance: str
) -> Tensor:
    """Return the log of each row's importance ratio; a shared one is over the sequence's rows of non-zero weight."""
    difference_N = logprobs_N - old_N
    if importance == "token":
        return difference_N
    assert cu_seqlens is not None
    shared = []
    for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        counted = difference_N[start:stop][weights_N[start:stop] != 0]
        value = counted.sum() / (max(1, len(counted)) if importance == "sequence" else 1)
        shared.append(value.expand(stop - start))
    return torch.cat(shared) if shared else difference_N


def held_ref(values_N: Tensor, low: Tensor | float, high: Tensor | float = math.inf) -> Tensor:
    """Return the values held between two bounds. A value at a bound is inside: it keeps its gradient.

    So a ratio of 1 has a gradient even if nothing else is let through. At a bound, torch's clamp has a gradient of 1 up
    to version 2.13, and of 0 since 2.14.
    """
    held_N = torch.where(values_N < low, low, values_N)
    return torch.where(held_N > high, high, held_N)


def row_losses_ref(
    logprobs_N: Tensor,
    entropy_N: Tensor,
    advantages_N: Tensor,
    weights_N: Tensor,
    objective: Objective,
    old_N: Tensor | None,
    sampler_N: Tensor | None,
    ref_N: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Return l_i of every row: the clipped term, dual clip, sampler weight, KL and entropy as in `Objective`."""
    old_N = logprobs_N.detach() if old_N is None else old_N
    ratio_N = log_ratio_ref(logprobs_N, old_N, weights_N, cu_seqlens, objective.importance).exp()
    clipped_N = held_ref(ratio_N, 1 - objective.clip_low, 1 + objective.clip_high)
    term_N = torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)
    if objective.dual_clip is not None:
        held_N = held_ref(term_N, objective.dual_clip * advantages_N)
        term_N = torch.where(advantages_N < 0, held_N, term_N)
    if sampler_N is not None and objective.sampler_cap is not None:
        term_N = term_N * (old_N - sampler_N).exp().clamp(max=objective.sampler_cap)
    losses_N = -term_N - objective.entropy_coef * entropy_N
    if objective.kl_coef > 0:
        assert ref_N is not None
        log_N = logprobs_N - ref_N
        kl_N = {"k1": log_N, "k2": log_N**2 / 2, "k3": torch.exp(-log_N) - 1 + log_N}[objective.kl]
        losses_N = losses_N + objective.kl_coef * kl_N
    return losses_N


def grpo_loss_ref(
    logits_NV: Tensor,
    targets_N: Tensor,
    advantages_N: Tensor,
    loss_weights_N: Tensor,
    objective: Objective,
    *,
    old_logprobs_N: Tensor | None = None,
    sampler_logprobs_N: Tensor | None = None,
    ref_logprobs_N: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, logprobs_N, entropy_N), differentiable; every row, also of weight 0, must hold valid values."""
    logprobs_N, entropy_N = token_logprob_ref(logits_NV, targets_N, temperature, softcap)
    losses_N = row_losses_ref(
        logprobs_N,
        entropy_N,
        advantages_N,
        loss_weights_N,
        objective,
        old_logprobs_N,
        sampler_logprobs_N,
        ref_logprobs_N,
        cu_seqlens,
    )
    return (loss_weights_N * losses_N).sum(), logprobs_N, entropy_N


def linear_grpo_loss_ref(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    advantages_N: Tensor,
    loss_weights_N: Tensor,
    objective: Objective,
    *,
    bias_V: Tensor | None = None,
    **inputs: Tensor | float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `grpo_loss_ref` of the logits hidden @ weight^T + bias, all of them at once."""
    logits_NV = torch.nn.functional.linear(hidden_NH, weight_VH, bias_V)
    return grpo_loss_ref(logits_NV, targets_N, advantages_N, loss_weights_N, objective, **inputs)  # type: ignore[arg-type]
