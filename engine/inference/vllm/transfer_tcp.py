"""Send weights to servers by TCP: each worker connects back, and receives while it still samples with the old weights.

A transfer that fails before a worker has received everything leaves the worker's old weights in force. Servers are
paused only while they load.
"""

from __future__ import annotations

import logging
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress

from torch import Tensor

from mgrpo.engine.inference.vllm import api, tcp_frames
from mgrpo.engine.inference.vllm.control import ServerControl, ServerError, each
from mgrpo.engine.types import WeightsVersion

log = logging.getLogger(__name__)

GREETING = 5.0  # seconds within which a caller must send the secret


def send_weights(
    servers: Sequence[ServerControl], tensors: Iterator[tuple[str, Tensor]], version: WeightsVersion
) -> list[ServerControl]:
    """Send weights to all servers, and return those that have them now. The others are left out with a warning."""
    connections_of = {server: WorkerConnections(server) for server in servers}
    try:
        live = each(lambda server: connections_of[server].open(), servers)
        for name, tensor in tensors:
            sent = tensor.cpu()
            live = [server for server in live if connections_of[server].send(name, sent)]
        live = [server for server in live if connections_of[server].end()]
    finally:
        for connections in connections_of.values():
            connections.close()
    return each(lambda server: _install(server, version), live)


def _install(server: ServerControl, version: WeightsVersion) -> None:
    """Load the received weights in a pause, and label them."""
    try:
        server.pause()
        server.post(api.FINISH)
        server.name(version)
    finally:
        server.resume()


class WorkerConnections:
    """Hold the connections from one server's workers."""

    def __init__(self, server: ServerControl):
        self.server = server
        self.workers: list[socket.socket] = []

    def open(self) -> None:
        """Make the workers connect. Raises OSError if not all of them do so in time."""
        address, count, secret = self.server.own_address(), self.server.workers(), secrets.token_hex(32)
        self._start()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with closing(socket.create_server((address, 0), family=family)) as listener:
            request = {
                "host": address,
                "port": listener.getsockname()[1],
                "secret": secret,
                "timeout": self.server.timeout,
            }
            self.server.post(api.UPDATE, {"update_info": request})
            until = time.monotonic() + self.server.timeout
            while len(self.workers) < count:
                listener.settimeout(max(until - time.monotonic(), 0.01))
                self._greet(listener.accept()[0], secret)

    def _start(self) -> None:
        """Begin an update. First abandon one that was left open because it failed or its trainer died."""
        try:
            self.server.post(api.START)
        except ServerError:
            self.server.post(api.WORKERS, {"method": "abandon"})
            self.server.post(api.START)

    def _greet(self, caller: socket.socket, secret: str) -> None:
        """Keep a connection that sends the secret, and close any other."""
        caller.settimeout(GREETING)
        with suppress(OSError):  # it sent too little
            if tcp_frames.knows_secret(caller, secret):
                caller.settimeout(self.server.timeout)
                self.workers.append(caller)
                return
        caller.close()
        log.warning("%s: closed a connection that did not send the secret", self.server.url)

    def send(self, name: str, tensor: Tensor) -> bool:
        """Send a tensor to all workers. Return whether that succeeded."""
        return self._to_all(lambda worker: tcp_frames.send_tensor(worker, name, tensor))

    def end(self) -> bool:
        """Send the end mark to all workers. Return whether that succeeded."""
        return self._to_all(tcp_frames.send_end)

    def _to_all(self, act: Callable[[socket.socket], None]) -> bool:
        try:
            for worker in self.workers:
                act(worker)
        except OSError as error:
            log.warning("server left out: %s: sending its weights failed: %s", self.server.url, error)
            return False
        return True

    def close(self) -> None:
        """Close all connections."""
        for worker in self.workers:
            worker.close()
