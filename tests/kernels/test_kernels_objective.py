"""Test the objective's settings, its terms against numbers computed by hand, and its metrics."""

import math

import pytest
import torch

from mgrpo.kernels import Objective, grpo_loss, merge_metrics
from mgrpo.kernels.objective import KL_TERMS, policy_gain
from mgrpo.kernels.reference import row_losses_ref
from numerics import double


@pytest.mark.parametrize(
    ("ratio", "advantage", "gain", "slope"),
    [  # clip to [0.8, 1.28], dual clip 3; slope is d gain / d ratio
        (1.0, 2.0, 2.0, 2.0),
        (1.5, 2.0, 2.56, 0.0),  # clipped above
        (0.5, 2.0, 1.0, 2.0),  # too low, but increasing it helps: not clipped
        (0.5, -2.0, -1.6, 0.0),  # clipped below
        (1.5, -2.0, -3.0, -2.0),  # too high, but decreasing it helps: not clipped
        (5.0, -2.0, -6.0, 0.0),  # dual clip
        (5.0, 0.0, 0.0, 0.0),
    ],
)
def test_clipping_by_hand(ratio, advantage, gain, slope):
    objective = Objective(clip_low=0.2, clip_high=0.28, dual_clip=3.0)
    log_ratio, advantages = torch.tensor([math.log(ratio)]).double(), torch.tensor([advantage]).double()
    got_gain, got_slope = policy_gain(log_ratio, advantages, objective)
    assert got_gain.item() == pytest.approx(gain)
    assert got_slope.item() == pytest.approx(slope * ratio)  # with respect to the log of the ratio


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_a_ratio_at_a_bound_keeps_its_gradient(advantage):
    """On-policy every ratio is 1, which a clip of 0 lets through, in every version of torch."""
    objective, zeros, one = Objective(clip_low=0.0, clip_high=0.0, dual_clip=1.0 + 1e-9), torch.zeros(1), torch.ones(1)
    given = (torch.tensor([advantage]).double(), one.double(), objective, None, None, None, None)
    logprobs = zeros.double().requires_grad_()
    row_losses_ref(logprobs, zeros.double(), *given).sum().backward()
    assert logprobs.grad.item() == -advantage
    assert policy_gain(zeros.double(), given[0], objective)[1].item() == advantage


def test_overflowing_ratios_give_no_nan():
    objective = Objective(dual_clip=3.0)
    log_ratio, advantages = torch.tensor([800.0, 800, 800, -800, -800]), torch.tensor([1.0, -1, 0, 1, -1])
    gain, slope = policy_gain(log_ratio, advantages, objective)
    torch.testing.assert_close(gain, torch.tensor([1.28, -3.0, 0.0, 0.0, -0.8]))
    assert slope.tolist() == [0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("kind", "value", "slope"),
    [("k1", 0.5, 1.0), ("k2", 0.125, 0.5), ("k3", math.exp(-0.5) - 0.5, 1 - math.exp(-0.5))],
)
def test_kl_by_hand(kind, value, slope):
    got_value, got_slope = KL_TERMS[kind](torch.tensor([0.5]).double())
    assert (got_value.item(), got_slope.item()) == (pytest.approx(value), pytest.approx(slope))


def test_a_loss_by_hand():
    """Use two rows of a uniform softmax over two tokens, where every number can be checked on paper."""
    half = math.log(0.5)
    objective = Objective(kl_coef=0.1, kl="k2", entropy_coef=0.01, sampler_cap=1.2)
    loss, logprobs, entropy, metrics = grpo_loss(
        torch.zeros(2, 2).double(),
        torch.tensor([0, 1]),
        torch.tensor([1.0, -1.0]),
        torch.tensor([0.5, 0.25]),
        objective,
        old_logprobs_N=torch.tensor([half - math.log(1.1), half - math.log(0.5)]).double(),
        sampler_logprobs_N=torch.tensor([half - math.log(1.1) - math.log(1.15), half - 5]).double(),
        ref_logprobs_N=torch.tensor([half - 1, half + 2]).double(),
    )
    first = -1.1 * 1.15 + 0.1 * 0.5 + 0.01 * half
    second = 0.8 * 1.2 + 0.1 * 2 + 0.01 * half
    assert loss.item() == pytest.approx(0.5 * first + 0.25 * second, abs=1e-6)  # the advantages are float32
    assert logprobs.tolist() == pytest.approx([half, half]) and entropy.tolist() == pytest.approx([-half, -half])
    assert {name: round(value.item(), 6) for name, value in metrics.items()} == {
        "rows": 2,
        "clip_low": 1,
        "clip_high": 0,
        "ratio_sum": 1.6,
        "ratio_max": 1.1,
        "entropy_sum": round(-2 * half, 6),
        "logprob_sum": round(2 * half, 6),
        "kl_sum": 2.5,
        "gap_sum": round(math.log(1.15) + 5 - math.log(0.5), 6),
        "gap_max": round(5 - math.log(0.5), 6),
        "sampler_weight_sum": 2.35,
        "sampler_capped": 1,
    }


def test_shared_ratios_by_hand():
    """Compute the ratio by hand. Sequence: the geometric mean over rows that count; trajectory: their product."""
    half = math.log(0.5)
    for importance, ratio in (("sequence", 1.1), ("trajectory", 1.21)):
        got = grpo_loss(
            torch.zeros(4, 2).double(),
            torch.zeros(4, dtype=torch.int64),
            torch.ones(4),
            torch.tensor([1.0, 0.0, 1.0, 1.0]),
            Objective(importance=importance),
            old_logprobs_N=double(torch.tensor([half, 9.0, half, half]))
            - double(torch.tensor([math.log(1.21), 0, 0, 0])),
            cu_seqlens=torch.tensor([0, 3, 3, 4]),
        )
        assert got.loss.item() == pytest.approx(-(2 * ratio + 1), abs=1e-5)


def test_merged_metrics_are_means_and_maxima_over_all_rows():
    parts = [
        {"rows": 1, "clip_low": 1, "ratio_sum": 2.0, "ratio_max": 2.0, "gap_sum": 0.5},
        {"rows": 3, "clip_low": 0, "ratio_sum": 3.0, "ratio_max": 1.5},
        {"rows": 0, "clip_low": 0, "ratio_sum": 0.0, "ratio_max": 0.0},
    ]
    merged = merge_metrics([{name: torch.tensor(float(x)) for name, x in part.items()} for part in parts])
    assert merged == {"rows": 4, "clip_low": 0.25, "ratio_mean": 1.25, "ratio_max": 2.0, "gap_mean": 0.5}
    assert merge_metrics([]) == {}
    assert merge_metrics([{"rows": torch.tensor(0.0), "ratio_sum": torch.tensor(0.0)}]) == {"rows": 0, "ratio_mean": 0}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clip_low", -0.1),
        ("clip_low", 1.1),
        ("clip_low", "0.2"),
        ("clip_low", True),
        ("clip_high", math.nan),
        ("clip_high", -1),
        ("dual_clip", 1.0),
        ("dual_clip", math.inf),
        ("importance", "tokens"),
        ("kl", "k4"),
        ("kl_coef", -1.0),
        ("kl_coef", math.inf),
        ("entropy_coef", math.nan),
        ("sampler_cap", 0.0),
    ],
)
def test_settings_are_checked_by_name(field, value):
    with pytest.raises(ValueError, match=f"^{field}: got .*expected"):
        Objective(**{field: value})
