"""Compute group-relative advantages over ragged, weighted groups.

An estimator is a baseline and a scale, each a pure function in a table: a new one is one more entry.
Everything runs in float64, on rewards minus their group's lowest, so that equal rewards of any size have std 0. On a
GPU `triton/advantages.py` does it in float32 in one launch, except for the median and for float64 rewards.

Legend: R rows (trajectories), G groups, T tokens; row r of group g lies in offsets[g] <= r < offsets[g + 1].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import WHOLE, ValueChecks, check_row_vector, require, require_device
from .dispatch import takes_kernels, triton_module


class Advantages(NamedTuple):
    """Hold the advantage of each row, and mean, population std and `std < eps` of each group's weighted rewards.

    tokens_T: the advantage of each token's row, None if cu_seqlens was not given.
    """

    values_R: Tensor
    mean_G: Tensor
    std_G: Tensor
    zero_std_G: Tensor
    tokens_T: Tensor | None = None


@dataclass(frozen=True)
class _Groups:
    """Hold shifted rewards and what the estimators need of the groups.  weights_R is 0 for rows that do not count."""

    rewards_R: Tensor
    weights_R: Tensor
    group_R: Tensor
    weight_G: Tensor
    mean_G: Tensor
    std_G: Tensor

    def total(self, values_R: Tensor) -> Tensor:
        """Return the sum over each group."""
        return torch.zeros_like(self.weight_G).index_add_(0, self.group_R, values_R)


def _mean(groups: _Groups) -> Tensor:
    return groups.mean_G[groups.group_R]


def _leave_one_out(groups: _Groups) -> Tensor:
    """Return the mean of the other rows (RLOO, arXiv 2402.14740); all copies of a row are one sample and left out."""
    rest_R = groups.weight_G[groups.group_R] - groups.weights_R
    rest_sum_R = groups.total(groups.weights_R * groups.rewards_R)[groups.group_R] - groups.weights_R * groups.rewards_R
    alone_R = rest_R <= 1e-9 * groups.weight_G[groups.group_R]
    return torch.where(alone_R, groups.rewards_R, rest_sum_R / torch.where(alone_R, 1, rest_R))


def _median(groups: _Groups) -> Tensor:
    """Return the weighted median, halfway between the two middle values where the weight splits evenly."""
    counted_R = groups.weights_R > 0
    rewards_R, weights_R, group_R = (t[counted_R] for t in (groups.rewards_R, groups.weights_R, groups.group_R))
    order_R = torch.argsort(rewards_R, stable=True)
    order_R = order_R[torch.argsort(group_R[order_R], stable=True)]
    rewards_R, weights_R, group_R = rewards_R[order_R], weights_R[order_R], group_R[order_R]
    before_G = running_sum(groups.weight_G) - groups.weight_G
    reached_R = running_sum(weights_R) - before_G[group_R]
    rows_G = torch.bincount(group_R, minlength=len(before_G))
    start_G = rows_G.cumsum(0) - rows_G
    # The slack is for rounding: fractional weights may add up to almost a half.
    half_R, slack_R = groups.weight_G[group_R] / 2, 1e-9 * groups.weight_G[group_R]

    def value_at(passed_R: Tensor) -> Tensor:
        position_G = start_G + torch.bincount(group_R[passed_R], minlength=len(start_G))
        return rewards_R[torch.minimum(position_G, start_G + rows_G - 1)[groups.group_R].clamp(min=0)]

    if not len(rewards_R):
        return torch.zeros_like(groups.rewards_R)
    return (value_at(reached_R < half_R - slack_R) + value_at(reached_R <= half_R + slack_R)) / 2


def running_sum(values_XN: Tensor) -> Tensor:
    """Return the sum of each row's numbers, none negative, up to and with each of them.

    On a GPU torch sums floats in an order of its own: there the result is float64, and the same in every run.
    """
    return _whole_running_sum(values_XN) if values_XN.is_cuda else values_XN.cumsum(-1)


def _whole_running_sum(values_XN: Tensor) -> Tensor:
    """Compute `running_sum` in whole numbers, which add up alike in any order: multiples of 2^-61 of a row's sum."""
    wide_XN = values_XN.double()
    _, exponent_X1 = torch.frexp(wide_XN.sum(-1, keepdim=True))
    unit_X1 = torch.exp2(exponent_X1.double() - 61)
    return (wide_XN / unit_X1).round().to(torch.int64).cumsum(-1) * unit_X1


