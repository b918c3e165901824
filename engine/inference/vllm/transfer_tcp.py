"""Weights to servers by tcp: each worker calls back here, and takes them while it still samples by the old ones.

Whatever breaks off before a worker has all of it leaves its old weights in force. Only the loading is behind a pause.
"""

from __future__ import annotations

import logging
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress

from torch import Tensor

from mgrpo.engine.inference.vllm import api as adapter
from mgrpo.engine.inference.vllm import tcp_frames as wire
from mgrpo.engine.inference.vllm.control import ServerControl, ServerError, each

log = logging.getLogger(__name__)

GREETING = 5.0  # seconds that a caller may take to say the secret


def carry(
    servers: Sequence[ServerControl], tensors: Iterator[tuple[str, Tensor]], version: int, step: int
) -> list[ServerControl]:
    """Bring weights to all servers; those that have them now. The others are left out, with a warning."""
    lines = {server: Line(server) for server in servers}
    try:
        live = each(lambda server: lines[server].open(), servers)
        for name, tensor in tensors:
            live = [server for server in live if lines[server].send(name, tensor)]
        live = [server for server in live if lines[server].end()]
    finally:
        for line in lines.values():
            line.close()
    return each(lambda server: _install(server, version, step), live)


def _install(server: ServerControl, version: int, step: int) -> None:
    try:
        server.pause()
        server.post(adapter.FINISH)
        server.name(version, step)
    finally:
        server.resume()


class Line:
    """The connections of one server's workers."""

    def __init__(self, server: ServerControl):
        self.server = server
        self.workers: list[socket.socket] = []

    def open(self) -> None:
        """Have the workers call. Raises OSError when they do not all do so in time."""
        address, count, secret = self.server.own_address(), self.server.workers(), secrets.token_hex(32)
        self._start()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with closing(socket.create_server((address, 0), family=family)) as listener:
            call = {
                "host": address,
                "port": listener.getsockname()[1],
                "secret": secret,
                "timeout": self.server.timeout,
            }
            self.server.post(adapter.UPDATE, {"update_info": call})
            until = time.monotonic() + self.server.timeout
            while len(self.workers) < count:
                listener.settimeout(max(until - time.monotonic(), 0.01))
                self._greet(listener.accept()[0], secret)

    def _start(self) -> None:
        """Begin an update. One that was left open, when it broke off or its trainer died, is given up first."""
        try:
            self.server.post(adapter.START)
        except ServerError:
            self.server.post(adapter.WORKERS, {"method": "abandon"})
            self.server.post(adapter.START)

    def _greet(self, caller: socket.socket, secret: str) -> None:
        """Keep it if it is a worker."""
        caller.settimeout(GREETING)
        with suppress(OSError):  # it said too little
            if wire.knows_secret(caller, secret):
                caller.settimeout(self.server.timeout)
                self.workers.append(caller)
                return
        caller.close()
        log.warning("%s: a caller that did not know the secret was turned away", self.server.url)

    def send(self, name: str, tensor: Tensor) -> bool:
        """Whether the workers took it."""
        return self._to_all(lambda worker: wire.send_tensor(worker, name, tensor))

    def end(self) -> bool:
        return self._to_all(wire.send_end)

    def _to_all(self, act: Callable[[socket.socket], None]) -> bool:
        try:
            for worker in self.workers:
                act(worker)
        except OSError as error:
            log.warning("server left out: %s: its weights were cut off: %s", self.server.url, error)
            return False
        return True

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
