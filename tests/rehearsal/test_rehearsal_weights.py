"""Weights on their way to servers, up to the NCCL call: they stay on the GPU, and nothing waits while servers pause."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from rehearsal import GPU, Rehearsal, rehearse, skip_unless_rehearsed
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from mgrpo.engine.inference.manifest import manifest_of
from mgrpo.engine.inference.vllm import api, transfer_native
from mgrpo.engine.inference.vllm.control import ServerControl
from mgrpo.engine.inference.vllm.transfer_native import NativeTransfer
from mgrpo.engine.model import causal_lm
from mgrpo.engine.model.logits import LogitMap
from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.types import WeightsVersion

skip_unless_rehearsed()

VERSION = WeightsVersion(1, 1)
SMALL = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class ParamMeta:
    """Describe a weight, as vLLM does."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Server(ServerControl):
    """Stand in for one server: note how many copies the host had awaited at each call."""

    def __init__(self, done: Rehearsal):
        super().__init__("http://server:1", "token", 1.0)
        self.done, self.marks = done, list[tuple[str, int]]()

    def workers(self) -> int:
        return 1

    def post(self, path: str, body: Any = None) -> dict[str, Any]:
        self.marks.append((path, len(self.done.waits)))
        return {"label": api.label(VERSION)}


class Engine:
    """Pack weights as vLLM's engine does, up to its NCCL call."""

    def __init__(self, source: Any):
        self.source, self.sent = source, list[tuple[str, Tensor]]()

    def send_weights(self) -> None:
        for meta, (name, tensor) in zip(self.source.metadata(), self.source, strict=True):
            assert (meta.name, meta.dtype, meta.shape) == (name, tensor.dtype, tuple(tensor.shape)) and tensor.is_cuda
            packed = tensor.contiguous().view(torch.uint8).view(-1)
            assert packed.is_cuda and packed.numel() == tensor.nbytes  # what `broadcast` would get
            self.sent.append((name, tensor))


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the one module of vLLM that the trainer's side takes classes from."""
    module = ModuleType("vllm.distributed.weight_transfer")
    module.ParamMeta, module.WeightSource = ParamMeta, type("WeightSource", (), {})  # type: ignore[attr-defined]
    for name in ("vllm", "vllm.distributed", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(transfer_native, "_trainer_engine", lambda info, client, source: Engine(source))
    monkeypatch.setattr(NativeTransfer, "_init_info", lambda self: None)


def policy_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> Policy:
    monkeypatch.setattr(causal_lm, "check_exact", lambda *_, **__: LogitMap())
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: module)
    config = AutoConfig.for_model("qwen3", head_dim=16, **SMALL)
    with torch.device(GPU):
        return Policy.of(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))


@pytest.mark.usefixtures("vllm")
def test_weights_go_from_the_gpu_to_the_nccl_call(monkeypatch: pytest.MonkeyPatch) -> None:
    with rehearse(lambda read: 1.0) as done:
        policy = policy_on_the_gpu(monkeypatch)
        manifest = manifest_of(policy.masters.params, policy.dtype)
        transfer, server = NativeTransfer("nccl", manifest), Server(done)
        done.waits.clear()
        launched = done.total
        assert transfer.send_weights([server], policy.full_weights(on_host=False), VERSION) == [server]
        assert server.marks == [(api.PAUSE, 0), (api.LABEL, 0), (api.RESUME, 0)]
        assert done.total == launched  # nothing is copied or computed on the way: these are the model's own weights
        assert [name for name, _ in transfer.engine.sent] == list(manifest)
        own = dict(policy.model.named_parameters())
        assert all(tensor.untyped_storage() is own[name].untyped_storage() for name, tensor in transfer.engine.sent)
