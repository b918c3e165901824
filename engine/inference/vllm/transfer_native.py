"""Weights to servers by vLLM's own engines, `nccl` between GPUs and `ipc` on one; vLLM is then installed here too.

The servers are paused for all of it, as their weights change while they come. If it breaks off in the middle their
weights are neither the old nor the new ones: they are told to end, and whoever watches them starts them again.

NCCL knows no dead member: the group is formed anew when servers have come or gone, but one that dies during a broadcast
holds up the trainer. Has not run on a GPU: what is tested is which calls are made, and in which order.
"""

from __future__ import annotations

import base64
import logging
import pickle
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from mgrpo.engine.inference.vllm import api as adapter
from mgrpo.engine.inference.vllm.control import Manifest, ServerControl, each

log = logging.getLogger(__name__)

BUFFER = 1 << 28  # bytes that travel together, unless one tensor has more


class Native:
    """The trainer's end. kind: nccl or ipc. Of several trainer ranks the first has one, and only with nccl."""

    def __init__(self, kind: str, manifest: Manifest):
        self.kind, self.manifest = kind, manifest
        self.members: list[ServerControl] = []
        self.client = Client([])
        self.engine: Any = None

    def carry(
        self, servers: Sequence[ServerControl], tensors: Iterator[tuple[str, Tensor]], version: int, step: int
    ) -> list[ServerControl]:
        """Bring weights to all servers; those that have them now: none, with a warning, if it failed with one."""
        paused = each(ServerControl.pause, servers)
        if not paused:
            return []
        whole = False
        try:
            self._join(paused)
            self.engine.source = _source(self.manifest, tensors)
            self.engine.send_weights()
            whole = True
        except OSError as error:
            log.warning("no server has new weights: %s", error)
        finally:
            fit = paused if whole else self._unharmed()
            named = each(lambda server: server.name(version, step), paused if whole else [])
            each(ServerControl.resume, fit)
        return named

    def _unharmed(self) -> list[ServerControl]:
        """After a failure: the servers, if none had begun. Else they are told to end."""
        servers, self.members = self.members, []
        if not self.client.begun:
            return servers
        each(ServerControl.stop, servers)
        return []

    def _join(self, servers: list[ServerControl]) -> None:
        """Meet the servers' workers, unless they are those met last."""
        if servers == self.members and all(server.joined for server in servers):
            return
        self.members = servers
        self.client = Client(servers)
        self.engine = _trainer_engine(self._meeting(), self.client, _source(self.manifest, iter(())))
        for server in servers:
            server.joined = True

    def _meeting(self) -> Any:
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        largest = max(dtype.itemsize * torch.Size(shape).numel() for shape, dtype in self.manifest.values())
        size = max(BUFFER, largest)
        if self.kind == "ipc":
            return IPCTrainerInitInfo(rank=0, packed=True, packed_buffer_size_bytes=size)
        address = self.members[0].own_address()
        with socket.create_server((address, 0)) as free:
            port = free.getsockname()[1]
        return NCCLTrainerInitInfo(
            rank=0,
            master_address=address,
            master_port=port,
            world_size=1 + sum(self.client.workers),
            packed_buffer_size_bytes=size,
        )


class Client:
    """What vLLM's engine calls, done with all servers at a time: its `VLLMWeightSyncClient`."""

    def __init__(self, servers: Sequence[ServerControl]):
        self.servers = list(servers)
        self.workers = [server.workers() for server in servers]
        self.begun = False  # an update, that has not been finished

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        offsets = {server: 1 + sum(self.workers[:i]) for i, server in enumerate(self.servers)}
        ranked = "rank_offset" in init_info  # of a group of ranks, in which the trainer is the first

        def init(server: ServerControl) -> None:
            info = init_info | ({"rank_offset": offsets[server]} if ranked else {})
            server.post(adapter.INIT, {"init_info": info})

        self._all(init)

    def start_weight_update(self) -> None:
        self.begun = True
        self._all(lambda server: server.post(adapter.START))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        handles = update_info.get("ipc_handles")
        if handles is not None:  # JSON has no room for them
            pickled = base64.b64encode(pickle.dumps(handles)).decode()
            rest = {key: value for key, value in update_info.items() if not key.startswith("ipc_handles")}
            update_info = rest | {"ipc_handles_pickled": pickled}
        self._all(lambda server: server.post(adapter.UPDATE, {"update_info": update_info}))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all(lambda server: server.post(adapter.FINISH))
        self.begun = False

    def _all(self, act: Callable[[ServerControl], object]) -> None:
        """Raises what the first raised with which it failed."""
        with ThreadPoolExecutor(len(self.servers)) as pool:
            list(pool.map(act, self.servers))


def _trainer_engine(meeting: Any, client: Client, source: Any) -> Any:
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

    return WeightTransferTrainerFactory.trainer_init(meeting, client=client, source=source)


def _source(manifest: Manifest, tensors: Iterator[tuple[str, Tensor]]) -> Any:
    """The weights of one update as vLLM's engines ask for them, on the GPU."""
    from vllm.distributed.weight_transfer import ParamMeta, WeightSource

    class Source(WeightSource):
        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(name, dtype, tuple(shape)) for name, (shape, dtype) in manifest.items()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            for name, tensor in tensors:
                yield name, tensor.to(torch.accelerator.current_accelerator())

    return Source()
