"""Test how large the fused head's buffers on a GPU are: as the free memory allows, and fixed where they must be."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mgrpo.kernels import linear_logprob
from mgrpo.kernels.linear_head import HeadPlan
from mgrpo.kernels.triton import buffers
from mgrpo.kernels.triton.buffers import LEAST_BYTES, MOST_BYTES, buffer_bytes, plan_buffers
from mgrpo.kernels.vocab_parallel import Shard

GPU = torch.device("cuda", 0)
VOCABULARY = 151_936
GIB = 1 << 30


@pytest.fixture(autouse=True)
def free_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Stand in for a GPU, whose free memory a test may change; count how often it is asked."""
    state = {"free": 60 * GIB, "held": 0, "asked": 0}

    def info(device: torch.device) -> tuple[int, int]:
        state["asked"] += 1
        return state["free"], 80 * GIB

    monkeypatch.setattr(torch.cuda, "mem_get_info", info)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: state["held"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    buffers.free_once.cache_clear()
    yield state
    buffers.free_once.cache_clear()


def plan(**more: object) -> HeadPlan:
    return HeadPlan(torch.zeros(8192), None, 1.0, torch.bfloat16, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("free", "held", "wanted"),
    [
        (60 * GIB, 0, MOST_BYTES),
        (0, 60 * GIB, MOST_BYTES),  # held by torch, but not in use
        (4 * GIB, 0, GIB),
        (0, 0, LEAST_BYTES),
    ],
)
def test_they_follow_the_memory_that_is_free(free_memory, free, held, wanted):
    free_memory.update(free=free, held=held)
    assert buffer_bytes(plan(), VOCABULARY, GPU) == wanted


def test_the_memory_is_measured_once_for_each_head(free_memory):
    sizes = {buffer_bytes(plan(), VOCABULARY, GPU)}
    free_memory.update(free=4 * GIB)
    sizes |= {buffer_bytes(plan(), VOCABULARY, GPU) for _ in range(3)}
    assert sizes == {MOST_BYTES} and free_memory["asked"] == 1
    assert buffer_bytes(plan(), 49_152, GPU) == GIB and free_memory["asked"] == 2


def test_they_are_fixed_where_results_must_not_depend_on_the_machine(free_memory, monkeypatch):
    shard = Shard(None, 0, VOCABULARY, VOCABULARY)  # type: ignore[arg-type]
    assert buffer_bytes(plan(shard=shard), VOCABULARY, GPU) == LEAST_BYTES
    assert buffer_bytes(plan(), VOCABULARY, torch.device("cpu")) == LEAST_BYTES
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert buffer_bytes(plan(), VOCABULARY, GPU) == LEAST_BYTES
    assert buffer_bytes(plan(buffer_bytes=GIB), VOCABULARY, GPU) == LEAST_BYTES
    assert free_memory["asked"] == 0


def test_a_cap_holds():
    assert buffer_bytes(plan(buffer_bytes=GIB), VOCABULARY, GPU) == GIB
    assert buffer_bytes(plan(buffer_bytes=1), VOCABULARY, GPU) == 1
    for size in (MOST_BYTES, GIB, LEAST_BYTES, 1 << 20):
        room = plan_buffers(plan(buffer_bytes=size), VOCABULARY, GPU)
        assert room.chunk * VOCABULARY * 2 + room.block * VOCABULARY * 4 <= size
    assert plan_buffers(plan(chunk_rows=5), VOCABULARY, GPU).chunk == 5


def test_with_memory_to_spare_the_large_head_takes_two_passes_over_dw():
    room = plan_buffers(plan(), VOCABULARY, GPU)
    assert len(list(buffers.tiled_slices(8192, room.chunk))) == 2
    dweight, dhidden = 4 * VOCABULARY * 4096, 2 * 8192 * 4096
    assert dweight + dhidden + buffer_bytes(plan(), VOCABULARY, GPU) < 5.6e9


@pytest.mark.parametrize("given", [0, -1])
def test_a_cap_of_nothing_is_refused(given):
    hidden, weight = torch.randn(2, 3), torch.randn(4, 3)
    with pytest.raises(ValueError, match=f"buffer_bytes: got {given}, expected a number > 0 or None"):
        linear_logprob(hidden, weight, torch.zeros(2, dtype=torch.int64), buffer_bytes=given)
