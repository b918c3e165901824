"""Send new weights to an agent's running servers: the trainer's side of vLLM's weight transfer.

Running calls are kept, never aborted: a paused server continues them afterwards, and computes their keys and values
again with the new weights. All servers use the same way (`api.TRANSFERS`):

tcp   Each worker connects back and receives while it samples (`transfer_tcp`); the pause covers only the loading.
nccl  vLLM's own way between GPUs (`transfer_native`): one broadcast to all servers, which are paused for it.
ipc   vLLM's own way for servers on the GPU of the trainer, which is a single process.

A server that does not answer is left out, and keeps its weights and their label. When it answers again, or was
restarted, `behind` lists it. For a trainer that was itself restarted, `behind` lists all servers, since its predecessor
may have left them paused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from torch import Tensor

from mgrpo.engine.inference.manifest import Manifest
from mgrpo.engine.inference.vllm import api, transfer_tcp
from mgrpo.engine.inference.vllm.control import ServerControl, each
from mgrpo.engine.inference.vllm.transfer_native import NativeTransfer
from mgrpo.engine.types import NO_WEIGHTS, WeightsVersion


class Transfer:
    """Send the weights of one agent to its servers.

    kind: one of api.TRANSFERS. manifest: describes the weights under the names that `update` will get. timeout: seconds
    that a server may take to answer, or to receive a part of a tensor. Raises ValueError for an unknown kind or an
    invalid URL.
    """

    def __init__(self, urls: Sequence[str], token: str, kind: str, manifest: Manifest, timeout: float = 60.0):
        api.check_transfer(kind)
        self.servers = [ServerControl(url, token, timeout) for url in urls]
        self.kind, self.manifest = kind, manifest
        self.send_weights = transfer_tcp.send_weights if kind == "tcp" else NativeTransfer(kind, manifest).send_weights
        self.newest = NO_WEIGHTS

    def update(self, tensors: Iterable[tuple[str, Tensor]], version: WeightsVersion) -> list[str]:
        """Send weights to every server that lacks them. Return the URLs of the servers that took them.

        tensors: always consumed to the end, since gathering each may be a collective. Raises ValueError if a server has
        another model, another token or an unsupported version. All other failures are logged as warnings.
        """
        self.newest = version
        rest = iter(tensors)
        try:
            ready = each(lambda server: server.check(self.manifest, self.kind), self._lacking())
            settled = self.send_weights(ready, rest, version)
        finally:
            for _ in rest:
                pass
        for server in settled:
            server.settled = True
        return [server.url for server in settled]

    @property
    def stalled(self) -> float:
        """The longest time in seconds that a server's last update kept it from sampling."""
        return max((server.stalled for server in self.servers), default=0.0)

    def behind(self) -> list[str]:
        """Return the URLs of the servers that answer but lack the newest weights, which `update` would send.

        Sleeping servers are not listed, because only the next weights may wake them.
        """
        return [server.url for server in self._lacking(logging.DEBUG) if not server.asleep]

    def sleep(self) -> None:
        """Make the servers free their GPU's memory. The next `update` wakes them."""
        each(ServerControl.sleep, self.servers)

    def _lacking(self, level: int = logging.WARNING) -> list[ServerControl]:
        answering = each(ServerControl.look, self.servers, level)
        return [server for server in answering if server.version != self.newest or not server.settled]
