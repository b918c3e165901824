"""Compare group advantages with a plain loop over the expanded multisets."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo.kernels import advantages, group_advantages

GROUPS = st.lists(
    st.lists(st.tuples(st.integers(-40, 40).map(lambda i: i / 8), st.integers(0, 4)), max_size=7), max_size=6
)


def flat(groups):
    rows = [row for group in groups for row in group]
    offsets = torch.tensor([0, *torch.tensor([len(g) for g in groups]).cumsum(0).tolist()])
    rewards = torch.tensor([r for r, _ in rows], dtype=torch.float64)
    return rewards, offsets, torch.tensor([float(w) for _, w in rows], dtype=torch.float64)


def expected_baseline(baseline, group, row):
    multiset = [r for r, w in group for _ in range(w)]
    if baseline == "mean":
        return statistics.fmean(multiset)
    if baseline == "median":
        return statistics.median(multiset)
    others = [r for j, (r, w) in enumerate(group) for _ in range(w) if j != row]
    return statistics.fmean(others) if others else group[row][0]


@given(GROUPS, st.sampled_from(["mean", "leave_one_out", "median"]), st.sampled_from(["std", "none"]))
@settings(max_examples=150)
def test_equals_the_expanded_multiset(groups, baseline, scale):
    rewards, offsets, weights = flat(groups)
    got = group_advantages(rewards, offsets, weights, baseline=baseline, scale=scale)
    assert got.mean_G.shape == got.std_G.shape == got.zero_std_G.shape == (len(groups),)
    at = 0
    for g, group in enumerate(groups):
        multiset = [r for r, w in group for _ in range(w)]
        std = statistics.pstdev(multiset) if multiset else 0.0
        assert got.std_G[g].item() == pytest.approx(std, abs=1e-12)
        assert got.mean_G[g].item() == pytest.approx(statistics.fmean(multiset) if multiset else 0.0, abs=1e-12)
        assert got.zero_std_G[g].item() == (std < 1e-6)
        for row, (reward, _) in enumerate(group):
            value = 0.0
            if std >= 1e-6:
                value = (reward - expected_baseline(baseline, group, row)) / (std if scale == "std" else 1)
            assert got.values_R[at].item() == pytest.approx(value, abs=1e-10)
            at += 1


@given(GROUPS, st.sampled_from([1 / 3, 7 / 6, 1e-9, 1e9]), st.sampled_from(["mean", "leave_one_out", "median"]))
@settings(max_examples=60)
def test_only_the_proportions_of_the_weights_matter(groups, factor, baseline):
    rewards, offsets, weights = flat(groups)
    one = group_advantages(rewards, offsets, weights, baseline=baseline)
    other = group_advantages(rewards, offsets, weights * factor, baseline=baseline)
    for a, b in zip(one[:4], other[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_no_weights_means_one_each_and_whole_number_weights_are_welcome():
    rewards, offsets = torch.tensor([1.0, 2.0, 6.0, 5.0]), torch.tensor([0, 3, 4])
    plain = group_advantages(rewards, offsets)
    counted = group_advantages(rewards, offsets, torch.ones(4, dtype=torch.int64))
    assert torch.equal(plain.values_R, counted.values_R)
    assert plain.values_R.dtype == plain.mean_G.dtype == torch.float32
    torch.testing.assert_close(plain.values_R[:3], (rewards[:3] - 3) / rewards[:3].std(correction=0))


@pytest.mark.parametrize("reward", [0.1, 1e7 / 3, -1e30, 3e38 / 7])
def test_equal_rewards_of_any_size_have_no_advantage(reward):
    rewards, weights = torch.full((49,), reward, dtype=torch.float64), torch.linspace(0.1, 3, 49, dtype=torch.float64)
    got = group_advantages(rewards, torch.tensor([0, 7, 49]), weights)
    assert not got.values_R.any() and not got.std_G.any() and got.zero_std_G.all()
    torch.testing.assert_close(got.mean_G, rewards[:2])


def test_a_large_offset_loses_no_precision():
    small = torch.tensor([0.0, 1.0, 2.0, 5.0], dtype=torch.float64)
    one, other = (group_advantages(small + shift, torch.tensor([0, 4])) for shift in (0.0, 2.0**40))
    torch.testing.assert_close(one.values_R, other.values_R, rtol=1e-12, atol=0)


@given(st.lists(st.floats(0, 1e12, allow_subnormal=False), max_size=40))
def test_the_running_sum_of_a_gpu_is_in_whole_numbers_and_exact_to_float64(values):
    values_N = torch.tensor(values, dtype=torch.float64)
    got = advantages._whole_running_sum(values_N)
    truth = [math.fsum(values[: i + 1]) for i in range(len(values))]
    assert got.tolist() == pytest.approx(truth, rel=0, abs=1e-15 * math.fsum(values))
    assert got.dtype == torch.float64 and bool((got.diff() >= 0).all())


@given(st.lists(st.integers(0, 2**20), max_size=40))
def test_the_running_sum_of_a_gpu_has_no_rounding_for_whole_numbers(values):
    values_2N = torch.tensor([values, values], dtype=torch.float32)
    assert torch.equal(advantages._whole_running_sum(values_2N), values_2N.double().cumsum(-1))


def test_the_median_is_the_same_with_the_running_sum_of_a_gpu(monkeypatch):
    rewards, offsets = torch.arange(60.0).view(4, 15).t().flatten() % 7, torch.tensor([0, 20, 20, 37, 60])
    weights = torch.arange(60.0) % 4 / 3
    plain = group_advantages(rewards, offsets, weights, baseline="median").values_R
    monkeypatch.setattr(advantages, "running_sum", advantages._whole_running_sum)
    assert torch.equal(group_advantages(rewards, offsets, weights, baseline="median").values_R, plain)


def test_rows_of_weight_zero_do_not_count_but_get_a_value():
    rewards, offsets = torch.tensor([0.0, 2.0, 100.0]), torch.tensor([0, 3])
    got = group_advantages(rewards, offsets, torch.tensor([1.0, 1.0, 0.0]))
    assert got.values_R.tolist() == [-1.0, 1.0, 99.0] and got.mean_G.item() == 1 and got.std_G.item() == 1


def test_std_below_eps_is_flagged_and_just_above_is_not():
    rewards, offsets = torch.tensor([0.0, 2e-3, 0.0, 4e-3], dtype=torch.float64), torch.tensor([0, 2, 4])
    got = group_advantages(rewards, offsets, eps=1.5e-3)
    assert got.zero_std_G.tolist() == [True, False]
    assert got.values_R.tolist() == pytest.approx([0, 0, -1, 1])


def test_empty_inputs_and_groups():
    none = group_advantages(torch.empty(0), torch.tensor([0]))
    assert [len(t) for t in none[:4]] == [0, 0, 0, 0] and none.tokens_T is None
    for baseline in ("mean", "leave_one_out", "median"):
        got = group_advantages(torch.empty(0), torch.tensor([0, 0, 0]), baseline=baseline)
        assert got.mean_G.tolist() == got.std_G.tolist() == [0, 0] and got.zero_std_G.all()
        mixed = group_advantages(
            torch.tensor([1.0, 2.0, 5.0, 7.0]), torch.tensor([0, 0, 2, 4, 4]), torch.tensor([1.0, 1, 0, 0])
        )
        assert mixed.values_R.tolist() == [-1.0, 1.0, 0.0, 0.0] and mixed.zero_std_G.tolist() == [
            True,
            False,
            True,
            True,
        ]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_names_its_row(bad):
    with pytest.raises(ValueError, match=r"rewards_R.*row 2"):
        group_advantages(torch.tensor([0.0, 1.0, bad]), torch.tensor([0, 3]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets_G1": torch.tensor([0, 2])}, "offsets_G1"),
        ({"offsets_G1": torch.tensor([1, 3])}, "offsets_G1"),
        ({"offsets_G1": torch.tensor([0, 2, 1, 3])}, "offsets_G1"),
        ({"offsets_G1": torch.tensor([0.0, 3.0])}, "offsets_G1"),
        ({"offsets_G1": torch.empty(0, dtype=torch.int64)}, "offsets_G1"),
        ({"weights_R": torch.tensor([1.0, -1.0, 1.0])}, "weights_R"),
        ({"weights_R": torch.ones(2)}, "weights_R"),
        ({"weights_R": torch.tensor([1.0, math.nan, 1.0])}, "weights_R.*row 1"),
        ({"rewards_R": torch.ones(3, dtype=torch.int64)}, "rewards_R"),
        ({"rewards_R": torch.ones(3, 1)}, "rewards_R"),
        ({"baseline": "mode"}, "baseline.*'mode'"),
        ({"scale": "mad"}, "scale.*'mad'"),
        ({"eps": 0.0}, "eps"),
        ({"cu_seqlens": torch.tensor([0, 2, 3])}, r"cu_seqlens: got \(3,\), expected shape \(4,\)"),
        ({"cu_seqlens": torch.tensor([0.0, 1, 2, 3])}, "cu_seqlens.*float32"),
        ({"cu_seqlens": torch.tensor([1, 1, 2, 3])}, r"cu_seqlens: got first and last \(1, 3\)"),
        ({"cu_seqlens": torch.tensor([0, 1, 2, -1])}, r"cu_seqlens: got first and last \(0, -1\)"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 4])}, "cu_seqlens: got a fall after position"),
        ({"cu_seqlens": torch.tensor([0, 3, 9, 4])}, "cu_seqlens: got a fall after position"),
    ],
)
def test_mistakes_are_refused(change, message):
    arguments = {"rewards_R": torch.tensor([0.0, 1.0, 2.0]), "offsets_G1": torch.tensor([0, 3])} | change
    with pytest.raises(ValueError, match=message):
        group_advantages(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "median"])
def test_every_token_gets_its_rows_value(baseline, dtype):
    lengths = [3, 0, 5, 1, 0, 2]
    rewards, offsets = torch.tensor([0.0, 1, 2, 5, 1, 7], dtype=dtype), torch.tensor([0, 4, 4, 6])
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    got = group_advantages(rewards, offsets, baseline=baseline, cu_seqlens=bounds)
    plain = group_advantages(rewards, offsets, baseline=baseline)
    expected = [value for value, length in zip(plain.values_R.tolist(), lengths, strict=True) for _ in range(length)]
    assert got.tokens_T.dtype == dtype and got.tokens_T.tolist() == expected and plain.tokens_T is None
    assert torch.equal(got.values_R, plain.values_R)


def test_groups_of_several_agents_in_one_call():
    """Check that each agent's groups alone give the same as concatenated."""
    g = torch.Generator().manual_seed(0)
    agents = [[4, 4], [3, 0, 9], [1]]
    rewards = [torch.randn(sum(sizes), generator=g) for sizes in agents]
    weights = [torch.rand(sum(sizes), generator=g) for sizes in agents]
    alone = [
        group_advantages(r, torch.tensor([0, *sizes]).cumsum(0), w)
        for r, w, sizes in zip(rewards, weights, agents, strict=True)
    ]
    together = group_advantages(
        torch.cat(rewards), torch.tensor([0, *(n for sizes in agents for n in sizes)]).cumsum(0), torch.cat(weights)
    )
    for name in ("values_R", "mean_G", "std_G"):
        torch.testing.assert_close(getattr(together, name), torch.cat([getattr(a, name) for a in alone]))
