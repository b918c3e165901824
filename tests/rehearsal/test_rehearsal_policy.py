"""A policy's step, its micro-batches and its sampler as they run on a GPU, up to the numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from rehearsal import GPU, rehearse, skip_unless_rehearsed
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mgrpo.engine.batch.micro_batches import Batch, make_arena, prefetch
from mgrpo.engine.batch.packing import pack
from mgrpo.engine.inference.in_process import draw
from mgrpo.engine.model import attention, causal_lm
from mgrpo.engine.model.cpu_attention import Bucket, buckets
from mgrpo.engine.model.logits import LogitMap
from mgrpo.engine.policy.policy import Policy
from mgrpo.kernels import Objective

skip_unless_rehearsed()

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}
ROWS, SEQUENCES = 40, 4
KINDS = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 7},
}


def config(kind: str) -> PreTrainedConfig:
    return CONFIG_MAPPING[kind](**SMALL, **KINDS[kind])


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the comparison of a model with itself, which is all about numbers, and a move to where it is."""

    def stay(module: nn.Module, device: torch.device) -> nn.Module:
        assert all(x.device == device for x in module.parameters())
        return module

    def planned(lengths: list[int], device: torch.device) -> list[Bucket]:
        """Plan with numbers, on the host, and return places without numbers on the GPU."""
        with _disable_current_modes():
            parts = buckets(lengths)
        return [
            Bucket(*(torch.empty(len(x), device=device, dtype=x.dtype) for x in _places(part)), part.longest)  # type: ignore[arg-type]
            for part in parts
        ]

    monkeypatch.setattr(attention, "buckets", planned)
    monkeypatch.setattr(causal_lm, "check_exact", lambda *_, **__: LogitMap())
    monkeypatch.setattr(nn.Module, "to", stay)  # which cannot swap a parameter without numbers


def _places(part: Bucket) -> tuple[Tensor, ...]:
    return part.tokens_P, part.flat, part.places


def batch(rows: int = ROWS) -> Batch:
    """Return a micro-batch on the GPU."""
    longs = [torch.empty(rows, device=GPU, dtype=torch.int64) for _ in range(3)]
    floats = [torch.empty(rows, device=GPU) for _ in range(3)]
    bounds = torch.empty(SEQUENCES + 1, device=GPU, dtype=torch.int32)
    ids, positions, targets = longs
    return Batch(ids, positions, targets, bounds, rows // 2, floats[0], floats[1], sampler_logprobs_P=floats[2])


def answer(read: Tensor) -> Any:
    """Answer a loss's checks, lengths of sequences, finite norms, and the counts of tokens."""
    if read.ndim == 0:
        return 1.0 if read.is_floating_point() else 1
    if len(read) == SEQUENCES:
        return [ROWS // SEQUENCES] * SEQUENCES
    return [0] * (len(read) - 1) + [ROWS]


def model_of(kind: str, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device(GPU):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config(kind), dtype=dtype)
    return made


@pytest.mark.usefixtures("placed")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_a_policys_step(kind: str, dtype: torch.dtype) -> None:
    with rehearse(answer) as done:
        policy = Policy.of(model_of(kind, dtype))
        weights = dict(policy.model.named_parameters())
        assert all(x.is_cuda and x.dtype == dtype for x in weights.values())
        done.reads.clear()
        found = policy.forward_backward([batch(), batch()], Objective())
        assert done.kernels["row_kernel"] == 2
        assert all(x.shape == (ROWS,) and x.is_cuda for x in found.logprobs)
        masters = policy.masters.weights
        assert all(
            x.grad is not None and x.grad.shape == x.shape and x.dtype == torch.float32 for x in masters.values()
        )
        policy.optim_step()
        assert policy.version == 1 and all(x.is_cuda for x in policy.masters.weights.values())
        reads = [read for read in done.reads if read != "tolist of a CPU tensor"]
    assert len(reads) <= 60, reads


@pytest.mark.usefixtures("placed")
def test_the_weights_for_a_server_are_whole_and_on_the_host() -> None:
    with rehearse(answer):
        policy = Policy.of(model_of("qwen3", torch.bfloat16))
        sent = dict(policy.full_weights())
        assert sent.keys() == dict(policy.model.named_parameters()).keys()
        assert all(x.device.type == "cpu" and x.dtype == torch.bfloat16 for x in sent.values())


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_draw(top_p: float) -> None:
    with rehearse(lambda read: [[0.0] * read.shape[1]] * read.shape[0]) as done:
        logits_RV = torch.empty(8, 512, device=GPU)
        tokens, logprobs = draw(logits_RV, 0.9, top_p, [0.5] * 8, [False] * 8)
        assert len(tokens) == len(logprobs) == 8
    assert done.reads == ["tolist"] and not done.waits


def test_prefetch_on_real_streams_from_pinned_memory() -> None:
    """Copy for real: memory of this GPU is the host's."""
    arena = make_arena(GPU)
    tokens = [np.arange(100) + n for n in range(4)]
    sampled = [np.arange(100) > 10] * 4
    (batches,) = pack(tokens, sampled, np.ones(4), np.ones(4), 100, arena=arena)
    made = [Batch.of(one) for one in batches]
    assert len(made) == 4 and all(one.input_ids_P.is_pinned() for one in made)
    for before, moved in zip(made, prefetch(iter(made), GPU), strict=True):
        assert moved.input_ids_P.is_cuda and moved.input_ids_P.shape == before.input_ids_P.shape
