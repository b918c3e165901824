"""Protect a vLLM server by a token, say which weights answered, and refuse a request that already runs.

vLLM's own `--api-key` leaves `/update_weights`, `/pause`, `/collective_rpc` and others open. Here only the endpoints in
`api.OPEN` are open; all others need the token from the environment variable MGRPO_SERVER_TOKEN. This is a pure ASGI
middleware (`--middleware mgrpo.engine.inference.vllm.auth.AuthMiddleware`), so streams pass through it chunk by chunk.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import multiprocessing
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from mgrpo.engine.inference.vllm import api
from mgrpo.engine.system import secrets
from mgrpo.engine.system.process import die_with_launcher
from mgrpo.engine.types import WeightsVersion

TOKEN = "MGRPO_SERVER_TOKEN"
MOST_BYTES = 1000  # of a request that sets the label
LAST_GRACE = 10.0  # seconds that each of vLLM's processes gets to end

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class AuthMiddleware:
    """Wrap the application of a server, which has one process that listens.

    Raises ValueError if the environment has no token.
    """

    def __init__(self, app: App):
        secrets.take()
        token = secrets.get(TOKEN)
        if not token or not token.isascii():
            raise ValueError(f"{TOKEN} is not set to ASCII text: expected the token that protects this server")
        die_with_launcher()
        self.app, self.token_digest = app, _digest(token)
        self.label = api.UNSET
        self.running: set[str] = set()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # a web socket, which we never use
            return await send({"type": "websocket.close", "code": 1008})
        route, headers = (scope["method"], scope["path"]), _headers(scope)
        if route not in api.OPEN and not self._knows(headers.get("authorization", "")):
            return await self._answer(send, 401, {"error": f"{scope['path']} needs the token of this server"})
        if route == ("GET", api.LABEL):
            return await self._answer(send, 200, {"label": self.label})
        if route == ("POST", api.LABEL):
            return await self._set_label(scope, receive, send)
        if route == ("POST", api.STOP):
            await self._answer(send, 200, {"label": self.label})
            end_process()
        await self._once(scope, receive, send, headers.get(api.REQUEST_ID.lower()))

    def _knows(self, authorization: str) -> bool:
        scheme, _, given = authorization.partition(" ")
        return hmac.compare_digest(_digest(given), self.token_digest) and scheme.lower() == "bearer"

    async def _set_label(self, scope: Message, receive: Receive, send: Send) -> None:
        """Set the label of the weights that the server now has, in vLLM too, and answer with the label read back."""
        try:
            given = json.loads(await _body(receive))
            version = WeightsVersion.parse(f"{given['version']}/{given['step']}")
        except (ValueError, KeyError, TypeError) as error:
            return await self._answer(send, 400, {"error": f"expected whole numbers version and step: {error!r}"})
        self.label = await api.set_label(scope["app"], version)
        await self._answer(send, 200, {"label": self.label})

    async def _once(self, scope: Message, receive: Receive, send: Send, request: str | None) -> None:
        """Have vLLM answer, unless a request with the same id is running."""
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
        """Add the current label to a response as a header and, in a stream, as a comment whenever it changes."""
        written, stream, between = self.label, False, True

        async def labelled(message: Message) -> None:
            nonlocal written, stream, between
            if message["type"] == "http.response.start":
                stream = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
                message["headers"] = [*message["headers"], (api.LABEL_HEADER.encode(), written.encode())]
            elif stream and message.get("body"):
                begins, between = between, message["body"].endswith(b"\n\n")
                if begins and written != self.label:
                    written = self.label
                    message["body"] = f"{api.LABEL_COMMENT}{written}\n\n".encode() + message["body"]
            await send(message)

        return labelled

    async def _answer(self, send: Send, status: int, body: dict[str, str]) -> None:
        headers = [(b"content-type", b"application/json"), (api.LABEL_HEADER.encode(), self.label.encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(body).encode()})


def end_process() -> None:
    """End this process with a failure, so that it is restarted. First end vLLM's other processes, which outlive it."""
    for child in multiprocessing.active_children():
        child.terminate()
        child.join(LAST_GRACE)
    os._exit(1)


def _digest(token: str) -> bytes:
    """Hash a token to a fixed length, so that the time of a comparison reveals nothing about it."""
    return hashlib.sha256(token.encode()).digest()


def _headers(scope: Message) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


async def _body(receive: Receive) -> bytes:
    """Return the body of a request. Raises ValueError if it is too long or incomplete."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise ValueError("the request was cut off")
        body, more = body + message.get("body", b""), message.get("more_body", False)
        if len(body) > MOST_BYTES:
            raise ValueError(f"a body of more than {MOST_BYTES} bytes")
    return body
