"""Send weights over a TCP connection from a trainer to a server's worker: a frame per tensor, then an end mark.

A frame is a length (4 bytes, big-endian), as many bytes of JSON `[name, dtype, shape]`, and the bytes of the tensor. A
length of 0 is the end mark; a stream without it was cut off. The worker connects to the trainer and first sends a
secret, which it received over the server's protected HTTP endpoints. Connections without the secret are closed.

The alternative for CPUs was a gloo process group. But a group must be formed again whenever a server restarts, one dead
member blocks all others, and its store listens on every interface and lets anyone in. Here the connections of workers
are independent and fail alone. Nothing is encrypted: between machines, use a private network, as with NCCL.
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
MOST_BYTES = 1 << 16  # of the JSON in a frame


def send_tensor(connection: socket.socket, name: str, tensor: Tensor) -> None:
    """Send one tensor, of any dtype and on any device. Raises OSError if the connection fails."""
    head = json.dumps([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]).encode()
    connection.sendall(LENGTH.pack(len(head)) + head)
    connection.sendall(_bytes(tensor.detach().cpu().contiguous()))


def send_end(connection: socket.socket) -> None:
    """Send the end mark. Raises OSError if the connection fails."""
    connection.sendall(LENGTH.pack(0))


def receive_tensors(connection: socket.socket) -> Iterator[tuple[str, Tensor]]:
    """Receive named tensors on the CPU up to the end mark.

    Raises ConnectionError if the stream is cut off, ValueError if a frame is invalid.
    """
    while length := LENGTH.unpack(_exactly(connection, LENGTH.size))[0]:
        if length > MOST_BYTES:
            raise ValueError(f"a frame's JSON has {length} bytes: expected at most {MOST_BYTES}")
        name, dtype, shape = json.loads(_exactly(connection, length))
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        _fill(connection, _bytes(tensor))
        yield name, tensor


def send_secret(connection: socket.socket, secret: str) -> None:
    """Send the secret. Raises OSError if the connection fails."""
    connection.sendall(secret.encode())


def knows_secret(connection: socket.socket, secret: str) -> bool:
    """Return whether the other side sends the secret. Raises OSError if it sends too few bytes."""
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
    """Return the memory of a contiguous CPU tensor as bytes."""
    return tensor.view(-1).view(torch.uint8).numpy().data
