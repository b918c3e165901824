"""Control a server from a trainer: call its protected endpoints with the token, one call at a time.

What a server answers is not trusted: redirects are refused, as they would take the token and the call to another host;
bodies are bounded in size and time; and an answer that has not the form it should have is an error of that server.
"""

from __future__ import annotations

import http.client
import json
import logging
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlsplit

from mgrpo.engine.inference.manifest import Manifest
from mgrpo.engine.inference.vllm import api
from mgrpo.engine.types import NO_WEIGHTS, WeightsVersion

log = logging.getLogger(__name__)

MOST_BYTES = 1 << 20  # of an answer
Value = TypeVar("Value")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Leave a redirect to the caller, as an HTTPError with its status."""

    def redirect_request(self, *_: Any) -> None:
        return None


# Never through the user's web proxy, and never to another place than the one asked for.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)


class ServerError(OSError):
    """Report a server that answers with an error, too late, or not at all."""


class ServerControl:
    """Control one server. timeout: seconds it may take to answer. Raises ValueError if `url` is invalid.

    version: of its weights, as last seen. stalled: duration of its last pause in seconds.
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
        label = self._ask(api.LABEL, "label", str)
        try:
            self.version = api.read_label(label)
        except ValueError as error:
            raise ServerError(f"{self.url}: {error}") from error
        if self.version == NO_WEIGHTS:
            self.checked = self.joined = self.asleep = self.settled = False

    def name(self, version: WeightsVersion) -> None:
        """Label the weights that the server now has. Raises ServerError if it then reports another label."""
        body = {"version": version.optimizer_steps, "step": version.rl_steps}
        found = self._value(api.LABEL, self.post(api.LABEL, body), "label", str)
        if found != api.label(version):
            raise ServerError(f"{self.url}: its engines report weights {found}: expected {version}")
        self.version = version

    def check(self, manifest: Manifest, transfer: str) -> None:
        """Check that the server can take these weights in this way.

        Raises ValueError for an unsupported version of vLLM, another model, or a server started for another use.
        """
        if self.checked:
            return
        api.check_version(self._ask(api.VERSION, "version", str), self.url)
        request = {"method": "check", "args": [json.dumps({"weights": manifest, "transfer": transfer})]}
        for found in self._value(api.WORKERS, self.post(api.WORKERS, request), "results", list):
            if found:
                raise ValueError(f"{self.url}: {found.get('error') if isinstance(found, dict) else found}")
        self.checked = True

    def workers(self) -> int:
        """Return the number of the server's worker processes."""
        return self._ask(api.WORLD, "world_size", int)

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
                found = json.loads(self._body(response))
        except urllib.error.HTTPError as error:
            raise self._refused(path, error) from error
        except (OSError, ValueError, http.client.HTTPException, RecursionError) as error:
            raise ServerError(f"{self.url}{path}: {error}") from error
        if not isinstance(found, dict):
            raise ServerError(f"{self.url}{path}: {found!r:.100} answered: expected a JSON object")
        return found

    def _body(self, response: Any) -> bytes:
        """Read a body. Raises ValueError if it is longer than MOST_BYTES, or not at its end within `timeout`."""
        body, until = b"", time.monotonic() + self.timeout
        while part := response.read1(MOST_BYTES):
            body += part
            if len(body) > MOST_BYTES:
                raise ValueError(f"an answer of more than {MOST_BYTES} bytes")
            if time.monotonic() > until:
                raise ValueError(f"no end of the answer within {self.timeout} s")
        return body

    def _ask(self, path: str, key: str, kind: type[Value]) -> Value:
        """Return one value that the server tells. Raises as `post` does."""
        return self._value(path, self._call("GET", path), key, kind)

    def _value(self, path: str, found: dict[str, Any], key: str, kind: type[Value]) -> Value:
        """Return one value of an answer. Raises ServerError if it is not there, or of another type."""
        value = found.get(key)
        if not isinstance(value, kind):
            raise ServerError(f"{self.url}{path}: {key} is {value!r:.100}: expected {kind.__name__}")
        return value

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
