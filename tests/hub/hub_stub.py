"""Serve a directory on loopback as a hub does, as far as the hub's client asks, with faults on demand."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from mgrpo.engine.hub import failures, snapshots

REPO = "tiny/toy"
UNREAD = {
    "README.md": "read me",
    "code.py": "raise SystemExit",
    "pytorch_model.bin": "pickled",
    "onnx/config.json": "{}",
}


@dataclass
class Hub:
    """Hold what is served, and what was asked for.

    commits: the directory of each commit; branches: the commit of each branch or tag. faults: what the next requests
    whose path contains a text get instead: a status, with headers, or "cut" for half of a file. open_to: the token
    without which everything but the list of files is refused as gated. asked: method, path and token of each request.
    """

    commits: dict[str, Path] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    faults: dict[str, list[Any]] = field(default_factory=dict)
    open_to: str = ""
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    url: str = ""

    def add(self, folder: Path, branch: str = "main") -> str:
        """Serve a directory as a new commit of a branch; return the commit."""
        commit = hashlib.sha1(f"{folder}{len(self.commits)}".encode()).hexdigest()
        self.commits[commit], self.branches[branch] = folder, commit
        return commit

    def downloads(self) -> list[str]:
        """Return the names of the files that were sent, in order."""
        return [path.rpartition("/")[2] for method, path, _ in self.asked if method == "GET" and "/resolve/" in path]


class Handler(BaseHTTPRequestHandler):
    """Answer as a hub does."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def _answer(self) -> None:
        path = unquote(urlparse(self.path).path)
        sent = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.hub.asked.append((self.command, path, sent))
        fault = next((queue.pop(0) for part, queue in self.hub.faults.items() if part in path and queue), None)
        if isinstance(fault, tuple):
            self._send(fault[0], b"", **fault[1])
        elif path.startswith(f"/api/models/{REPO}/revision/"):
            self._list(path.rpartition("/revision/")[2])
        elif path.startswith(f"/{REPO}/resolve/"):
            self._file(path.removeprefix(f"/{REPO}/resolve/"), sent, cut=fault == "cut")
        else:
            self._send(404, b"", X_Error_Code="RepoNotFound")

    def _list(self, revision: str) -> None:
        commit = self.hub.branches.get(revision, revision)
        if commit not in self.hub.commits:
            self._send(404, b"", X_Error_Code="RevisionNotFound")
            return
        folder = self.hub.commits[commit]
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        siblings = [{"rfilename": str(path.relative_to(folder)), "size": path.stat().st_size} for path in files]
        self._send(200, json.dumps({"id": REPO, "sha": commit, "siblings": siblings}).encode())

    def _file(self, rest: str, sent: str, cut: bool) -> None:
        commit, _, name = rest.partition("/")
        if self.hub.open_to and sent != self.hub.open_to:
            self._send(403 if sent else 401, b"", X_Error_Code="GatedRepo")
            return
        data = (self.hub.commits[commit] / name).read_bytes()
        etag = hashlib.sha1(data).hexdigest()
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        part = data[start:]
        more = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        self._send(206 if start else 200, part, cut=cut, ETag=f'"{etag}"', X_Repo_Commit=commit, **more)

    def _send(self, status: int, body: bytes, cut: bool = False, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what HF_ENDPOINT does, where the hub's client was imported already."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@contextmanager
def hub_with(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve a model's directory, beside files that training does not read. The client's cache is in folder, empty."""
    served = folder / "served"
    shutil.copytree(model, served)
    for name, text in UNREAD.items():
        (served / name).parent.mkdir(exist_ok=True)
        (served / name).write_text(text)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(failures, "PAUSES", (0.01, 0.02))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    snapshots._folder.cache_clear()
    with serving() as hub:
        point_to(hub.url, monkeypatch)
        hub.add(served)
        yield hub
    close_session()
    snapshots._folder.cache_clear()


@contextmanager
def serving() -> Iterator[Hub]:
    """Serve a hub for as long as the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