def _std(groups: _Groups) -> Tensor:
    return groups.std_G[groups.group_R]


def _unscaled(groups: _Groups) -> Tensor:
    return torch.ones_like(groups.rewards_R)


BASELINES: dict[str, Callable[[_Groups], Tensor]] = {
    "mean": _mean,
    "leave_one_out": _leave_one_out,
    "median": _median,
}
SCALES: dict[str, Callable[[_Groups], Tensor]] = {"std": _std, "none": _unscaled}


def group_advantages(
    rewards_R: Tensor,
    offsets_G1: Tensor,
    weights_R: Tensor | None = None,
    *,
    baseline: str = "mean",
    scale: str = "std",
    eps: float = 1e-6,
    cu_seqlens: Tensor | None = None,
) -> Advantages:
    """Return (reward - baseline) / scale of each row within its group (M-GRPO, arXiv 2511.13288, Eqs. 6 and 7).

    rewards: (R,) float. offsets: (G + 1,) integer, from 0 to R. weights: (R,) float or integer >= 0, the rows'
    multiplicities; None: 1 each. A row of weight 0 does not count in its group but gets a value.
    cu_seqlens: (R + 1,) integer, the bounds of each row's tokens, from 0 to their number T; tokens_T then has T values.

    std is the population std about the mean. If it is below eps, all values of the group are 0 and zero_std is true.
    The same holds for groups that are empty or of weight 0, whose mean and std are 0. The baseline "leave_one_out"
    leaves out all copies of a row; a row without others gets 0.

    A group is any run of rows, so all agents share one call: concatenate the main agent's groups and those of every
    sub-agent (one per query and agent) with their offsets. On a GPU this is one launch, tokens included, except for the
    median, which is plain PyTorch everywhere; the host waits once, and once more for T.
    Results are float32, or float64 for float64 rewards. Raises ValueError for a reward that is not finite (naming the
    row), a negative weight, bad offsets, or an unknown estimator.
    """
    require(baseline in BASELINES, "baseline", repr(baseline), f"one of {tuple(BASELINES)}")
    require(scale in SCALES, "scale", repr(scale), f"one of {tuple(SCALES)}")
    require(eps > 0, "eps", eps, "a number > 0")
    require(rewards_R.ndim == 1, "rewards_R", tuple(rewards_R.shape), "shape (R,)")
    check_row_vector("rewards_R", rewards_R, len(rewards_R))
    if weights_R is not None:
        shape = tuple(rewards_R.shape)
        require(weights_R.shape == shape, "weights_R", tuple(weights_R.shape), f"shape {shape}")
    tokens = 0 if cu_seqlens is None else _tokens(cu_seqlens, rewards_R)
    if (
        baseline != "median"
        and takes_kernels(rewards_R, rewards_R.dtype)
        and _can_be_offsets(offsets_G1, rewards_R.device)
    ):
        settings = {"leave_one_out": baseline == "leave_one_out", "scaled": scale == "std", "eps": eps}
        advantages: Advantages | None = triton_module("advantages").launch_groups(
            rewards_R.detach(), offsets_G1, weights_R, cu_seqlens, tokens, **settings
        )
        if advantages is not None:
            return advantages
        # Otherwise an input is bad, and the checks below name it.
    _check_values(rewards_R, offsets_G1, weights_R, cu_seqlens, tokens)
    weights_R = torch.ones_like(rewards_R) if weights_R is None else weights_R.detach()
    groups, least_G = _group(rewards_R.detach().double(), offsets_G1, weights_R.double())
    zero_std_G = (groups.std_G < eps) | (groups.weight_G == 0)
    zero_R = zero_std_G[groups.group_R]
    scale_R = torch.where(zero_R, 1, SCALES[scale](groups))
    values_R = torch.where(zero_R, 0, (groups.rewards_R - BASELINES[baseline](groups)) / scale_R)
    dtype = torch.float64 if rewards_R.dtype == torch.float64 else torch.float32
    values_R, mean_G, std_G = (t.to(dtype) for t in (values_R, groups.mean_G + least_G, groups.std_G))
    tokens_T = None
    if cu_seqlens is not None:
        tokens_T = values_R.repeat_interleave(cu_seqlens.diff(), output_size=tokens)
    return Advantages(values_R, mean_G, std_G, zero_std_G, tokens_T)


