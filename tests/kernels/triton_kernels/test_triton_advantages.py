"""Compare group advantages in one launch with the definition in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_cases import DEVICE, INTERPRETED, kernels_take_the_tensors, placed, skip_unless_kernels_run

from mgrpo.kernels import group_advantages

skip_unless_kernels_run()
__all__ = ["kernels_take_the_tensors"]
pytestmark = pytest.mark.gpu
BASELINES = st.sampled_from(["mean", "leave_one_out"])
SCALES = st.sampled_from(["std", "none"])
ROWS = st.tuples(st.integers(-40, 40).map(lambda i: i / 8), st.integers(0, 4))
GROUPS = st.lists(st.lists(ROWS, max_size=40), min_size=1, max_size=20)


def flat(groups):
    rows = [row for group in groups for row in group]
    offsets = torch.tensor([0, *torch.tensor([len(g) for g in groups]).cumsum(0).tolist()])
    return placed([torch.tensor([float(row[i]) for row in rows]) for i in (0, 1)] + [offsets])


def assert_equals_definition(rewards, offsets, weights=None, *, tolerance=2e-6, **settings):
    """Return the definition: float64 rewards take the plain path."""
    got = group_advantages(rewards, offsets, weights, **settings)
    truth = group_advantages(rewards.double(), offsets, weights, **settings)
    assert got.values_R.dtype == got.mean_G.dtype == got.std_G.dtype == torch.float32
    assert torch.equal(got.zero_std_G, truth.zero_std_G)
    for a, b in zip(got[:3], truth[:3], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
    if "cu_seqlens" in settings:
        assert torch.equal(got.tokens_T, got.values_R.repeat_interleave(settings["cu_seqlens"].diff()))
    return got


@given(GROUPS, BASELINES, SCALES, st.sampled_from([torch.float32, torch.float64, torch.int64, None]))
@settings(max_examples=60, derandomize=True)
def test_ragged_weighted_groups(groups, baseline, scale, dtype):
    rewards, weights, offsets = flat(groups)
    weights = None if dtype is None else weights.to(dtype)
    assert_equals_definition(rewards, offsets, weights, baseline=baseline, scale=scale)


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("sizes", [[1], [1025], [128, 3000, 0, 1], [16] * 33, [0, 0, 5], [2047, 2049]])
def test_sizes_at_the_edges_of_a_tile(sizes, baseline):
    g = torch.Generator().manual_seed(0)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    rewards, weights = torch.randn(sum(sizes), generator=g), torch.rand(sum(sizes), generator=g)
    assert_equals_definition(*placed([rewards, offsets, weights]), baseline=baseline, tolerance=2e-5)


@given(st.lists(st.lists(st.integers(0, 40), max_size=20), min_size=1, max_size=9), st.booleans(), st.booleans())
@settings(max_examples=40, derandomize=True)
def test_tokens_get_their_rows_value_in_the_same_launch(lengths, weighted, narrow):
    g = torch.Generator().manual_seed(sum(map(len, lengths)))
    offsets = torch.tensor([0, *map(len, lengths)]).cumsum(0)
    bounds = torch.tensor([0, *(n for group in lengths for n in group)]).cumsum(0)
    rewards, weights = torch.randn(2, len(bounds) - 1, generator=g)
    rewards, offsets, weights, bounds = placed([rewards, offsets, weights.abs(), bounds.int() if narrow else bounds])
    assert_equals_definition(rewards, offsets, weights if weighted else None, tolerance=2e-5, cu_seqlens=bounds)


def test_tokens_of_more_rows_than_a_tile_holds():
    g = torch.Generator().manual_seed(4)
    bounds = torch.randint(9, (2051,), generator=g).cumsum(0)
    bounds[0] = 0
    rewards, offsets, bounds = placed([torch.randn(2050, generator=g), torch.tensor([0, 2049, 2050]), bounds])
    assert_equals_definition(rewards, offsets, tolerance=2e-5, cu_seqlens=bounds)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rewards_are_summed_in_float32(dtype):
    rewards = torch.randn(300, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    assert_equals_definition(rewards, placed(torch.tensor([0, 100, 300])))


@pytest.mark.parametrize("reward", [0.1, 1e7 / 3, -1e30])
def test_equal_rewards_of_any_size_have_no_advantage(reward):
    rewards, weights = placed([torch.full((49,), reward), torch.linspace(0.1, 3, 49)])
    got = group_advantages(rewards, placed(torch.tensor([0, 7, 49])), weights)
    assert not got.values_R.any() and not got.std_G.any() and got.zero_std_G.all()
    torch.testing.assert_close(got.mean_G, rewards[:2])


def test_a_large_offset_loses_no_precision():
    """Use rewards whose one-pass variance in float32 would be wrong by more than its value."""
    small, offsets = placed([torch.tensor([0.0, 1.0, 2.0, 5.0]), torch.tensor([0, 4])])
    one, other = (group_advantages(small + shift, offsets) for shift in (0.0, 2.0**20))
    torch.testing.assert_close(one.values_R, other.values_R, rtol=1e-6, atol=0)


def test_a_weight_that_swamps_all_others_divides_nothing_by_zero():
    rewards, weights, offsets = placed([torch.tensor([0.0, 1.0]), torch.tensor([1e9, 1.0]), torch.tensor([0, 2])])
    got = group_advantages(rewards, offsets, weights, baseline="leave_one_out")
    assert torch.isfinite(got.values_R).all() and not got.zero_std_G.any() and got.values_R[1] > 1e4


def test_strided_inputs_and_narrow_offsets():
    g = torch.Generator().manual_seed(2)
    both, offsets = placed([torch.rand(50, 2, generator=g), torch.tensor([0, 9, 20, 50], dtype=torch.int32)])
    assert_equals_definition(both[:, 0], offsets, both[:, 1])


def test_each_kind_of_bad_input_is_named():
    good = {"rewards_R": torch.tensor([0.0, 1.0, 2.0]), "offsets_G1": torch.tensor([0, 3])}
    for change, message in (
        ({"rewards_R": torch.tensor([0.0, 1.0, math.nan])}, r"rewards_R.*row 2"),
        ({"rewards_R": torch.tensor([-math.inf, 1.0, 0.0])}, r"rewards_R.*row 0"),
        ({"weights_R": torch.tensor([1.0, -1.0, 1.0])}, "weights_R.*>= 0"),
        ({"weights_R": torch.tensor([1.0, math.nan, 1.0])}, "weights_R.*row 1"),
        ({"weights_R": torch.ones(2)}, r"weights_R: got \(2,\)"),
        ({"offsets_G1": torch.tensor([0, 2])}, "offsets_G1.*first and last"),
        ({"offsets_G1": torch.tensor([1, 3])}, "offsets_G1.*first and last"),
        ({"offsets_G1": torch.tensor([0, 2, 1, 3])}, "offsets_G1.*fall"),
        ({"offsets_G1": torch.tensor([0, 10**12, 3])}, "offsets_G1.*fall"),
        ({"offsets_G1": torch.tensor([0.0, 3.0])}, "offsets_G1.*integer"),
        ({"cu_seqlens": torch.tensor([0, 2, 1, 3])}, "cu_seqlens.*fall"),
        ({"cu_seqlens": torch.tensor([0, 2, 10**12, 3])}, "cu_seqlens.*fall"),
        ({"cu_seqlens": torch.tensor([0, -(10**12), 2, 3])}, "cu_seqlens.*fall"),
    ):
        with pytest.raises(ValueError, match=message):
            group_advantages(**placed(good | change))


def test_no_groups():
    got = group_advantages(*placed([torch.empty(0), torch.tensor([0])]))
    assert [len(t) for t in got[:4]] == [0, 0, 0, 0] and got.tokens_T is None


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU: too large for the interpreter")
@pytest.mark.parametrize("size", [4, 16, 1000])
def test_a_million_trajectories(size):
    g = torch.Generator().manual_seed(3)
    offsets = torch.arange(0, 10**6 + 1, size)
    assert_equals_definition(*placed([torch.randn(10**6, generator=g), offsets]), tolerance=2e-5)
