"""The truncated weight for a sampler that is not the trainer's policy: the gradient is biased without it only.

Nothing is drawn. Every token of the vocabulary is in the batch, weighted by its probability under the sampler, so that
the batch's gradient is the expectation itself, in float64.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo.engine.batch.advantages import objective
from mgrpo.engine.config.schema import AlgorithmConfig
from mgrpo.kernels import grpo_loss

V = 40


def gradients(seed: int, drift: float, cap: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the expectation of the loss' gradient, and the gradient of the expected advantage, by the logits (V,).

    drift: the standard deviation of the error of the sampler's logits.
    """
    random = torch.Generator().manual_seed(seed)
    logits_V, advantages_V, noise_V = (torch.randn(V, generator=random, dtype=torch.float64) for _ in range(3))
    stale_V = (logits_V + drift * noise_V).log_softmax(0)
    logits_V.requires_grad_()
    loss = grpo_loss(
        logits_V.expand(V, V),
        torch.arange(V),
        advantages_V,
        stale_V.exp(),
        objective(AlgorithmConfig(sampler_cap=cap)),
        sampler_logprobs_N=stale_V,
    ).loss
    (expected_V,) = torch.autograd.grad(-loss, logits_V)
    (truth_V,) = torch.autograd.grad((logits_V.softmax(0) * advantages_V).sum(), logits_V)
    return expected_V, truth_V


def error(seed: int, drift: float, cap: float | None) -> float:
    """Return the error of the expected gradient, relative to the norm of the true one."""
    expected_V, truth_V = gradients(seed, drift, cap)
    return float((expected_V - truth_V).norm() / truth_V.norm())


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.floats(0.0, 1.5))
def test_with_the_weight_untruncated_the_gradient_is_that_of_the_policy_however_stale_the_sampler(seed, drift):
    assert error(seed, drift, 1e12) < 1e-6


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.floats(0.5, 1.5))
def test_without_the_weight_it_is_biased(seed, drift):
    assert error(seed, drift, None) > 0.02
    assert error(seed, 0.0, None) < 1e-6, "and not because of anything else"


def test_a_cap_trades_bias_against_the_largest_weight():
    """Averaged over many samplers, the bias falls as the cap rises, and any cap is better than no weight."""
    bias = {cap: sum(error(seed, 0.7, cap) for seed in range(40)) / 40 for cap in (None, 1.0, 2.0, 5.0, 1e12)}
    assert bias[None] > bias[1.0] > bias[2.0] > bias[5.0] > bias[1e12]
    assert bias[2.0] < 0.5 * bias[None]


@pytest.mark.parametrize("cap", [None, 2.0])
def test_a_sampler_that_is_the_policy_needs_no_weight(cap):
    assert error(3, 0.0, cap) < 1e-6
