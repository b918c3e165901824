"""A server seen from a trainer: its control endpoints, called with the token, one call at a time."""

from __future__ import annotations

import json
import logging
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import torch

from mgrpo.engine.inference.vllm import api as adapter

log = logging.getLogger(__name__)

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a server is never behind the user's web proxy

Manifest = Mapping[str, tuple[Sequence[int], torch.dtype]]  # of each weight, by name


class ServerError(OSError):
    """A server that answers with an error, not in time, or not at all."""


class ServerControl:
    """One server. timeout: seconds it may take to answer. Raises ValueError for a url that is none."""

    def __init__(self, url: str, token: str, timeout: float):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
            raise ValueError(f"server {url!r}: expected http://host:port")
        self.url, self.token, self.timeout = url.rstrip("/"), token, timeout
        self.host, self.port = parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme]
        self.label = adapter.UNSET  # of its weights, when last seen
        self.checked = False  # that it can take the trainer's weights
        self.joined = False  # it has met the trainer, where the transfer needs that
        self.asleep = False
        self.settled = False  # it took its weights from this very trainer, and goes on with them
        self.stalled = 0.0  # seconds, from the last pause to the end of it

    def look(self) -> None:
        """See which weights it has. If no trainer has sent it any, it is one that was started again."""
        self.label = str(self._call("GET", adapter.LABEL)["label"])
        if self.label == adapter.UNSET:
            self.checked = self.joined = self.asleep = self.settled = False

    def name(self, version: int, step: int) -> None:
        """Label the weights that it has, and read that back."""
        wanted = adapter.label(version, step)
        found = self.post(adapter.LABEL, {"version": version, "step": step})["label"]
        if found != wanted:
            raise ServerError(f"{self.url}: its engines call their weights {found}: expected {wanted}")
        self.label = wanted

    def check(self, manifest: Manifest, transfer: str) -> None:
        """Raises ValueError for an unsupported version of vLLM, another model, or a server started for another use."""
        if self.checked:
            return
        adapter.check_version(str(self._call("GET", adapter.VERSION)["version"]), self.url)
        weights = {name: (str(dtype).removeprefix("torch."), list(shape)) for name, (shape, dtype) in manifest.items()}
        asked = {"method": "check", "args": [json.dumps({"weights": weights, "transfer": transfer})]}
        for found in self.post(adapter.WORKERS, asked)["results"]:
            if found:
                raise ValueError(f"{self.url}: {found['error']}")
        self.checked = True

    def workers(self) -> int:
        return int(self._call("GET", adapter.WORLD)["world_size"])

    def pause(self) -> None:
        """Running calls are kept. It samples nothing until `resume`."""
        self._paused = time.monotonic()
        if self.asleep:
            self.post(adapter.WAKE_WEIGHTS)
        self.post(adapter.PAUSE)

    def resume(self) -> None:
        if self.asleep:
            self.post(adapter.WAKE_CACHE)
            self.asleep = False
        self.post(adapter.RESUME)
        self.stalled = time.monotonic() - self._paused

    def sleep(self) -> None:
        """Give the GPU's memory back, until the next weights come."""
        self.post(adapter.SLEEP)
        self.asleep, self.settled = True, False

    def stop(self) -> None:
        """Have it end, as a failure."""
        self.post(adapter.STOP)

    def own_address(self) -> str:
        """This machine's, as the server sees it."""
        try:
            with socket.create_connection((self.host, self.port), self.timeout) as connection:
                return str(connection.getsockname()[0])
        except OSError as error:
            raise ServerError(f"{self.url}: {error}") from error

    def post(self, path: str, body: Any = None) -> dict[str, Any]:
        """Raises ServerError, or ValueError for a mistake in how the server was started or is called."""
        return self._call("POST", path, None if body is None else json.dumps(body).encode())

    def _call(self, method: str, path: str, data: bytes | None = None) -> dict[str, Any]:
        headers = adapter.bearer(self.token) | ({"Content-Type": "application/json"} if data else {})
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
            return ValueError(f"{self.url}: the token is wrong: expected that of the server")
        if error.code == 404:
            return ValueError(f"{self.url} has no {path}: expected a server that `adapter.arguments` start")
        return ServerError(f"{self.url}{path}: status {error.code}: {error.read(500).decode(errors='replace')}")


def each(
    act: Callable[[ServerControl], object], servers: Iterable[ServerControl], level: int = logging.WARNING
) -> list[ServerControl]:
    """Do it with all servers at a time; those with which it went well. The others are left out, which is logged.

    Raises the ValueError of the first for which there is one, when all are done.
    """
    servers = list(servers)
    with ThreadPoolExecutor(max(1, len(servers))) as pool:
        futures = [pool.submit(act, server) for server in servers]
    well = []
    for server, future in zip(servers, futures, strict=True):
        try:
            future.result()
            well.append(server)
        except OSError as error:
            log.log(level, "server left out: %s", error)
    return well
