"""Control a server from a trainer: call its protected endpoints with the token, one call at a time."""

from __future__ import annotations

import json
import logging
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from mgrpo.engine.inference.manifest import Manifest
from mgrpo.engine.inference.vllm import api
from mgrpo.engine.types import NO_WEIGHTS, WeightsVersion

log = logging.getLogger(__name__)

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through the user's web proxy


class ServerError(OSError):
    """Report a server that answers with an error, too late, or not at all."""


class ServerControl:
    """Control one server. timeout: seconds it may take to answer. Raises ValueError if `url` is invalid.

    version: of its weights, as last seen. stalled: seconds between its last pause and the end of that.
    """

    def __init__(self, url: str, token: str, timeout: float):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
            raise ValueError(f"server {url!r}: expected http://host:port")
        self.url, self.token, self.timeout = url.rstrip("/"), token, timeout
        self.host, self.port = parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme]
        self.version = NO_WEIGHTS
        self.checked = False  # it was found able to take the trainer's weights
        self.joined = False  # it is in the trainer's group, if the transfer needs one
        self.asleep = False
        self.settled = False  # it got its weights from this trainer process, and samples with them
        self.stalled = 0.0

    def look(self) -> None:
        """Ask which weights the server has. If no trainer has sent it any, it was restarted."""
        label = str(self._call("GET", api.LABEL)["label"])
        try:
            self.version = api.read_label(label)
        except ValueError as error:
            raise ServerError(f"{self.url}: {error}") from error
        if self.version == NO_WEIGHTS:
            self.checked = self.joined = self.asleep = self.settled = False

    def name(self, version: WeightsVersion) -> None:
        """Label the weights that the server now has. Raises ServerError if it then reports another label."""
        body = {"version": version.optimizer_steps, "step": version.rl_steps}
        found = self.post(api.LABEL, body)["label"]
        if found != api.label(version):
            raise ServerError(f"{self.url}: its engines report weights {found}: expected {version}")
        self.version = version

    def check(self, manifest: Manifest, transfer: str) -> None:
        """Check that the server can take these weights in this way.

        Raises ValueError for an unsupported version of vLLM, another model, or a server started for another use.
        """
        if self.checked:
            return
        api.check_version(str(self._call("GET", api.VERSION)["version"]), self.url)
        request = {"method": "check", "args": [json.dumps({"weights": manifest, "transfer": transfer})]}
        for found in self.post(api.WORKERS, request)["results"]:
            if found:
                raise ValueError(f"{self.url}: {found['error']}")
        self.checked = True

    def workers(self) -> int:
        """Return the number of the server's worker processes."""
        return int(self._call("GET", api.WORLD)["world_size"])

    def pause(self) -> None:
        """Stop sampling until `resume`. Running calls are kept."""
        self._paused = time.monotonic()
        if self.asleep:
            self.post(api.WAKE_WEIGHTS)
        self.post(api.PAUSE)

    def resume(self) -> None:
        """Go on sampling after `pause`."""
        if self.asleep:
            self.post(api.WAKE_CACHE)
            self.asleep = False
        self.post(api.RESUME)
        self.stalled = time.monotonic() - self._paused

    def sleep(self) -> None:
        """Free the GPU's memory until the next weights arrive."""
        self.post(api.SLEEP)
        self.asleep, self.settled = True, False

    def stop(self) -> None:
        """Make the server's process end with a failure."""
        self.post(api.STOP)

    def own_address(self) -> str:
        """Return this machine's address, as the server sees it."""
        try:
            with socket.create_connection((self.host, self.port), self.timeout) as connection:
                return str(connection.getsockname()[0])
        except OSError as error:
            raise ServerError(f"{self.url}: {error}") from error

    def post(self, path: str, body: Any = None) -> dict[str, Any]:
        """Send a request and return the parsed response.

        Raises ServerError, or ValueError if the server was started or is called in the wrong way.
        """
        return self._call("POST", path, None if body is None else json.dumps(body).encode())

    def _call(self, method: str, path: str, data: bytes | None = None) -> dict[str, Any]:
        headers = api.bearer(self.token) | ({"Content-Type": "application/json"} if data else {})
        request = urllib.request.Request(self.url + path, data=data, headers=headers, method=method)
        try:
            with DIRECT.open(request, timeout=self.timeout) as response:
                found: dict[str, Any] = json.load(response)
                return found
        except urllib.error.HTTPError as error:
            raise self._refused(path, error) from error
        except (OSError, ValueError) as error:
            raise ServerError(f"{self.url}{path}: {error}") from error

    def _refused(self, path: str, error: urllib.error.HTTPError) -> Exception:
        if error.code == 401:
            return ValueError(f"{self.url}: the token is wrong: expected the server's")
        if error.code == 404:
            return ValueError(f"{self.url} has no {path}: expected a server that was started by `api.arguments`")
        return ServerError(f"{self.url}{path}: status {error.code}: {error.read(500).decode(errors='replace')}")


def each(
    act: Callable[[ServerControl], object], servers: Iterable[ServerControl], level: int = logging.WARNING
) -> list[ServerControl]:
    """Call act(server) for all servers at the same time, and return those for which it succeeded.

    An OSError is logged, and its server left out. When all calls have ended, raises the first ValueError, if any.
    """
    servers = list(servers)
    with ThreadPoolExecutor(max(1, len(servers))) as pool:
        futures = [pool.submit(act, server) for server in servers]
    succeeded = []
    for server, future in zip(servers, futures, strict=True):
        try:
            future.result()
            succeeded.append(server)
        except OSError as error:
            log.log(level, "server left out: %s", error)
    return succeeded
