"""New weights into an agent's running servers: the trainer's side of vLLM's weight transfer.

Running calls are kept, never aborted: a server that was paused goes on with them, and computes their keys and values
again by the new weights. One way is chosen for all servers (`adapter.TRANSFERS`):

tcp   a worker calls back and takes them while it samples (`serving/stream.py`); the pause is for the loading alone.
nccl  vLLM's own, between GPUs: one broadcast to all servers, which are paused for it (`serving/native.py`).
ipc   vLLM's own, for servers on the GPU of the trainer, which is one process.

A server that does not answer is left out and keeps its weights and their label. Once it answers again, or was started
again, it is among those that `behind` lists; as are all servers for a trainer that was itself started again, since the
one before it may have left them paused.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence

from torch import Tensor

from mgrpo.engine.inference.vllm import api as adapter
from mgrpo.engine.inference.vllm import transfer_tcp as stream
from mgrpo.engine.inference.vllm.control import Manifest, ServerControl, each
from mgrpo.engine.inference.vllm.transfer_native import Native

LOOK = 0.5  # seconds between two looks at servers that start


class Transfer:
    """Brings the weights of one agent to its servers.

    manifest: of each weight, by the name that `update` will be given, its shape and dtype. timeout: seconds that a
    server may take to answer, or to take in some of a tensor. Raises ValueError for a kind or a url that is none.
    """

    def __init__(self, urls: Sequence[str], token: str, kind: str, manifest: Manifest, timeout: float = 60.0):
        adapter.check_transfer(kind)
        self.servers = [ServerControl(url, token, timeout) for url in urls]
        self.kind, self.manifest = kind, manifest
        self.carry = stream.carry if kind == "tcp" else Native(kind, manifest).carry
        self.newest = adapter.UNSET

    def update(self, tensors: Iterable[tuple[str, Tensor]], version: int, step: int) -> list[str]:
        """Bring weights to every server that lacks them; returns the urls of those that took them.

        tensors, one at a time, are used up whatever happens: gathering them may be a collective. Raises ValueError for
        a server with another model, another token or an unsupported version; all else is a warning.
        """
        self.newest = adapter.label(version, step)
        rest = iter(tensors)
        try:
            ready = each(lambda server: server.check(self.manifest, self.kind), self._lacking())
            settled = self.carry(ready, rest, version, step)
        finally:
            for _ in rest:
                pass
        for server in settled:
            server.settled = True
        return [server.url for server in settled]

    @property
    def stalled(self) -> float:
        """Seconds that the last updates kept a server from sampling, of the one that waited longest."""
        return max((server.stalled for server in self.servers), default=0.0)

    def behind(self) -> list[str]:
        """Urls of the servers that answer, but have not the newest weights: `update` would bring them.

        None that sleeps: it is to wake for the next weights only.
        """
        return [server.url for server in self._lacking(logging.DEBUG) if not server.asleep]

    def wait(self, seconds: float) -> list[str]:
        """Until all servers answer, as they do once they have loaded their model, but no longer than so many seconds.

        Returns the urls of those that do not.
        """
        until = time.monotonic() + seconds
        while len(answering := each(ServerControl.look, self.servers, logging.DEBUG)) < len(self.servers):
            if time.monotonic() > until:
                break
            time.sleep(LOOK)
        return [server.url for server in self.servers if server not in answering]

    def sleep(self) -> None:
        """The servers give their GPU's memory back. The next `update` wakes them."""
        each(ServerControl.sleep, self.servers)

    def _lacking(self, level: int = logging.WARNING) -> list[ServerControl]:
        answering = each(ServerControl.look, self.servers, level)
        return [server for server in answering if server.label != self.newest or not server.settled]
