"""Connect the ranks that train one policy together, and exchange small messages between them.

The ranks are those of a process group, ours or another launcher's; if none is given, those of the default group.

Unlike torch's collectives for objects, which use pickle, a message here is msgpack in a tensor of bytes, so nothing
that another process sends is ever executed. Messages go by gloo between CPUs, even where gradients go by NCCL. Without
torchrun's environment a process is alone, and every function here works for one rank as it does for many.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from mgrpo.engine.system.process import RENDEZVOUS, ended_at_once

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@contextmanager
def joined(device: torch.device, timeout: float = 600.0) -> Iterator[None]:
    """Join the group as the rank that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of torchrun name.

    In every exchange a rank waits at most `timeout` seconds for the others and then raises RuntimeError (on a GPU NCCL
    may end the process); it raises at once if the death of a rank closes its connection. So no rank may keep the others
    waiting for longer: a rank that itself waits for something tells them so regularly, by `broadcast`.

    After an error the group is not shut down in order, because that would wait for the ranks that failed. Raises
    ValueError if the environment is incomplete, or names more ranks on this machine than it has GPUs. While the ranks
    wait for each other, Ctrl-C ends the process at once.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if os.environ.get("MASTER_ADDR") in LOOPBACK:  # one machine: nothing needs to listen on its network
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    if device.type == "cuda":
        _take_gpu(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    meeting = os.environ.get(RENDEZVOUS, "env://")
    if "RANK" not in os.environ:
        raise ValueError("RANK is not set: expected what torchrun sets beside WORLD_SIZE")
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with ended_at_once():
        dist.init_process_group(backend, meeting, timedelta(seconds=timeout), world_size=ranks, rank=rank)
    yield
    dist.destroy_process_group()


def _take_gpu(local_rank: int) -> None:
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(f"LOCAL_RANK: {local_rank} given: expected less than {count}, the GPUs of this machine")
    torch.cuda.set_device(local_rank)


def rank(group: ProcessGroup | None = None) -> int:
    """Return the number of this rank in the group, 0 if the process is alone."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def ranks(group: ProcessGroup | None = None) -> int:
    """Return how many ranks the group has, 1 if the process is alone."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def mesh(device: torch.device, group: ProcessGroup | None = None) -> DeviceMesh:
    """Return a mesh of one dimension of the ranks' devices of that type."""
    return DeviceMesh.from_group(group or _world(), device.type)


def broadcast(message: Any, type: Any = Any, group: ProcessGroup | None = None) -> Any:
    """Return the message of rank 0 on every rank, read as `type`; ignore what the other ranks pass.

    A message is anything that msgspec can write as msgpack. Raises msgspec.ValidationError if it is not of the type.
    """
    data = msgspec.msgpack.encode(message)
    if ranks(group) > 1:
        channel = _channel(group or _world())
        size = torch.tensor(len(data))
        dist.broadcast(size, group=channel, group_src=0)
        buffer = _bytes(data, len(data)) if rank(group) == 0 else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(buffer, group=channel, group_src=0)
        data = buffer.numpy().tobytes()
    return msgspec.msgpack.decode(data, type=type)


def gather(message: Any, type: Any = Any, group: ProcessGroup | None = None) -> list[Any]:
    """Return the messages of all ranks, in their order, on every rank. They are read as in `broadcast`."""
    parts = [msgspec.msgpack.encode(message)]
    if ranks(group) > 1:
        channel = _channel(group or _world())
        sizes = [torch.zeros((), dtype=torch.int64) for _ in range(ranks(group))]
        dist.all_gather(sizes, torch.tensor(len(parts[0])), group=channel)
        longest = int(max(sizes))
        buffers = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
        dist.all_gather(buffers, _bytes(parts[0], longest), group=channel)
        parts = [buffer[: int(size)].numpy().tobytes() for buffer, size in zip(buffers, sizes, strict=True)]
    return [msgspec.msgpack.decode(part, type=type) for part in parts]


def require_alike(name: str, value: Any, group: ProcessGroup | None = None) -> None:
    """Check that all ranks give the same value, because otherwise they might wait for each other forever.

    Raises ValueError on every rank if not.
    """
    values = gather(value, group=group)
    if any(other != values[0] for other in values):
        raise ValueError(f"{name}: {values} given by the ranks: expected the same on all")


def require_success(what: str, error: Exception | None, group: ProcessGroup | None = None) -> None:
    """Wait until all ranks have tried something, and raise on every rank if it failed on any.

    The rank that failed raises its own error; the others raise OSError naming that rank.
    """
    failures = gather(None if error is None else f"{error.__class__.__name__}: {error}", group=group)
    if error is not None:
        raise error
    for at, failure in enumerate(failures):
        if failure is not None:
            raise OSError(f"{what}: rank {at} of {len(failures)} failed: {failure}")


def _world() -> ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world


def _channel(group: ProcessGroup) -> ProcessGroup:
    """Return a group for messages between CPUs: the group itself, or a new one of its ranks if it serves GPUs only."""
    if "cpu:" in dist.get_backend_config(group):
        return group
    return _beside(group.group_name, tuple(dist.get_process_group_ranks(group)))


@cache  # only of groups made here: to hold a group of the caller beyond its end would abort the process at exit
def _beside(_name: str, ranks: tuple[int, ...]) -> ProcessGroup:
    return dist.new_group(list(ranks), backend="gloo", use_local_synchronization=True)


def _bytes(data: bytes, size: int) -> Tensor:
    """Return the data as a (size,) uint8 tensor, padded with zeros."""
    buffer = torch.zeros(size, dtype=torch.uint8)
    buffer[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return buffer
