"""A server's control endpoints without a server: it records the calls, takes weights over tcp and fails on demand."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import create_connection
from typing import Any, ClassVar
from urllib.parse import urlsplit

from torch import Tensor

from mgrpo.engine.inference.vllm import api as adapter
from mgrpo.engine.inference.vllm import tcp_frames as wire

TOKEN = "the token"


class FakeServer:
    """calls: the control endpoints in the order of their calls. fails: path -> what is done instead of answering."""

    def __init__(self, workers: int = 1, token: str = TOKEN) -> None:
        self.calls: list[str] = []
        self.bodies: list[tuple[str, Any]] = []
        self.fails: dict[str, Callable[[], int]] = {}  # returns a status
        self.workers, self.token, self.version, self.misfit = workers, token, "0.32.0", ""
        self.acts = dict(self.ACTS)
        self.label, self.paused, self.open = adapter.UNSET, False, False
        self.arriving: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []  # of each worker, once installed
        self.threads: list[threading.Thread] = []
        self.url = ""

    def answer(self, path: str, body: Any, token: str) -> tuple[int, Any]:
        self.bodies.append((path, body))
        if path not in (adapter.LABEL, adapter.VERSION) or body is not None:
            if token != f"Bearer {self.token}":
                return 401, {"error": "no"}
            self.calls.append(path)
        if path in self.fails:
            return self.fails[path](), {"error": "as told"}
        act = self.acts.get(path)
        return (404, {"error": "no such path"}) if act is None else act(self, body)

    def name(self, body: Any) -> tuple[int, Any]:
        if body is not None:
            self.label = adapter.label(**body)
        return 200, {"label": self.label}

    def rpc(self, body: Any) -> tuple[int, Any]:
        if body["method"] == "abandon":
            self.open = False
            return 200, {"results": [None] * self.workers}
        return 200, {"results": [{"error": self.misfit} if self.misfit else {}] * self.workers}

    def start(self, body: Any) -> tuple[int, Any]:
        if self.open:
            return 500, {"error": "already active"}
        self.open, self.arriving, self.threads = True, [], []
        return 200, {}

    def update(self, body: Any) -> tuple[int, Any]:
        call = body["update_info"]
        if "secret" in call:
            self.threads = [threading.Thread(target=self.receive, args=(call,)) for _ in range(self.workers)]
            for thread in self.threads:
                thread.start()
        return 200, {}

    def receive(self, call: Any) -> None:
        with closing(create_connection((call["host"], call["port"]), call["timeout"])) as connection:
            wire.send_secret(connection, call["secret"])
            try:
                self.arriving.append(dict(wire.receive_tensors(connection)))
            except OSError:
                return

    def finish(self, body: Any) -> tuple[int, Any]:
        if not self.open:
            return 500, {"error": "not active"}
        for thread in self.threads:
            thread.join(10)
        whole = len(self.arriving) == len(self.threads)
        if not whole:
            return 500, {"error": "cut off"}
        self.open, self.weights = False, self.arriving or self.weights
        return 200, {}

    def pause(self, body: Any) -> tuple[int, Any]:
        self.paused = True
        return 200, {}

    def resume(self, body: Any) -> tuple[int, Any]:
        self.paused = False
        return 200, {}

    ACTS: ClassVar[dict[str, Callable[[FakeServer, Any], tuple[int, Any]]]] = {
        adapter.LABEL: name,
        adapter.VERSION: lambda self, _: (200, {"version": self.version}),
        adapter.WORLD: lambda self, _: (200, {"world_size": self.workers}),
        adapter.WORKERS: rpc,
        adapter.START: start,
        adapter.UPDATE: update,
        adapter.FINISH: finish,
        adapter.PAUSE: pause,
        adapter.RESUME: resume,
        **dict.fromkeys(
            (adapter.INIT, adapter.SLEEP, adapter.WAKE_WEIGHTS, adapter.WAKE_CACHE, adapter.STOP),
            lambda self, _: (200, {}),
        ),
    }


@contextmanager
def serve(fake: FakeServer) -> Iterator[FakeServer]:
    class Handler(BaseHTTPRequestHandler):
        def do(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(length)) if length else None
            status, said = fake.answer(self.path, body, self.headers.get("Authorization", ""))
            data = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with suppress(BrokenPipeError):  # who asked has not waited
                self.wfile.write(data)

        do_GET = do_POST = do

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    fake.url = f"http://127.0.0.1:{http.server_address[1]}"
    assert urlsplit(fake.url).port
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield fake
    finally:
        http.shutdown()
        http.server_close()
