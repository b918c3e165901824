"""Tensors by rows over files: however many ranks wrote them, they are read whole, or by the rows of a rank."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mgrpo.engine.model.sharding import Shards, write_shards


def write_as_ranks(folder: Path, parts: list[dict[str, Tensor]]) -> None:
    for rank, tensors in enumerate(parts):
        write_shards(folder, "weights", tensors, rank)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.integers(0, 3))
def test_rows_dealt_in_any_way_are_read_whole(rows: list[int], width: int) -> None:
    whole = torch.randn(sum(rows), width)
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_as_ranks(folder, [{"w": part, "step": torch.tensor(7.0)} for part in whole.split(rows)])
        saved = Shards(folder, "weights")
        assert saved.shapes == {"w": tuple(whole.shape), "step": ()}
        target, step = torch.full_like(whole, torch.nan), torch.zeros(())
        saved.read_into(target, "w")
        saved.read_into(step, "step")
        assert torch.equal(target, whole) and step == 7


def test_ranks_after_the_tenth_come_after_it(tmp_path: Path) -> None:
    write_as_ranks(tmp_path, [{"w": torch.tensor([rank])} for rank in range(12)])
    target = torch.zeros(12, dtype=torch.int64)
    Shards(tmp_path, "weights").read_into(target, "w")
    assert target.tolist() == list(range(12))


def test_a_file_that_is_missing_is_seen_in_the_shape(tmp_path: Path) -> None:
    write_as_ranks(tmp_path, [{"w": torch.zeros(2, 3)}] * 3)
    (tmp_path / "weights-1.safetensors").unlink()
    assert Shards(tmp_path, "weights").shapes == {"w": (2, 3)}
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(ValueError, match=r"weights\.safetensors is missing: expected the weights that were saved"):
        Shards(tmp_path, "weights")
