"""Weights on a TCP connection from a trainer to a server's worker: frames, one per tensor, then an end.

A frame is a length (4 bytes, big-endian), as many bytes of JSON `[name, dtype, shape]`, and the tensor's own bytes; a
length of 0 is the end, and a stream without one was cut off. The worker calls, and says a secret first that it was told
over the server's guarded HTTP: whoever else calls is turned away.

Departs from a gloo process group, which was the other choice for CPUs: a group must be formed again whenever a server
starts again, one dead member holds up all, and its store listens on every interface without asking who calls. Here each
worker's connection stands and fails alone. It is no encryption: between machines, as with NCCL, use a private network.
"""

from __future__ import annotations

import hmac
import json
import socket
import struct
from collections.abc import Iterator

import torch
from torch import Tensor

LENGTH = struct.Struct(">I")
LONGEST = 1 << 16  # bytes of a frame's JSON


def send_tensor(connection: socket.socket, name: str, tensor: Tensor) -> None:
    """tensor: any dtype, on any device. Raises OSError."""
    head = json.dumps([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]).encode()
    connection.sendall(LENGTH.pack(len(head)) + head)
    connection.sendall(_bytes(tensor.detach().cpu().contiguous()))


def send_end(connection: socket.socket) -> None:
    connection.sendall(LENGTH.pack(0))


def receive_tensors(connection: socket.socket) -> Iterator[tuple[str, Tensor]]:
    """Up to the end, on the CPU. Raises ConnectionError when the stream is cut off, ValueError for what is no frame."""
    while length := LENGTH.unpack(_exactly(connection, LENGTH.size))[0]:
        if length > LONGEST:
            raise ValueError(f"a frame's head of {length} bytes: expected at most {LONGEST}")
        name, dtype, shape = json.loads(_exactly(connection, length))
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        _fill(connection, _bytes(tensor))
        yield name, tensor


def send_secret(connection: socket.socket, secret: str) -> None:
    connection.sendall(secret.encode())


def knows_secret(connection: socket.socket, secret: str) -> bool:
    """Whether the caller says it. Raises OSError when it says too little."""
    return hmac.compare_digest(_exactly(connection, len(secret.encode())), secret.encode())


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    _fill(connection, memoryview(data))
    return bytes(data)


def _fill(connection: socket.socket, view: memoryview) -> None:
    while view:
        count = connection.recv_into(view)
        if not count:
            raise ConnectionError("the weights' stream was cut off")
        view = view[count:]


def _bytes(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's memory."""
    return tensor.view(-1).view(torch.uint8).numpy().data
