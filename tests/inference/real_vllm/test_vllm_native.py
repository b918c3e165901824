"""vLLM's own trainer engines as `native.py` drives them: the real classes, with the GPU's part cut out.

What is left to a GPU: the broadcast itself, the handles of its memory, and what the workers make of either.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from fake_server import TOKEN, FakeServer, serve
from mgrpo.engine.inference.vllm import api as adapter
from mgrpo.engine.inference.vllm.transfer_native import BUFFER, Client
from mgrpo.engine.inference.vllm.weight_transfer import Transfer

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")
from vllm.distributed.weight_transfer import VLLMWeightSyncClient, ipc_engine, nccl_engine
from vllm.distributed.weight_transfer.packed_tensor import PackedIpcChunk

pytestmark = pytest.mark.vllm

WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b.weight": torch.ones(4, dtype=torch.bfloat16)}
MANIFEST = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in WEIGHTS.items()}
UPDATE = [adapter.START, adapter.UPDATE, adapter.FINISH, adapter.LABEL, adapter.RESUME]
FIRST = [adapter.WORKERS, adapter.PAUSE, adapter.WORLD, adapter.INIT, *UPDATE]


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(serve(FakeServer(workers))) for workers in (2, 1)]


def bodies(server: FakeServer, path: str) -> list[Any]:
    return [body for called, body in server.bodies if called == path]


def test_our_client_is_one_to_vllm():
    assert isinstance(Client([]), VLLMWeightSyncClient)


def test_nccl(servers: list[FakeServer], monkeypatch: pytest.MonkeyPatch):
    engine, infos, sent = nccl_engine.NCCLTrainerWeightTransferEngine, [], []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", infos.append)
    monkeypatch.setattr(
        engine, "_broadcast", lambda self, source, meta: sent.append(dict(self._checked_iter(source, meta)))
    )
    monkeypatch.setattr(engine, "_post_send_sync", lambda self: None)
    transfer = Transfer([server.url for server in servers], TOKEN, "nccl", MANIFEST)
    for version in (1, 2):
        assert len(transfer.update(WEIGHTS.items(), version, version)) == 2
    (info,) = infos
    assert (info.rank, info.world_size, info.packed_buffer_size_bytes) == (0, 1 + 3, BUFFER)
    for server, offset in zip(servers, (1, 3), strict=True):
        assert server.calls == [*FIRST, adapter.PAUSE, *UPDATE] and not server.paused
        (told,) = (body["init_info"] for body in bodies(server, adapter.INIT))
        assert (told["rank_offset"], told["world_size"], told["packed"]) == (offset, 4, True)
        assert (told["master_address"], told["master_port"]) == (info.master_address, info.master_port)
        for body in bodies(server, adapter.UPDATE):
            found = body["update_info"]
            assert (found["names"], found["dtype_names"]) == (["a", "b.weight"], ["float32", "bfloat16"])
            assert found["shapes"] == [[2, 3], [4]]
    assert len(sent) == 2 and all(torch.equal(one[name], WEIGHTS[name]) for one in sent for name in WEIGHTS)


def test_ipc(servers: list[FakeServer], monkeypatch: pytest.MonkeyPatch):
    def begin(
        self: Any, *, client: Any, source: Any, is_sender: bool, packed: bool, packed_buffer_size_bytes: int
    ) -> None:
        self.client, self.source, self.is_sender, self.packed = client, source, is_sender, packed
        self.packed_buffer_size_bytes, self.gpu_uuid = packed_buffer_size_bytes, "gpu-1"

    def producer(iterator: Any, gpu_uuid: str, post_iter_func: Any, buffer_size_bytes: int) -> Iterator[PackedIpcChunk]:
        found = dict(iterator)
        assert all(torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS) and buffer_size_bytes == BUFFER
        yield PackedIpcChunk(list(found), [[2, 3], [4]], ["float32", "bfloat16"], [24, 8], {gpu_uuid: (1, b"handle")})

    engine = ipc_engine.IPCTrainerWeightTransferEngine
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
    monkeypatch.setattr(engine, "__init__", begin)
    monkeypatch.setattr(engine, "_post_send_sync", staticmethod(lambda: None))
    monkeypatch.setattr(ipc_engine, "packed_ipc_producer", producer)
    transfer = Transfer([server.url for server in servers], TOKEN, "ipc", MANIFEST)
    assert len(transfer.update(WEIGHTS.items(), 1, 1)) == 2
    for server in servers:
        assert server.calls == FIRST and not server.paused
        assert bodies(server, adapter.INIT) == [{"init_info": {"packed": True}}]
        (body,) = bodies(server, adapter.UPDATE)
        found = ipc_engine.IPCWeightTransferUpdateInfo  # what a worker reads it with
        monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        assert found(**body["update_info"]).ipc_handles == {"gpu-1": (1, b"handle")}
        assert pickle.loads(base64.b64decode(body["update_info"]["ipc_handles_pickled"])) == {"gpu-1": (1, b"handle")}
