"""Test `mgrpo bench packing --quick`: what it prints, and the bounds that it compares the packer with; never a time."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import naive_packing as naive
from mgrpo import _packing
from mgrpo.bench.packing import fill, growth, tree_case, trees
from mgrpo.bench.packing.plan import MIXES, best_fit_decreasing, bin_sums, imbalance, lower_bound

TARGETS = {
    "times the fastest peer": ">= 10",
    "bins / best-fit decreasing": "<= 1",
    "fullest bin / cap": "<= 1",
    "lockstep imbalance": "<= 1.005",
    "fresh, times numpy or torch": ">= 3",
    "reused, times numpy or torch": ">= 6",
    "reused, share of memcpy": ">= 0.7",
    "times the flattening collator": ">= 80",
    "times TRL TreeRow": ">= 100",
    "times LightBinPack radix_merge": ">= 20",
    "tokens / distinct prefixes": "<= 1.1",
    "bins / TRL TreeRow's": "<= 1",
    "bins / LightBinPack radix_merge's": "<= 1",
}
lengths = st.lists(st.integers(1, 40), min_size=1, max_size=40)


def test_quick_run_ends_in_one_line_that_names_all_targets():
    ran = subprocess.run(
        [sys.executable, "-c", "from mgrpo.bench.packing.run import main; main(quick=True)"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    line = json.loads(ran.stdout.rstrip("\n").split("\n")[-1])
    assert line["bench"] == "packing"
    targets = {r["name"].split(": ", 1)[1]: r["target"] for r in line["results"]}
    assert targets.items() >= TARGETS.items()
    for result in line["results"]:
        assert result["value"] is not None or result["why"], result
        assert (result["met"] is None) == (result["value"] is None or result["target"] is None), result


@given(lengths)
def test_best_fit_decreasing_is_the_naive_one(lengths):
    assert best_fit_decreasing(np.array(lengths), 40) == len(naive.best_fit_decreasing(lengths, 40))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=7))
def test_no_packing_beats_the_lower_bound(lengths):
    def fewest(left, rooms):
        if not left:
            return len(rooms)
        options = [
            fewest(left[1:], [*rooms[:m], r - left[0], *rooms[m + 1 :]]) for m, r in enumerate(rooms) if r >= left[0]
        ]
        return min([*options, fewest(left[1:], [*rooms, 12 - left[0]])])

    assert -(-sum(lengths) // 12) <= lower_bound(np.array(lengths), 12) <= fewest(lengths, [])


@given(lengths)
def test_lower_bound_is_the_packer_s_own(lengths):
    assert lower_bound(np.array(lengths), 40) == _packing.l2_bound(np.array(lengths), 40)


def test_lower_bound_gives_no_room_beside_what_nothing_fits_beside():
    assert lower_bound(np.array([7, 7, 4, 2]), 10) == 3  # 20 in all, but 4 fits beside neither 7


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: mix.name)
def test_plan_needs_no_more_bins_than_naive_best_fit_decreasing(mix):
    lengths_N = mix.lengths(500)
    assert len(lengths_N) == 500 and lengths_N.min() >= 1 and lengths_N.max() <= mix.cap
    bins = len(_packing.plan(lengths_N, mix.cap)[0]) - 1
    assert lower_bound(lengths_N, mix.cap) <= bins <= len(naive.best_fit_decreasing(lengths_N.tolist(), mix.cap))


def test_imbalance_is_the_dearest_over_the_mean():
    sums_M = bin_sums(np.array([1.0, 2.0, 3.0, 6.0]), np.array([0, 1, 2, 3, 4]), np.array([2, 0, 1, 3]))
    assert sums_M.tolist() == [3, 1, 2, 6]
    assert imbalance(sums_M, 2) == pytest.approx((3 / 2 + 6 / 4) / 2)


def test_fill_builds_what_numpy_and_torch_do():
    fill.check(fill.trajectories(3))


def test_distinct_prefixes_are_those_of_a_set():
    case = tree_case.make(1)
    bounds = case.offsets_N1.tolist()
    short = [case.tokens_T[begin : min(end, begin + 1400)] for begin, end in pairwise(bounds)]
    cut = tree_case.Case(
        np.concatenate(short), *[np.empty(0)] * 2, np.cumsum([0, *map(len, short)]), *[np.empty(0)] * 2
    )
    chains = {hash_of for tokens in short for hash_of in prefixes(tokens.tolist())}
    assert tree_case.distinct_prefixes(cut) == len(chains)


def prefixes(tokens):
    """Count the distinct prefixes, one key for each."""
    key = 0
    for token in tokens:
        key = hash((key, token))
        yield key


def test_trees_hold_every_trajectory_under_the_cap():
    case = tree_case.make(2)
    rows = trees.ours(case)
    assert all(len(row["input_ids"]) <= trees.CAP for row in rows)
    assert sum(len(row["leaf"]) for row in rows) == len(case.rows_N)
    assert sum(len(row["input_ids"]) for row in rows) >= tree_case.distinct_prefixes(case)


def test_exponent_of_a_power_law():
    sizes = [10, 100, 1000]
    assert growth.exponent(sizes, [7 * size**1.5 for size in sizes]) == pytest.approx(1.5)
