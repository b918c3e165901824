"""Make the inputs of `mgrpo bench kernels`: packed rows with masked spans, and one clipped loss over them.

Legend: N rows, L live rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from mgrpo.kernels import Objective, linear_logprob, token_logprob

OBJECTIVE = Objective()
# Rows of a sequence, all with the same advantage: some peers take only one per sequence.
SEQUENCE = 256
# Live and masked rows alternate with this period, as an agent's text and its tools' output do.
PERIOD = 64
# Logits of this spread make a softmax as peaked as a trained model's. If all tokens were about equally likely, a peer
# that skips tiny gradients could skip nearly all of them.
LOGIT_STD = 4.0
# Logs of the ratio, far enough from the clip bounds that rounding moves no row across one.
LOG_RATIOS = (-0.4, -0.1, 0.0, 0.1, 0.4)

Some = TypeVar("Some", bound="Inputs")


@dataclass(frozen=True)
class Inputs:
    """Hold the inputs that every candidate gets.  weights_N: 1 / L at the live rows, 0 elsewhere."""

    source: tuple[Tensor, ...]
    targets_N: Tensor
    advantages_N: Tensor
    weights_N: Tensor
    old_logprobs_N: Tensor

    def with_live(self: Some, fraction: float) -> Some:
        """Return the same inputs with that fraction of live rows."""
        place_N = torch.arange(len(self.targets_N), device=self.targets_N.device) % PERIOD
        live_N = (place_N < round(PERIOD * fraction)).float()
        return replace(self, weights_N=live_N / live_N.sum())

    @property
    def live_N(self) -> Tensor:
        """Whether the row counts."""
        return self.weights_N != 0

    @property
    def sequences(self) -> int:
        """The number of sequences; N is a multiple of their length."""
        return len(self.targets_N) // SEQUENCE


@dataclass(frozen=True)
class Linear(Inputs):
    """Hold hidden states (N, H) and head (V, H) as source, with respect to which candidates differentiate."""

    @property
    def hidden_NH(self) -> Tensor:
        return self.source[0]

    @property
    def weight_VH(self) -> Tensor:
        return self.source[1]


@dataclass(frozen=True)
class Logits(Inputs):
    """Hold logits (N, V) as source: all but the last row of `padded_MV`, as Liger's layout has one row more."""

    padded_MV: Tensor

    @property
    def logits_NV(self) -> Tensor:
        return self.source[0]


def linear_inputs(rows: int, width: int, vocabulary: int, device: torch.device) -> Linear:
    """Make bf16 hidden states and head, all rows live; each sequence has its own advantage."""
    assert rows % SEQUENCE == 0
    torch.manual_seed(0)
    hidden_NH = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
    weight_VH = torch.randn(vocabulary, width, device=device, dtype=torch.bfloat16).mul_(LOGIT_STD / width**0.5)
    targets_N = torch.randint(vocabulary, (rows,), device=device)
    advantages_N = torch.randn(rows // SEQUENCE, device=device).repeat_interleave(SEQUENCE)
    old_N = _old(linear_logprob(hidden_NH, weight_VH, targets_N)[0])
    source = (hidden_NH.requires_grad_(), weight_VH.requires_grad_())
    return Linear(source, targets_N, advantages_N, old_N, old_N).with_live(1.0)


def logits_inputs(rows: int, vocabulary: int, device: torch.device) -> Logits:
    """Make bf16 logits, all rows live, with one advantage for all, as Liger's layout makes them one sequence."""
    torch.manual_seed(0)
    padded_MV = torch.randn(rows + 1, vocabulary, device=device, dtype=torch.bfloat16).mul_(LOGIT_STD)
    targets_N = torch.randint(vocabulary, (rows,), device=device)
    old_N = _old(token_logprob(padded_MV[:-1], targets_N)[0])
    source = (padded_MV[:-1].requires_grad_(),)
    return Logits(source, targets_N, torch.ones(rows, device=device), old_N, old_N, padded_MV).with_live(1.0)


def _old(logprobs_N: Tensor) -> Tensor:
    ratios = torch.tensor(LOG_RATIOS, device=logprobs_N.device)
    return logprobs_N - ratios[torch.randint(len(ratios), logprobs_N.shape, device=logprobs_N.device)]


def clipped_loss(logprobs_N: Tensor, inputs: Inputs) -> Tensor:
    """Return the loss of `OBJECTIVE` from log-probs as every trainer writes it; masked rows are multiplied by 0."""
    ratio_N = (logprobs_N - inputs.old_logprobs_N).exp()
    clipped_N = ratio_N.clamp(1 - OBJECTIVE.clip_low, 1 + OBJECTIVE.clip_high)
    term_N = torch.minimum(ratio_N * inputs.advantages_N, clipped_N * inputs.advantages_N)
    return -(inputs.weights_N * term_N).sum()
