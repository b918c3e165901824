"""Test AuthMiddleware as a web server drives it, before an application that only reports that it was reached."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgrpo.engine.inference.vllm import api, auth
from mgrpo.engine.inference.vllm.auth import AuthMiddleware
from mgrpo.engine.types import WeightsVersion

TOKEN = "a secret"


class Engine:
    """Imitate the labels of `app.state.engine_client` in vLLM."""

    label = api.UNSET

    async def update_weight_version(self, label: str) -> None:
        self.label = label

    async def get_weight_version(self) -> str:
        return self.label


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(auth.TOKEN, TOKEN)


async def reached(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"reached"})


async def call(
    app: Any, method: str, path: str, headers: dict[str, str] | None = None, body: bytes = b"", engine: Any = None
) -> tuple[int, dict[str, str], bytes]:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    state = SimpleNamespace(state=SimpleNamespace(engine_client=engine or Engine()))
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in (headers or {}).items()]
    await app({"type": "http", "method": method, "path": path, "headers": raw, "app": state}, receive, send)
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], found, b"".join(message.get("body", b"") for message in sent[1:])


def ask(app: Any, method: str, path: str, **more: Any) -> tuple[int, dict[str, str], bytes]:
    return asyncio.run(call(app, method, path, **more))


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


CONTROL = [
    "/pause",
    "/resume",
    "/update_weights",
    "/collective_rpc",
    "/sleep",
    "/mgrpo/stop",
    "/inference/v1/abort_requests",
]


@pytest.mark.parametrize("path", CONTROL)
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    "headers",
    [{}, bearer("wrong"), bearer(""), bearer(TOKEN + "x"), {"Authorization": TOKEN.encode().decode("latin-1")}],
)
def test_control_without_the_token_is_refused(path: str, method: str, headers: dict[str, str]):
    status, _, body = ask(AuthMiddleware(reached), method, path, headers=headers)
    assert status == 401 and b"reached" not in body


@pytest.mark.parametrize("path", [path for path in CONTROL if not path.startswith("/mgrpo")])
def test_control_with_the_token_passes(path: str):
    assert ask(AuthMiddleware(reached), "POST", path, headers=bearer(TOKEN))[2] == b"reached"


@given(st.text(alphabet="/v1.%aPp.", max_size=12), st.sampled_from(["GET", "POST", "PUT", "OPTIONS", "HEAD", "post"]))
def test_routes_that_are_not_listed_as_open_need_the_token(path: str, method: str):
    status = ask(AuthMiddleware(reached), method, "/" + path)[0]
    assert status == (200 if (method, "/" + path) in api.OPEN else 401)


@pytest.mark.parametrize("method, path", sorted(api.OPEN - {("GET", api.LABEL)}))
def test_routes_that_are_listed_as_open_pass(method: str, path: str):
    assert ask(AuthMiddleware(reached), method, path)[2] == b"reached"


def test_a_web_socket_is_closed():
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(AuthMiddleware(reached)({"type": "websocket", "path": "/v1/realtime", "headers": []}, None, send))  # type: ignore[arg-type]
    assert [message["type"] for message in sent] == ["websocket.close"]


@pytest.mark.parametrize("value", [None, "", "ünicode"])
def test_a_server_without_a_token_does_not_start(value: str | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(auth.TOKEN)
    if value is not None:
        monkeypatch.setenv(auth.TOKEN, value)
    with pytest.raises(ValueError, match=f"{auth.TOKEN} is not set"):
        AuthMiddleware(reached)


def test_a_label_is_set_in_the_engine_too_and_read_back():
    app, engine = AuthMiddleware(reached), Engine()
    assert json.loads(ask(app, "GET", api.LABEL)[2]) == {"label": api.UNSET}
    given = json.dumps({"version": 12, "step": 3}).encode()
    status, _, body = ask(app, "POST", api.LABEL, headers=bearer(TOKEN), body=given, engine=engine)
    assert (status, json.loads(body)) == (200, {"label": "12/3"}) and engine.label == "12/3"
    assert ask(app, "GET", "/health")[1][api.LABEL_HEADER] == "12/3"
    assert api.read_label("12/3") == WeightsVersion(12, 3)


def test_the_label_is_the_one_that_the_engines_report():
    class Deaf(Engine):
        async def update_weight_version(self, label: str) -> None:
            pass

    app, given = AuthMiddleware(reached), json.dumps({"version": 1, "step": 1}).encode()
    _, _, body = ask(app, "POST", api.LABEL, headers=bearer(TOKEN), body=given, engine=Deaf())
    assert json.loads(body) == {"label": api.UNSET}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"version": 1}',
        b'{"version": -1, "step": 0}',
        b"x" * 5000,
        b'{"version": 1.5, "step": 0}',
        b'{"version": true, "step": 0}',
        b"\xff",
    ],
)
def test_an_invalid_label_is_refused(body: bytes):
    app = AuthMiddleware(reached)
    assert ask(app, "POST", api.LABEL, headers=bearer(TOKEN), body=body)[0] == 400
    assert app.label == api.UNSET


def test_stop_answers_and_then_ends_the_process(monkeypatch: pytest.MonkeyPatch):
    ended: list[bool] = []
    monkeypatch.setattr(auth, "end_process", lambda: ended.append(True))
    assert ask(AuthMiddleware(reached), "POST", api.STOP)[0] == 401 and not ended
    asyncio.run(_stop(ended))


async def _stop(ended: list[bool]) -> None:
    status, _, _ = await call(AuthMiddleware(reached), "POST", api.STOP, headers=bearer(TOKEN))
    assert status == 200 and ended == [True]


def event(number: int) -> bytes:
    return f"data: {number}\n\n".encode()


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.booleans()), max_size=20))
def test_a_stream_gives_for_every_event_the_newest_label_it_may_have(moves: list[tuple[int, bool, bool]]):
    """moves: the label set before an event, whether the event comes in two halves, and whether a silence precedes."""
    app, truth = AuthMiddleware(reached), []

    async def stream(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for number, (version, halved, silence) in enumerate(moves):
            app.label = f"{version}/0"
            truth.append(app.label)
            body = event(number)
            if silence:
                await send({"type": "http.response.body", "body": b"", "more_body": True})
            for part in (body[:3], body[3:]) if halved else (body,):
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    app.app = stream
    _, headers, body = ask(app, "POST", api.GENERATE)
    label, heard, events = headers[api.LABEL_HEADER], [], []
    assert label == api.UNSET
    for part in body.decode().split("\n\n")[:-1]:
        chunk = api.LABEL_COMMENT
        if part.startswith(chunk):
            assert part[len(chunk) :] != label, "written twice"
            label = part[len(chunk) :]
        else:
            heard.append(label)
            events.append(part)
    assert heard == truth and events == [event(i).decode().strip() for i in range(len(moves))]


def test_a_response_that_is_no_stream_gets_no_comments():
    app = AuthMiddleware(reached)
    app.label = "1/1"
    assert ask(app, "POST", api.GENERATE)[2] == b"reached"


def test_a_running_request_is_not_started_again():
    async def run() -> None:
        gate = asyncio.Event()

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            await gate.wait()
            await reached(scope, receive, send)

        app, twice = AuthMiddleware(slow), {api.REQUEST_ID: "q-1"}
        first = asyncio.create_task(call(app, "POST", api.GENERATE, headers=twice))
        await asyncio.sleep(0)
        assert (await call(app, "POST", api.GENERATE, headers=twice))[0] == 409
        other = asyncio.create_task(call(app, "POST", api.GENERATE, headers={api.REQUEST_ID: "q-2"}))
        gate.set()
        assert (await first)[0] == (await other)[0] == 200
        assert (await call(app, "POST", api.GENERATE, headers=twice))[0] == 200, "the first request has ended"

    asyncio.run(run())


def test_the_id_of_a_failed_request_may_be_used_again():
    async def fails(scope: Any, receive: Any, send: Any) -> None:
        raise OSError("gone")

    app = AuthMiddleware(fails)
    for _ in range(2):
        with pytest.raises(OSError, match="gone"):
            ask(app, "POST", api.GENERATE, headers={api.REQUEST_ID: "q"})


@pytest.mark.parametrize("version", ["0.32.0", "0.32", "0.32.1", "0.32.0+cpu", "0.32.0.dev1"])
def test_supported_versions_pass(version: str):
    api.check_version(version, "here")


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "0.3", "0.320", "10.32.0", "1.0.32", ""])
def test_unsupported_versions_are_refused(version: str):
    with pytest.raises(ValueError, match=rf"http://s is vLLM {version}: expected 0\.32"):
        api.check_version(version, "http://s")
