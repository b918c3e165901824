"""`mgrpo export --push`: a directory goes to a hub, here a stub on loopback that HF_ENDPOINT names."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from mgrpo.engine.cli.push import check_repository

PUSH = """
import sys
from pathlib import Path
from mgrpo.engine.cli.push import push_directory
try:
    print(push_directory(Path(sys.argv[1]), sys.argv[2]))
except OSError as error:
    sys.exit(f"error: {error}")
"""


class Hub(ThreadingHTTPServer):
    """Keep what is committed; answer with `status` and a message if that is not 200."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = 200
        self.made: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.status != 200:
            return self.answer(self.server.status, {"error": "You may not do that"})
        if self.path == "/api/repos/create":
            self.server.made.append(json.loads(data))
            return self.answer(200, {"url": f"{self.server.url}/lab/planner", "name": "lab/planner"})
        if self.path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(data)["files"]
            ]
            return self.answer(200, {"files": files})
        if self.path.endswith("/commit/main"):
            for line in map(json.loads, data.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer(200, {"commitUrl": f"{self.server.url}/lab/planner/commit/1", "commitOid": "1"})
        return self.answer(200, {})

    def do_GET(self) -> None:
        self.answer(404, {"error": "nothing here"})

    def answer(self, status: int, message: Any) -> None:
        body = json.dumps(message).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status != 200:
            self.send_header("X-Error-Message", message["error"])
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        Thread(target=hub.serve_forever).start()
        yield hub
        hub.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, data in {
        "config.json": b"{}",
        "README.md": b"---\nlicense: mit\n---\n",
        "model.safetensors": b"\0\1",
    }.items():
        (folder / name).write_bytes(data)
    return folder


def push(folder: Path, endpoint: str, **environ: str) -> subprocess.CompletedProcess[str]:
    home = {"HF_HOME": str(folder.parent / "hub"), "HF_ENDPOINT": endpoint, "HF_TOKEN": "key", "HF_HUB_OFFLINE": ""}
    command = [sys.executable, "-c", PUSH, str(folder), "lab/planner"]
    return subprocess.run(command, env=os.environ | home | environ, capture_output=True, text=True, check=False)


def test_all_files_of_a_directory_are_uploaded_to_a_private_repository(hub: Hub, folder: Path) -> None:
    done = push(folder, hub.url)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == f"{hub.url}/lab/planner: uploaded"
    (made,) = hub.made
    assert (made["organization"], made["name"]) == ("lab", "planner")
    assert made.get("private") is True or made.get("visibility") == "private"  # as versions of the library say it
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "401: .*set HF_TOKEN to a key that may write there"), (403, "403: .*hf auth login"), (500, "500: ")],
)
def test_a_hub_that_refuses_is_named_with_what_to_do(hub: Hub, folder: Path, status: int, message: str) -> None:
    hub.status = status
    done = push(folder, hub.url)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: --push: lab/planner is not uploaded: ") and "`hf upload lab/planner" in line
    assert re.search(message, line), line


def test_no_key_no_connection_and_offline_are_sentences(hub: Hub, folder: Path) -> None:
    gone = "http://127.0.0.1:9"  # nothing listens at the port of discard
    for endpoint, environ in ((gone, {}), (hub.url, {"HF_HUB_OFFLINE": "1"})):
        done = push(folder, endpoint, **environ)
        assert done.stderr.splitlines()[-1].startswith("error: --push: lab/planner is not uploaded: "), done.stderr[
            -3000:
        ]
    assert not hub.files


@pytest.mark.parametrize("name", ["planner", "lab/", "lab/a b", "a/b/c", ""])
def test_a_name_that_no_repository_can_have_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"--push: .* given: expected ORGANISATION/NAME"):
        check_repository("--push", name)
