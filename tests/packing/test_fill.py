"""Compare trainable_rows and fill with tests/support/naive_packing.py: random, ragged, empty, large."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from fill_cases import Batch, Filled, assert_same, fill, flat, ints, large, offsets_of, one, ragged_lengths, split
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import naive_packing as naive
from mgrpo import _packing as packing

# ---- trainable_rows


flag_lists = st.lists(st.lists(st.booleans(), max_size=9), max_size=9)


@given(flag_lists, st.sampled_from([np.bool_, np.uint8]), st.booleans())
def test_trainable_rows_is_the_naive_one(flags, dtype, as_list):
    each_N = [np.array(f, dtype) for f in flags]
    sampled = each_N if as_list else np.concatenate([np.zeros(0, dtype), *each_N])
    rows_N = packing.trainable_rows(offsets_of(flags), sampled)
    assert rows_N.dtype == np.int64
    assert rows_N.tolist() == naive.trainable_rows(flags)


def test_trainable_rows_takes_any_nonzero_flag():
    assert packing.trainable_rows(ints([0, 3]), np.array([0, 7, 0], np.uint8)).tolist() == [1]


# ---- fill


eighths = st.integers(-16, 16).map(lambda n: n / 8)  # all their sums are exact


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    flags = draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), max_size=7))
    count, total = len(flags), sum(map(len, flags))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    names = draw(st.sets(st.sampled_from(["old_logprobs", "sampler_logprobs", "ref_logprobs"])))
    token, number = draw(st.sampled_from([np.int32, np.int64])), draw(st.sampled_from([np.float32, np.float64]))
    return {
        "tokens": random.integers(np.iinfo(token).min, np.iinfo(token).max, total, token),
        "offsets": offsets_of(flags),
        "sampled": np.array(list(itertools.chain(*flags)), draw(st.sampled_from([np.bool_, np.uint8]))),
        "ids": ints(draw(st.lists(st.integers(0, count - 1), max_size=9)) if flags else []),
        "rows": ints([draw(st.integers(0, len(each) - 1)) for each in flags]),
        "advantages": np.array(draw(st.lists(eighths, min_size=count, max_size=count)), number),
        "weights": np.array(draw(st.lists(eighths, min_size=count, max_size=count)), number),
        "logprobs": {name: random.normal(size=total).astype(np.float32) for name in names},
        "live": draw(st.sampled_from([None, "weight", "advantage"])),
        "narrow": token is np.int32 and draw(st.booleans()),
    }


def in_a_tuple(column_T: NDArray[Any], offsets_N1: NDArray[np.int64]) -> tuple[NDArray[Any], ...]:
    return tuple(split(column_T, offsets_N1))


forms = st.sampled_from([flat, split, in_a_tuple])


@given(batches(), forms, st.integers(0, 3), st.booleans())
def test_fill_is_the_naive_one(batch, form, threads, with_arena):
    arena = packing.Arena() if with_arena else None
    assert_same(fill(batch, form, threads=threads, arena=arena), naive.fill(**batch))


@given(batches(), forms, st.data())
def test_fill_of_many_micro_batches_is_that_of_each(batch, form, data):
    count = len(batch["ids"])
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=5)))
    bins_M1 = ints([0, *cuts, count])
    filled = fill(batch, form, bins_M1=bins_M1)
    assert len(filled) == len(bins_M1) - 1
    for made, (a, b) in zip(filled, itertools.pairwise(bins_M1), strict=True):
        assert_same(made, naive.fill(**batch | {"ids": batch["ids"][a:b]}))


@pytest.mark.parametrize("none", [np.zeros(0, np.int32), [], ()])
@pytest.mark.parametrize("narrow", [False, True])
def test_fill_of_no_trajectory_no_sequence_and_no_micro_batch(none, narrow):
    columns = (none, ints([0]), np.zeros(0, np.bool_), ints([]), ints([]), np.ones(0), np.ones(0))
    assert packing.fill(*columns, bins_M1=ints([0]), narrow=narrow) == []
    filled = packing.fill(*columns, narrow=narrow)
    assert filled["cu_seqlens"].tolist() == [0]
    assert filled["input_ids"].dtype == (np.int32 if narrow else np.int64)


@given(batches())
def test_fill_of_trainable_rows_leaves_no_action_out(batch):
    batch["rows"] = packing.trainable_rows(batch["offsets"], batch["sampled"])
    batch["ids"] = np.arange(len(batch["rows"]))
    sampled_T = batch["sampled"] != 0
    assert fill(batch)["actions"] == sampled_T.sum() - sampled_T[batch["offsets"][:-1]].sum()


def test_fill_takes_read_only_and_subclassed_columns(tmp_path):
    tokens, sampled = np.frombuffer(bytes(16), np.int32), np.frombuffer(b"\0\1\0\1", np.bool_)
    np.full(4, 7, np.int32).tofile(tmp_path / "tokens")
    for given_tokens in (tokens, np.memmap(tmp_path / "tokens", np.int32, "r")):
        filled = packing.fill(given_tokens, ints([0, 4]), sampled, ints([0]), ints([3]), np.ones(1), np.ones(1))
        assert filled["weights"].tolist() == [1, 0, 1]
        assert filled["targets"].tolist() == given_tokens[1:].tolist()


def test_fill_copies_what_the_log_probs_of_actions_are_whatever_they_are():
    odd = np.array([0, np.nan, -np.inf, -0.0, np.nan], np.float32)
    columns = (np.zeros(5, np.int32), ints([0, 5]), np.array([0, 1, 1, 1, 0], np.uint8), ints([0]), ints([4]))
    made = packing.fill(*columns, np.ones(1), np.ones(1), old_logprobs_T=odd)["old_logprobs"]
    assert made.tobytes() == np.array([*odd[1:4], 0], np.float32).tobytes()


def test_fill_takes_the_items_of_a_tuple_and_not_what_a_subclass_of_it_iterates_over():
    class Other(tuple):
        def __iter__(self):
            yield np.full(3, 9, np.int32)

    columns = (ints([0, 3]), np.ones(3, np.bool_), ints([0]), ints([2]), np.ones(1), np.ones(1))
    assert packing.fill(Other([np.arange(3, dtype=np.int32)]), *columns)["targets"].tolist() == [1, 2]


def test_torch_takes_the_arrays_as_they_lie():
    for value in one(1000, 3).values():
        if isinstance(value, np.ndarray):
            tensor = torch.from_numpy(value)
            assert tensor.data_ptr() == value.__array_interface__["data"][0] and value.flags.writeable
            assert tensor.data_ptr() % 64 == 0


# ---- pieces and threads


LENGTHS = {
    "ragged": ragged_lengths(),
    "long": ints([150_000, 65_537, 65_536, 131_073]),
    "tiny": np.random.default_rng(7).integers(1, 4, 200_000),
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("form", [flat, split])
def test_the_result_is_the_same_for_any_number_of_threads(lengths, form):
    batch = large(lengths)
    bins_M1 = ints([0, 0, 2, 3, len(lengths)])
    expected = fill(batch, bins_M1=bins_M1, threads=1)
    for threads in (2, 7, 1024, 0):
        for made, truth in zip(fill(batch, form, bins_M1=bins_M1, threads=threads), expected, strict=True):
            assert_same(made, truth)


def gathered(batch: Batch, key: str, first: int, last: int) -> NDArray[Any]:
    """Return a column's entries from `first` to `last` of each trajectory, in the order of the batch."""
    column_T = batch["logprobs"][key] if key in batch["logprobs"] else batch[key]
    bounds = [(batch["offsets"][n], batch["offsets"][n + 1]) for n in batch["ids"]]
    return np.concatenate([column_T[a + first : b + last] for a, b in bounds])


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_rows_of_many_pieces_are_the_right_ones(lengths):
    batch = large(lengths)
    filled: Filled = fill(batch)
    rows_B = batch["rows"][batch["ids"]]
    mask_P = gathered(batch, "sampled", 1, 0)
    weights_P = np.repeat(batch["weights"][batch["ids"]], rows_B).astype(np.float32)
    expected = {
        "input_ids": gathered(batch, "tokens", 0, -1),
        "targets": gathered(batch, "tokens", 1, 0),
        "positions": np.concatenate([np.arange(rows) for rows in rows_B]),
        "action_mask": mask_P,
        "weights": np.where(mask_P, weights_P, 0),
        "advantages": np.repeat(batch["advantages"][batch["ids"]], rows_B),
        "old_logprobs": np.where(mask_P, gathered(batch, "old_logprobs", 1, 0), 0),
        "segment_ids": np.repeat(np.arange(len(rows_B)), rows_B),
        "cu_seqlens": np.concatenate([[0], np.cumsum(rows_B)]),
        "live_rows": np.flatnonzero(filled["weights"] * filled["advantages"]),
    }
    for key, values in expected.items():
        np.testing.assert_array_equal(filled[key], values, key)
    assert (filled["actions"], filled["sequences"]) == (mask_P.sum(), len(rows_B))
    assert filled["weight_sum"] == pytest.approx(filled["weights"].astype(np.float64).sum(), rel=1e-12)


def test_a_weight_that_float32_rounds_to_nothing_is_not_live():
    columns = (np.zeros(3, np.int32), ints([0, 3]), np.ones(3, np.bool_), ints([0]), ints([2]))
    for tiny, whole in itertools.permutations([np.full(1, 1e-60), np.ones(1)]):
        live = packing.fill(*columns, advantages_N=tiny, weights_N=whole, live="advantage")["live_rows"]
        assert live.tolist() == []
