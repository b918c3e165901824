"""The rows of a loss: the inputs of each row, which rows are live, and their loss and slopes under an objective.

A row that adds nothing to the gradient is left out before the head is touched (`live_rows`): one of weight 0, or of
advantage 0 with neither KL nor entropy term nor rule, unless it shares the ratio of a sequence that has some advantage.

Legend: N all rows, L live rows, S sequences.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .objective import KL_TERMS, Objective, RuleRows, policy_gain


@dataclass(frozen=True)
class LossRows:
    """Hold the objective's inputs of each row, all of one float dtype; `segment_L` is the sequence of each row."""

    advantages_L: Tensor
    weights_L: Tensor
    old_L: Tensor | None
    sampler_L: Tensor | None
    ref_L: Tensor | None
    segment_L: Tensor | None
    sequences: int

    def select(self, which: Tensor | slice) -> "LossRows":
        """Return the inputs of some of the rows."""
        selected: dict[str, Any] = {name: t[which] for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **selected)

    def share(self, values_L: Tensor, objective: Objective) -> Tensor:
        """Replace each row's value by the sum or mean over its sequence.  This map is linear and its own adjoint."""
        if objective.importance == "token":
            return values_L
        assert self.segment_L is not None
        total_S = values_L.new_zeros(self.sequences).index_add_(0, self.segment_L, values_L)
        if objective.importance == "sequence":
            rows_S = torch.zeros_like(total_S).index_add_(0, self.segment_L, torch.ones_like(values_L))
            total_S /= rows_S.clamp_(min=1)
        return total_S[self.segment_L]


def live_rows(rows: LossRows, objective: Objective) -> Tensor:
    """Return whether each row can add to the gradient, or shares the ratio of a row that can.  (N,) bool."""
    counted_N = rows.weights_L != 0
    if objective.needs_every_row:
        return counted_N
    useful_N = counted_N & (rows.advantages_L != 0)
    if objective.importance == "token":
        return useful_N
    assert rows.segment_L is not None
    useful_S = useful_N.new_zeros(rows.sequences, dtype=torch.int32).index_add_(0, rows.segment_L, useful_N.int())
    return counted_N & (useful_S > 0)[rows.segment_L]


class PolicyTerms(NamedTuple):
    """Hold the weighted policy loss of each row, its derivative with respect to the log-prob, and the log ratio."""

    loss_L: Tensor
    slope_L: Tensor
    log_ratio_L: Tensor


def shared_log_ratio(logprobs_L: Tensor, rows: LossRows, objective: Objective) -> Tensor:
    """Return the log of each row's ratio, 0 on-policy.  With shared ratios `rows` must hold whole sequences."""
    return rows.share(logprobs_L - (logprobs_L if rows.old_L is None else rows.old_L), objective)


def policy_terms(logprobs_L: Tensor, rows: LossRows, objective: Objective) -> PolicyTerms:
    """Return the policy part of the loss.  With shared ratios `rows` must hold whole sequences."""
    old_L = logprobs_L if rows.old_L is None else rows.old_L
    log_ratio_L = shared_log_ratio(logprobs_L, rows, objective)
    gain_L, slope_L = policy_gain(log_ratio_L, rows.advantages_L, objective)
    weight_L = -rows.weights_L
    if uses_sampler_weight(rows, objective):
        assert rows.sampler_L is not None and objective.sampler_cap is not None
        weight_L = weight_L * (old_L - rows.sampler_L).exp().clamp(max=objective.sampler_cap)
    return PolicyTerms(weight_L * gain_L, rows.share(weight_L * slope_L, objective), log_ratio_L)


def uses_sampler_weight(rows: LossRows, objective: Objective) -> bool:
    """Return whether rows are weighted by their importance relative to the sampler."""
    return rows.sampler_L is not None and objective.sampler_cap is not None


