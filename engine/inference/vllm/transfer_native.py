"""Send weights to servers by vLLM's own engines: `nccl` between GPUs, `ipc` on one GPU. They need vLLM installed here.

The servers are paused during the whole transfer, because their weights change while they arrive. So what can be done
before is: weights that several ranks share are gathered on this GPU, as many as fit. None is copied to the host. If the
transfer fails in the middle, the servers' weights are neither the old nor the new ones. They are then told to stop, and
their supervisor restarts them.

NCCL does not notice a dead member. The group is formed again when servers have come or gone, but a server that dies
during a broadcast blocks the trainer. This module has not run on a GPU: tests check the calls it makes and their order.
"""

from __future__ import annotations

import base64
import logging
import pickle
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from mgrpo.engine.inference.manifest import Manifest
from mgrpo.engine.inference.vllm import api
from mgrpo.engine.inference.vllm.control import ServerControl, each
from mgrpo.engine.types import WeightsVersion

log = logging.getLogger(__name__)

BUFFER = 1 << 28  # bytes sent together; more if a single tensor is larger


class NativeTransfer:
    """Send weights from the trainer. kind: nccl or ipc. With several trainer ranks, only nccl works, from rank 0."""

    def __init__(self, kind: str, manifest: Manifest):
        self.kind, self.manifest = kind, manifest
        self.members: list[ServerControl] = []
        self.client = SyncClient([])
        self.engine: Any = None

    def send_weights(
        self, servers: Sequence[ServerControl], tensors: Iterator[tuple[str, Tensor]], version: WeightsVersion
    ) -> list[ServerControl]:
        """Send weights to all servers, and return those that have them now: none, with a warning, if one fails."""
        ready = _gathered(tensors, _room() if self.kind == "nccl" else 0) if servers else []
        paused = each(ServerControl.pause, servers)
        if not paused:
            return []
        whole = False
        try:
            self._join(paused)
            self.engine.source = _source(self.manifest, chain(ready, tensors))
            self.engine.send_weights()
            whole = True
        except OSError as error:
            log.warning("no server has new weights: %s", error)
        finally:
            usable = paused if whole else self._unharmed()
            named = each(lambda server: server.name(version), paused if whole else [])
            each(ServerControl.resume, usable)
        return named

    def _unharmed(self) -> list[ServerControl]:
        """Return the servers after a failure if no update had begun; otherwise stop them and return none."""
        servers, self.members = self.members, []
        if not self.client.begun:
            return servers
        each(ServerControl.stop, servers)
        return []

    def _join(self, servers: list[ServerControl]) -> None:
        """Form a group with the servers' workers, unless it is the last group."""
        if servers == self.members and all(server.joined for server in servers):
            return
        self.members = servers
        self.client = SyncClient(servers)
        self.engine = _trainer_engine(self._init_info(), self.client, _source(self.manifest, iter(())))
        for server in servers:
            server.joined = True

    def _init_info(self) -> Any:
        """Return what vLLM's engine needs to form a group."""
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        sizes = [getattr(torch, dtype).itemsize * torch.Size(shape).numel() for dtype, shape in self.manifest.values()]
        size = max(BUFFER, *sizes)
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


class SyncClient:
    """Pass the calls of vLLM's engine on to all servers at the same time, as its `VLLMWeightSyncClient`."""

    def __init__(self, servers: Sequence[ServerControl]):
        self.servers = list(servers)
        self.workers = [server.workers() for server in servers]
        self.begun = False  # an update was begun and has not been finished

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        offsets = {server: 1 + sum(self.workers[:i]) for i, server in enumerate(self.servers)}
        ranked = "rank_offset" in init_info  # there is a group of ranks, and the trainer is the first

        def init(server: ServerControl) -> None:
            info = init_info | ({"rank_offset": offsets[server]} if ranked else {})
            server.post(api.INIT, {"init_info": info})

        self._all(init)

    def start_weight_update(self) -> None:
        self.begun = True
        self._all(lambda server: server.post(api.START))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        handles = update_info.get("ipc_handles")
        if handles is not None:  # JSON cannot hold them
            pickled = base64.b64encode(pickle.dumps(handles)).decode()
            rest = {key: value for key, value in update_info.items() if not key.startswith("ipc_handles")}
            update_info = rest | {"ipc_handles_pickled": pickled}
        self._all(lambda server: server.post(api.UPDATE, {"update_info": update_info}))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all(lambda server: server.post(api.FINISH))
        self.begun = False

    def _all(self, act: Callable[[ServerControl], object]) -> None:
        """Call act(server) for all servers at the same time. Raises the first error."""
        with ThreadPoolExecutor(len(self.servers)) as pool:
            list(pool.map(act, self.servers))


def _gathered(tensors: Iterator[tuple[str, Tensor]], room: int) -> list[tuple[str, Tensor]]:
    """Take weights until they have more bytes than that, and wait until they are there.

    vLLM's engines read them in streams of their own, which wait for nothing that was begun here. They are to be kept
    until the transfer's end, since what their memory is used for next could overwrite them.
    """
    taken, size = [], 0
    for name, tensor in tensors:
        taken.append((name, tensor))
        size += tensor.nbytes
        if size > room:
            break
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return taken


def _room() -> int:
    """Return half of the bytes of memory that are free on this GPU; 0 without one."""
    return torch.cuda.mem_get_info()[0] // 2 if torch.cuda.is_available() else 0


def _trainer_engine(init_info: Any, client: SyncClient, source: Any) -> Any:
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

    return WeightTransferTrainerFactory.trainer_init(init_info, client=client, source=source)


def _source(manifest: Manifest, tensors: Iterator[tuple[str, Tensor]]) -> Any:
    """Wrap the weights of one update for vLLM's engines, which expect them on the GPU."""
    from vllm.distributed.weight_transfer import ParamMeta, WeightSource

    class Source(WeightSource):
        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(name, getattr(torch, dtype), tuple(shape)) for name, (dtype, shape) in manifest.items()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            for name, tensor in tensors:
                yield name, tensor.to(torch.accelerator.current_accelerator())

    return Source()
