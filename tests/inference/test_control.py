"""Test that a trainer's control client trusts no answer: redirects, endless bodies and nonsense are a fault of it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import aiohttp
import pytest

from mgrpo.engine.inference.vllm import control as control_module
from mgrpo.engine.inference.vllm import router
from mgrpo.engine.inference.vllm.control import ServerControl, ServerError, each
from mgrpo.engine.inference.vllm.streamed_turn import InvalidTurnError
from mgrpo.engine.types import WeightsVersion


class Handler(BaseHTTPRequestHandler):
    """Answer what the test says, in parts, with a pause after each, and note who asked with which token."""

    server: Any

    def do_GET(self) -> None:
        self.server.asked.append(self.headers.get("Authorization"))
        self.send_response(self.server.status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            for part in self.server.parts:
                self.wfile.write(part)
                time.sleep(self.server.pause)
        except OSError:
            pass  # the client has hung up

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hosts() -> Iterator[list[Any]]:
    """Start two hosts, which answer a healthy label until a test says something else."""
    found: list[Any] = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
    for host in found:
        host.status, host.headers, host.parts, host.pause, host.asked = 200, {}, [b'{"label": "3/1"}'], 0.0, []
        host.url = f"http://127.0.0.1:{host.server_port}"
        threading.Thread(target=host.serve_forever, args=(0.01,), daemon=True).start()
    yield found
    for host in found:
        host.shutdown()
        host.server_close()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_refused_and_the_other_host_hears_nothing(hosts: list[Any], status: int):
    server, other = hosts
    control = ServerControl(server.url, "the token", 5.0)
    control.look()
    assert control.version == WeightsVersion(3, 1) and server.asked == ["Bearer the token"]
    server.status, server.headers, server.parts = status, {"Location": f"{other.url}/x"}, []
    for act in (control.look, control.pause):
        with pytest.raises(ServerError, match=f"status {status}"):
            act()
    assert other.asked == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "Expecting value"),
        ("[]", r"\[\] answered: expected a JSON object"),
        ("[" * 100_000, "recursion"),
        ('{"label": 3}', "label is 3: expected str"),
        ('{"version": "3/1"}', "label is None: expected str"),
        ('{"label": "3"}', "weights version '3' given"),
        (" " * (1 << 20) + "{}", "an answer of more than 1048576 bytes"),
    ],
)
def test_an_answer_that_is_none_leaves_the_server_out(
    hosts: list[Any], body: str, message: str, caplog: pytest.LogCaptureFixture
):
    hosts[0].parts = [body.encode()]
    controls = [ServerControl(host.url, "the token", 5.0) for host in hosts]
    with pytest.raises(ServerError, match=message):
        controls[0].look()
    assert each(ServerControl.look, controls) == controls[1:]  # the trainer goes on with the other


def test_a_body_without_end_is_given_up_by_its_size_or_its_time(hosts: list[Any], monkeypatch: pytest.MonkeyPatch):
    hosts[0].parts, hosts[1].parts, hosts[1].pause = [b" " * 4096] * 1000, [b" "] * 100, 0.05
    monkeypatch.setattr(control_module, "MOST_BYTES", 100_000)
    with pytest.raises(ServerError, match="an answer of more than 100000 bytes"):
        ServerControl(hosts[0].url, "the token", 5.0).look()
    with pytest.raises(ServerError, match=r"no end of the answer within 0\.2 s"):
        ServerControl(hosts[1].url, "the token", 0.2).look()


def test_a_worker_reads_no_more_than_the_most_of_an_answer(hosts: list[Any], monkeypatch: pytest.MonkeyPatch):
    hosts[0].parts = [b" " * 4096] * 1000
    monkeypatch.setattr(router, "MOST_BYTES", 100_000)

    async def read(url: str) -> bytes:
        async with aiohttp.ClientSession() as http, http.get(url) as response:
            return await router.body_of(response)

    assert asyncio.run(read(hosts[1].url)) == b'{"label": "3/1"}'
    with pytest.raises(InvalidTurnError, match="an answer of more than 100000 bytes"):
        asyncio.run(read(hosts[0].url))