def _tokens(cu_seqlens: Tensor, rewards_R: Tensor) -> int:
    """Return the number of tokens; check dtype, shape, device and both ends of their bounds."""
    require(cu_seqlens.dtype in WHOLE, "cu_seqlens", cu_seqlens.dtype, f"one of {WHOLE}")
    expected = (len(rewards_R) + 1,)
    require(cu_seqlens.shape == expected, "cu_seqlens", tuple(cu_seqlens.shape), f"shape {expected}")
    require_device("cu_seqlens", cu_seqlens, rewards_R.device)
    first, tokens = cu_seqlens[[0, -1]].tolist()
    require(first == 0 <= tokens, "cu_seqlens", f"first and last {(first, tokens)}", "(0, the number of tokens)")
    return tokens


def _can_be_offsets(offsets_G1: Tensor, device: torch.device) -> bool:
    """Return whether these may bound at least one group, on the rewards' device; the kernel checks their values."""
    whole = not offsets_G1.is_floating_point() and offsets_G1.dtype != torch.bool
    return whole and offsets_G1.ndim == 1 and len(offsets_G1) > 1 and offsets_G1.device == device


def _check_values(
    rewards_R: Tensor, offsets_G1: Tensor, weights_R: Tensor | None, cu_seqlens: Tensor | None, tokens: int
) -> None:
    """Raise ValueError for the first input with a bad value."""
    values = ValueChecks(rewards_R.device)
    values.finite("rewards_R", rewards_R)
    values.offsets("offsets_G1", offsets_G1, len(rewards_R))
    if weights_R is not None:
        values.finite("weights_R", weights_R)
        values.add((weights_R < 0).any(), lambda: f"weights_R: got a least of {weights_R.min()}, expected >= 0")
    if cu_seqlens is not None:
        values.offsets("cu_seqlens", cu_seqlens, tokens)
    values.settle()


def _group(rewards_R: Tensor, offsets_G1: Tensor, weights_R: Tensor) -> tuple[_Groups, Tensor]:
    """Return the groups, their rewards and means less the group's lowest reward, and the lowest (0 if none counts)."""
    count = len(offsets_G1) - 1
    group_R = torch.repeat_interleave(torch.arange(count, device=rewards_R.device), offsets_G1.diff())
    counted_R = torch.where(weights_R > 0, rewards_R, math.inf)
    least_G = rewards_R.new_full((count,), math.inf).scatter_reduce_(0, group_R, counted_R, "amin")
    least_G = torch.where(least_G < math.inf, least_G, 0)
    shifted_R = rewards_R - least_G[group_R]
    zeros_G = rewards_R.new_zeros(count)
    weight_G = zeros_G.index_add(0, group_R, weights_R)
    safe_G = torch.where(weight_G > 0, weight_G, 1)
    mean_G = zeros_G.index_add(0, group_R, weights_R * shifted_R) / safe_G
    variance_G = zeros_G.index_add(0, group_R, weights_R * (shifted_R - mean_G[group_R]).square()) / safe_G
    return _Groups(shifted_R, weights_R, group_R, weight_G, mean_G, variance_G.sqrt()), least_G
