"""Stands before a vLLM server: who may control it, which weights answered, and no request twice at a time.

vLLM's own `--api-key` leaves `/update_weights`, `/pause`, `/collective_rpc` and the like open. Here it is the other way
round: what `adapter.OPEN` lists is open, all else needs the token of the environment variable MGRPO_SERVER_TOKEN. A
pure ASGI middleware (`--middleware mgrpo.engine.inference.vllm.auth.AuthMiddleware`), so that
streams pass through chunk by chunk.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import multiprocessing
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from mgrpo.engine.inference.vllm import api as adapter
from mgrpo.engine.system.process import die_with_launcher

TOKEN = "MGRPO_SERVER_TOKEN"
LONGEST = 1000  # bytes of a label's body
LAST_GRACE = 10.0  # seconds for one of vLLM's processes to end

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class AuthMiddleware:
    """The middleware; one in a server, which has one process that listens. Raises ValueError without a token."""

    def __init__(self, app: App):
        token = os.environ.get(TOKEN)
        if not token or not token.isascii():
            raise ValueError(f"{TOKEN} is not set to ASCII: expected the token that control of this server needs")
        die_with_launcher()
        self.app, self.digest = app, _digest(token)
        self.label = adapter.UNSET
        self.running: set[str] = set()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # a web socket: none of ours
            return await send({"type": "websocket.close", "code": 1008})
        wanted, headers = (scope["method"], scope["path"]), _headers(scope)
        if wanted not in adapter.OPEN and not self._knows(headers.get("authorization", "")):
            return await self._answer(send, 401, {"error": f"{scope['path']} needs the server's token"})
        if wanted == ("GET", adapter.LABEL):
            return await self._answer(send, 200, {"label": self.label})
        if wanted == ("POST", adapter.LABEL):
            return await self._set_label(scope, receive, send)
        if wanted == ("POST", adapter.STOP):
            await self._answer(send, 200, {"label": self.label})
            end()
        await self._once(scope, receive, send, headers.get(adapter.REQUEST_ID.lower()))

    def _knows(self, authorization: str) -> bool:
        scheme, _, given = authorization.partition(" ")
        return hmac.compare_digest(_digest(given), self.digest) and scheme.lower() == "bearer"

    async def _set_label(self, scope: Message, receive: Receive, send: Send) -> None:
        """The label of the weights that the server has now, told to vLLM too; answers with what is read back."""
        try:
            given = json.loads(await _body(receive))
            text = adapter.label(given["version"], given["step"])
            adapter.read_label(text)
        except (ValueError, KeyError, TypeError) as error:
            return await self._answer(send, 400, {"error": f"expected version and step, both whole: {error!r}"})
        self.label = await adapter.set_label(scope["app"], text)
        await self._answer(send, 200, {"label": self.label})

    async def _once(self, scope: Message, receive: Receive, send: Send, request: str | None) -> None:
        """vLLM's answer, unless a request of the same id runs."""
        if request is None:
            return await self.app(scope, receive, self._labelled(send))
        if request in self.running:
            return await self._answer(send, 409, {"error": f"request {request} is running"})
        self.running.add(request)
        try:
            await self.app(scope, receive, self._labelled(send))
        finally:
            self.running.discard(request)

    def _labelled(self, send: Send) -> Send:
        """Adds the label that the request met as a header, and to a stream a comment whenever it has changed since."""
        written, stream, between = self.label, False, True

        async def labelled(message: Message) -> None:
            nonlocal written, stream, between
            if message["type"] == "http.response.start":
                stream = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
                message["headers"] = [*message["headers"], (adapter.LABEL_HEADER.encode(), written.encode())]
            elif stream and message.get("body"):
                begins, between = between, message["body"].endswith(b"\n\n")
                if begins and written != self.label:
                    written = self.label
                    message["body"] = f"{adapter.LABEL_COMMENT}{written}\n\n".encode() + message["body"]
            await send(message)

        return labelled

    async def _answer(self, send: Send, status: int, body: dict[str, str]) -> None:
        headers = [(b"content-type", b"application/json"), (adapter.LABEL_HEADER.encode(), self.label.encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(body).encode()})


def end() -> None:
    """As a failure, so that it is started again; vLLM's other processes, which would live on, go first."""
    for child in multiprocessing.active_children():
        child.terminate()
        child.join(LAST_GRACE)
    os._exit(1)


def _digest(token: str) -> bytes:
    """Of a fixed length, whatever was given: a comparison tells nothing by the time it takes."""
    return hashlib.sha256(token.encode()).digest()


def _headers(scope: Message) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


async def _body(receive: Receive) -> bytes:
    """Raises ValueError if it is long, or ends too soon."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise ValueError("the request was cut off")
        body, more = body + message.get("body", b""), message.get("more_body", False)
        if len(body) > LONGEST:
            raise ValueError(f"more than {LONGEST} bytes")
    return body