def slopes(
    logprobs_L: Tensor, rows: LossRows, objective: Objective, policy_slope_L: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the derivatives of the loss with respect to each row's log-prob and entropy (None: no entropy term).

    policy_slope_L: the policy's part, if it is known already.
    """
    if policy_slope_L is None:
        policy_slope_L = policy_terms(logprobs_L, rows, objective).slope_L
    if objective.kl_coef != 0:
        _, kl_slope_L = kl_terms(logprobs_L, rows, objective)
        policy_slope_L = policy_slope_L + objective.kl_coef * rows.weights_L * kl_slope_L
    if objective.entropy_coef == 0:
        return policy_slope_L, None
    return policy_slope_L, -objective.entropy_coef * rows.weights_L


@dataclass(frozen=True)
class Coefficients:
    """Hold dloss/dlogprob and dloss/dentropy (None: zero) of each row, as given or by an objective over the rows.

    With an objective `by_logprob_L` is only the policy's part of the slope; None: it follows from each row's log-prob.
    """

    by_logprob_L: Tensor | None
    by_entropy_L: Tensor | None = None
    rows: LossRows | None = None
    objective: Objective | None = None

    def of(self, logprobs_B: Tensor, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Return the coefficients of a slice of the rows, whose log-probs are known by now."""
        by_logprob_B, by_entropy_B = (t if t is None else t[rows] for t in (self.by_logprob_L, self.by_entropy_L))
        if self.rows is not None and self.objective is not None:
            return slopes(logprobs_B, self.rows.select(rows), self.objective, by_logprob_B)
        return torch.zeros_like(logprobs_B) if by_logprob_B is None else by_logprob_B, by_entropy_B


def total_loss(
    logprobs_L: Tensor, entropy_L: Tensor, rows: LossRows, objective: Objective, terms: PolicyTerms | None = None
) -> Tensor:
    """Return sum_i weight_i * (policy_i + kl_coef * kl_i - entropy_coef * entropy_i), or the rule's loss.  0-dim.

    terms: the policy's part, if it is known already.
    """
    if objective.rule is not None:
        return rule_loss(logprobs_L, entropy_L, rows, objective)
    loss_L = (terms or policy_terms(logprobs_L, rows, objective)).loss_L
    if objective.kl_coef != 0:
        loss_L = loss_L + objective.kl_coef * rows.weights_L * kl_terms(logprobs_L, rows, objective)[0]
    if objective.entropy_coef != 0:
        loss_L = loss_L - objective.entropy_coef * rows.weights_L * entropy_L
    return loss_L.sum()


def kl_terms(logprobs_L: Tensor, rows: LossRows, objective: Objective) -> tuple[Tensor, Tensor]:
    """Return the KL estimate of each row and its derivative, unweighted."""
    assert rows.ref_L is not None
    return KL_TERMS[objective.kl](logprobs_L - rows.ref_L)


def rule_loss(logprobs_L: Tensor, entropy_L: Tensor, rows: LossRows, objective: Objective) -> Tensor:
    """Return sum_i weight_i * rule_i, 0-dim.  Raises ValueError unless the rule returns one term for each row."""
    assert objective.rule is not None
    if not len(logprobs_L):
        return logprobs_L.sum()
    old_L = logprobs_L.detach() if rows.old_L is None else rows.old_L
    shown = RuleRows(  # copies, which the rule may change
        logprobs_L,
        entropy_L,
        rows.advantages_L.clone(),
        rows.weights_L.clone(),
        old_L.clone(),
        _copy_of(rows.sampler_L),
        _copy_of(rows.ref_L),
        _copy_of(rows.segment_L),
        rows.sequences,
    )
    terms_L = objective.rule(shown, objective)
    given = tuple(terms_L.shape) if isinstance(terms_L, Tensor) else repr(terms_L)
    if given != tuple(logprobs_L.shape):
        raise ValueError(f"rule: got terms of {given}, expected a tensor of shape {tuple(logprobs_L.shape)}")
    return (rows.weights_L * terms_L).sum()


def _copy_of(values_L: Tensor | None) -> Tensor | None:
    return None if values_L is None else values_L.clone()


def rule_slopes(
    logprobs_L: Tensor, entropy_L: Tensor, rows: LossRows, objective: Objective
) -> tuple[Tensor, Tensor | None]:
    """Return the `slopes` of a rule, by autograd over the vectors of rows."""
    with torch.enable_grad():
        leaves = [values_L.detach().requires_grad_() for values_L in (logprobs_L, entropy_L)]
        loss = rule_loss(leaves[0], leaves[1], rows, objective)
    if not loss.requires_grad:
        return torch.zeros_like(logprobs_L), None
    by_logprob_L, by_entropy_L = torch.autograd.grad(loss, leaves, allow_unused=True)
    return torch.zeros_like(logprobs_L) if by_logprob_L is None else by_logprob_L, by_entropy_L
