"""Test `transfer_native` with vLLM's own trainer engines, whose GPU part is replaced.

Not covered without a GPU: the broadcast itself, the handles of the GPU's memory, and what the workers do with either.
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
from mgrpo.engine.inference.manifest import manifest_of
from mgrpo.engine.inference.vllm import api
from mgrpo.engine.inference.vllm.transfer_native import BUFFER, SyncClient
from mgrpo.engine.inference.vllm.weight_transfer import Transfer
from mgrpo.engine.types import WeightsVersion

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")
from vllm.distributed.weight_transfer import VLLMWeightSyncClient, ipc_engine, nccl_engine
from vllm.distributed.weight_transfer.packed_tensor import PackedIpcChunk

pytestmark = pytest.mark.vllm

WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b.weight": torch.ones(4, dtype=torch.bfloat16)}
MANIFEST = manifest_of(WEIGHTS)
UPDATE = [api.START, api.UPDATE, api.FINISH, api.LABEL, api.RESUME]
FIRST = [api.WORKERS, api.PAUSE, api.WORLD, api.INIT, *UPDATE]


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(serve(FakeServer(workers))) for workers in (2, 1)]


def bodies(server: FakeServer, path: str) -> list[Any]:
    return [body for called, body in server.bodies if called == path]


def test_our_client_meets_vllms_protocol():
    assert isinstance(SyncClient([]), VLLMWeightSyncClient)


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
        assert len(transfer.update(WEIGHTS.items(), WeightsVersion(version, version))) == 2
    (info,) = infos
    assert (info.rank, info.world_size, info.packed_buffer_size_bytes) == (0, 1 + 3, BUFFER)
    for server, offset in zip(servers, (1, 3), strict=True):
        assert server.calls == [*FIRST, api.PAUSE, *UPDATE] and not server.paused
        (sent_info,) = (body["init_info"] for body in bodies(server, api.INIT))
        assert (sent_info["rank_offset"], sent_info["world_size"], sent_info["packed"]) == (offset, 4, True)
        assert (sent_info["master_address"], sent_info["master_port"]) == (info.master_address, info.master_port)
        for body in bodies(server, api.UPDATE):
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
    assert len(transfer.update(WEIGHTS.items(), WeightsVersion(1, 1))) == 2
    for server in servers:
        assert server.calls == FIRST and not server.paused
        assert bodies(server, api.INIT) == [{"init_info": {"packed": True}}]
        (body,) = bodies(server, api.UPDATE)
        found = ipc_engine.IPCWeightTransferUpdateInfo  # the class by which a worker reads it
        monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        assert found(**body["update_info"]).ipc_handles == {"gpu-1": (1, b"handle")}
        assert pickle.loads(base64.b64decode(body["update_info"]["ipc_handles_pickled"])) == {"gpu-1": (1, b"handle")}
