"""Imitate a server's control endpoints: record the calls, receive weights over TCP, and fail on demand."""

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

from mgrpo.engine.inference.vllm import api, tcp_frames
from mgrpo.engine.types import WeightsVersion

TOKEN = "the token"


class FakeServer:
    """Imitate one server.

    calls: the control endpoints in the order of their calls. fails: for a path, a function called instead of
    answering, which returns the status. misfit: the error that its check of a trainer's weights reports, "" for none.
    weights: those of each worker, once installed.
    """

    def __init__(self, workers: int = 1, token: str = TOKEN) -> None:
        self.calls: list[str] = []
        self.bodies: list[tuple[str, Any]] = []
        self.fails: dict[str, Callable[[], int]] = {}
        self.workers, self.token, self.version, self.misfit = workers, token, "0.32.0", ""
        self.acts = dict(self.ACTS)
        self.label, self.paused, self.open = api.UNSET, False, False
        self.arriving: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []
        self.threads: list[threading.Thread] = []
        self.url = ""

    def answer(self, path: str, body: Any, token: str) -> tuple[int, Any]:
        self.bodies.append((path, body))
        if path not in (api.LABEL, api.VERSION) or body is not None:
            if token != f"Bearer {self.token}":
                return 401, {"error": "no"}
            self.calls.append(path)
        if path in self.fails:
            return self.fails[path](), {"error": "failed on demand"}
        act = self.acts.get(path)
        return (404, {"error": "no such path"}) if act is None else act(self, body)

    def name(self, body: Any) -> tuple[int, Any]:
        if body is not None:
            self.label = api.label(WeightsVersion(body["version"], body["step"]))
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
        request = body["update_info"]
        if "secret" in request:
            self.threads = [threading.Thread(target=self.receive, args=(request,)) for _ in range(self.workers)]
            for thread in self.threads:
                thread.start()
        return 200, {}

    def receive(self, request: Any) -> None:
        address = request["host"], request["port"]
        with closing(create_connection(address, request["timeout"])) as connection:
            tcp_frames.send_secret(connection, request["secret"])
            try:
                self.arriving.append(dict(tcp_frames.receive_tensors(connection)))
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
        api.LABEL: name,
        api.VERSION: lambda self, _: (200, {"version": self.version}),
        api.WORLD: lambda self, _: (200, {"world_size": self.workers}),
        api.WORKERS: rpc,
        api.START: start,
        api.UPDATE: update,
        api.FINISH: finish,
        api.PAUSE: pause,
        api.RESUME: resume,
        **dict.fromkeys(
            (api.INIT, api.SLEEP, api.WAKE_WEIGHTS, api.WAKE_CACHE, api.STOP),
            lambda self, _: (200, {}),
        ),
    }


@contextmanager
def serve(fake: FakeServer) -> Iterator[FakeServer]:
    """Serve a fake at a free port of the loopback interface."""

    class Handler(BaseHTTPRequestHandler):
        def do(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(length)) if length else None
            status, answer = fake.answer(self.path, body, self.headers.get("Authorization", ""))
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with suppress(BrokenPipeError):  # the client did not wait
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
