"""Groups of trajectories, plain arrays in and out: alignment to D and group-relative advantages. For any trainer.

Departs from M-GRPO's copies (arXiv 2511.13288): a trajectory that counts several times has a multiplicity, and is there
once. Legend: N trajectories, G groups, P (query, rollout) pairs.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mgrpo import _packing
from mgrpo.engine.batch.planning import Ints, each_of
from mgrpo.kernels import group_advantages


def align(
    counts: Any,
    target: int,
    mode: Literal["sampled", "expected", "none"] = "sampled",
    seed: int = 0,
    keys: Any = None,
) -> NDArray[np.float64]:
    """How often each trajectory of each rollout counts, so that those of a rollout count `target` times (Eqs. 8-9).

    counts (P,) whole: trajectories that each rollout has of an agent, 0 too; target: D >= 1. Returns (N,) float64 >= 0,
    N = sum of counts, rollout by rollout; the sum over a rollout is D, or 0 where it has none. "sampled": all once and
    the rest drawn with replacement, or D drawn without; "expected": D / count each, the same without the noise; "none":
    all once, so that the sum is the count and nothing is aligned.
    keys (P,) whole: what each rollout's draw depends on besides the seed; None: its place.
    Raises ValueError that names the argument.
    """
    counts_P = _whole("counts", counts)
    keys_P = np.arange(len(counts_P)) if keys is None else each_of("keys", keys, len(counts_P))
    drawn = "expected" if mode == "none" else mode
    copies_N = _packing.align(counts_P, target, drawn, seed, keys_P.astype(np.uint64))
    return np.ones_like(copies_N) if mode == "none" else copies_N


class GroupAdvantages(NamedTuple):
    """values (N,) float64; of each group mean, population std (G,) float64 and whether its rewards are all alike."""

    values: NDArray[np.float64]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    zero_std: NDArray[np.bool_]


def advantages(
    rewards: Any,
    offsets: Any,
    weights: Any = None,
    *,
    baseline: Literal["mean", "leave_one_out", "median"] = "mean",
    scale: Literal["std", "none"] = "std",
    eps: float = 1e-6,
) -> GroupAdvantages:
    """(reward - baseline) / scale of each trajectory within its group (Eqs. 6-7), in float64.

    rewards (N,); offsets (G + 1,) whole, from 0 to N: bounds of the groups; weights (N,) >= 0: multiplicities, None: 1
    each. std below eps: the group's values are 0. More in `mgrpo.kernels.group_advantages`, for tensors.
    Raises ValueError that names the argument.
    """
    rewards_N = np.asarray(rewards, np.float64)
    weights_N = None if weights is None else each_of("weights", weights, len(rewards_N), np.float64)
    found = group_advantages(
        torch.from_numpy(rewards_N),
        torch.from_numpy(_whole("offsets", offsets)),
        None if weights_N is None else torch.from_numpy(weights_N),
        baseline=baseline,
        scale=scale,
        eps=eps,
    )
    return GroupAdvantages(*(x.numpy() for x in (found.values_R, found.mean_G, found.std_G, found.zero_std_G)))


def _whole(name: str, values: Any) -> Ints:
    found = np.asarray(values)
    if found.ndim != 1 or (found.dtype.kind not in "iu" and len(found)):
        raise ValueError(f"{name}: {found.dtype} of shape {found.shape} given: expected whole numbers, in one row")
    return found.astype(np.int64)
