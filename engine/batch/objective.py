"""What one agent maximises, and what each of its tokens counts in it.

Every denominator, multiplicity and length normalisation is folded into one weight per trajectory, so that the loss is a
plain weighted sum and micro-batches, ranks and left-out rows need no care.
"""

from __future__ import annotations

import numpy as np

from mgrpo.engine.config.schema import AlgorithmConfig
from mgrpo.engine.system.imports import load_function
from mgrpo.kernels import Objective


def objective(algorithm: AlgorithmConfig) -> Objective:
    """The rl stage's objective. Raises ValueError if a function of the user's own cannot be found."""
    return Objective(
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        dual_clip=algorithm.dual_clip,
        importance=algorithm.importance,
        kl_coef=algorithm.kl_coef,
        kl=algorithm.kl,
        entropy_coef=algorithm.entropy_coef,
        sampler_cap=algorithm.sampler_cap,
        rule=load_function(algorithm.objective, "algorithm.objective") if algorithm.objective else None,
    )


def token_weights(
    algorithm: AlgorithmConfig, shares_N: np.ndarray, multiplicities_N: np.ndarray, actions_N: np.ndarray
) -> np.ndarray:
    """The loss weight of each action token of each trajectory, (N,) float64.

    trajectory: the mean over a trajectory's action tokens, then over trajectories (shares); token: all action tokens of
    the batch alike, copies counted; constant: their sum divided by length_constant instead of their number.
    """
    if algorithm.length_norm == "token":
        total = (multiplicities_N * actions_N).sum()
        return multiplicities_N / max(total, 1.0)
    length_N = np.maximum(actions_N, 1) if algorithm.length_norm == "trajectory" else algorithm.length_constant
    return shares_N * multiplicities_N / length_N
