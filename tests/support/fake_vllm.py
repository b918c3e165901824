"""Imitate a vLLM server as `inference/vllm/api.py` expects it, with a known toy distribution, and misbehave on demand.

The next token depends on the weights' version and on the two tokens before it. `misdeeds` lists what goes wrong, one
entry for each request to come. `kill` and `start` imitate those of its process.
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np
from aiohttp import web
from transformers import PreTrainedTokenizerBase

from mgrpo.engine.inference.vllm import api
from mgrpo.engine.types import INITIAL_WEIGHTS, NO_WEIGHTS, WeightsVersion

EOS = 0


@cache
def logits(version: int, last: tuple[int, ...], vocabulary: int) -> np.ndarray:
    """Return the logits of the token after `last`, (V,) float64."""
    return np.random.default_rng([version, *last]).normal(size=vocabulary) * 2


def logps(version: int, tokens: list[int], temperature: float, top_p: float, vocabulary: int) -> np.ndarray:
    """Return the log-probs of the token after `tokens`, (V,) float64, -inf for tokens that top_p cuts."""
    scaled = logits(version, tuple(tokens[-2:]), vocabulary) / temperature
    out = scaled - np.logaddexp.reduce(scaled)
    if top_p < 1:
        order = np.argsort(-out)
        kept = np.cumsum(np.exp(out[order])) - np.exp(out[order]) < top_p
        cut = np.full_like(out, -np.inf)
        cut[order[kept]] = out[order[kept]]
        out = cut - np.logaddexp.reduce(cut)
    return out


class CutError(Exception):
    """Cut the connection here."""


class FakeVLLM:
    """Imitate one server in a thread.

    pace: seconds per token. together: tokens per chunk. length: of the context. token: the secret, if one is needed.
    endless: it never samples EOS. model_version: the version it really samples with, for one that it reports.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        vocabulary: int = 257,
        weights: WeightsVersion = INITIAL_WEIGHTS,
        pace: float = 0.0,
        together: int = 1,
        length: int = 4096,
        vllm: str = "0.32.0",
        token: str | None = None,
        endless: bool = False,
        model_version: Callable[[int], int] = lambda version: version,
    ):
        self.tokenizer, self.vocabulary, self.weights = tokenizer, vocabulary, weights
        self.pace, self.together = pace, together
        self.length, self.vllm, self.token, self.model_version = length, vllm, token, model_version
        self.endless = endless
        self.random = np.random.default_rng()
        self.misdeeds: deque[tuple[str, Any]] = deque()
        self.requests: list[dict[str, Any]] = []
        self.ids: list[str] = []
        self.connections: set[int] = set()
        self.running = self.most = self.aborted = 0
        self.deaf = False  # it does not answer
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start to listen; after `kill` at the same port."""
        self.loop, self.transports = asyncio.new_event_loop(), set()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self._do(self._listen())

    def kill(self) -> None:
        """Cut all connections and stop listening."""
        self._do(self._die())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()

    def update(self, version: WeightsVersion) -> None:
        """Take new weights at once, also in the middle of turns."""

        async def put() -> None:
            self.weights = version

        self._do(put())

    def _do(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    async def _listen(self) -> None:
        app = web.Application(middlewares=[self._check_token])
        app.router.add_get(api.LABEL, self._get_label)
        app.router.add_get(api.VERSION, self._version)
        app.router.add_get(api.MODELS, self._models)
        app.router.add_post(api.GENERATE, self._generate)
        self.runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]

    async def _die(self) -> None:
        for site in list(self.runner.sites):
            await site.stop()
        for transport in self.transports:
            transport.abort()
        await self.runner.cleanup()

    @web.middleware
    async def _check_token(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.transports.add(request.transport)
        self.connections.add(id(request.transport))
        if self.deaf:
            await asyncio.sleep(1000)
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.json_response({"error": "no"}, status=401)
        return await handler(request)

    @property
    def _label(self) -> str:
        return api.label(self.weights)

    async def _get_label(self, _: web.Request) -> web.Response:
        return web.json_response({"label": self._label})

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": self.vllm})

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "x", "max_model_len": self.length}]})

    # ---- turns

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.ids.append(request.headers.get(api.REQUEST_ID, ""))
        self.running, self.most = self.running + 1, max(self.most, self.running + 1)
        misdeed = self.misdeeds.popleft() if self.misdeeds else ("", None)
        try:
            return await (self._stream if body.get("stream") else self._score)(request, body, misdeed)
        except CutError:
            request.transport.abort()  # type: ignore[union-attr]
            return web.Response()
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        finally:
            self.running -= 1

    async def _score(self, request: web.Request, body: Any, misdeed: Any) -> web.Response:
        if misdeed[0] == "status":
            return web.json_response({"error": {"message": "not now"}}, status=misdeed[1])
        params, tokens = body["sampling_params"], body["token_ids"]
        wanted = params["logprob_token_ids"][0]
        value = self._logps(tokens, params["temperature"], 1.0)[wanted]
        content = [{"logprob": -1.0, "top_logprobs": [{"token_id": wanted, "logprob": float(value)}]}]
        choice = {"token_ids": [1], "logprobs": {"content": content}, "finish_reason": "length"}
        return web.json_response({"choices": [choice]}, headers={api.LABEL_HEADER: self._label})

    def _logps(self, tokens: list[int], temperature: float, top_p: float) -> np.ndarray:
        version = 0 if self.weights == NO_WEIGHTS else self.weights.optimizer_steps
        return logps(self.model_version(version), tokens, temperature, top_p, self.vocabulary)

    async def _stream(self, request: web.Request, body: Any, misdeed: tuple[str, Any]) -> web.StreamResponse:
        kind, what = misdeed
        if kind == "status":
            return web.json_response({"error": {"message": "not now"}}, status=what)
        await self._at(0, kind, what if kind in ("cut before headers", "hang before headers") else None)
        written = self._label
        headers = {api.LABEL_HEADER: what if kind == "header" else written, "Content-Type": "text/event-stream"}
        response = web.StreamResponse(headers=headers)
        response.enable_chunked_encoding()
        await response.prepare(request)
        out, spans, pending = [], [], []  # type: list[int], list[list[Any]], list[float]
        if kind == "slow":
            await asyncio.sleep(what)
        async for token, logprob, finish in self._tokens(body):
            if kind in ("cut", "hang"):
                await self._at(len(out), kind, what)
            if self._label != written:
                written = self._label
                await response.write(f"{api.LABEL_COMMENT}{written}\n\n".encode())
            if not spans or spans[-1][0] != written:
                spans.append([written, len(out), len(out)])
            out.append(token)
            spans[-1][2] = len(out)
            pending.append(logprob)
            if len(pending) == self.together or finish:
                count = len(pending)
                choice = {
                    "index": 0,
                    "token_ids": out[-count:],
                    "logprobs": {"content": [{"logprob": value} for value in pending]},
                    "finish_reason": finish,
                }
                if finish and kind != "no spans":
                    choice["weight_versions"] = [{"version": v, "start": b, "end": e} for v, b, e in spans]
                pending = []
                data = what(choice, len(out)) if kind == "lie" else choice
                line = (
                    data if isinstance(data, bytes) else b"data: " + json.dumps({"choices": [data]}).encode() + b"\n\n"
                )
                await self._write(response, line, kind)
        if kind == "cut at the end":
            raise CutError
        if kind == "hang at the end":
            await asyncio.sleep(1000)
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        if kind == "close":
            request.transport.close()  # type: ignore[union-attr]
        return response

    async def _write(self, response: web.StreamResponse, line: bytes, kind: str) -> None:
        """Write a line, in parts if it is to be torn as networks do."""
        if kind == "torn":
            for part in (line[:7], line[7:-1], line[-1:]):
                await response.write(part)
                await asyncio.sleep(0.001)
        else:
            await response.write(line)

    async def _at(self, count: int, kind: str, what: int | None) -> None:
        if what is None or count != what:
            return
        await asyncio.sleep(0.001)
        if kind.startswith("cut"):
            raise CutError
        await asyncio.sleep(1000)

    async def _tokens(self, body: Any):
        params, tokens = body["sampling_params"], list(body["token_ids"])
        begin = len(tokens)
        finish = None
        while finish is None:
            if self.pace:
                await asyncio.sleep(self.pace)
            greedy = params["temperature"] == 0
            values = self._logps(tokens, params["temperature"] or 1.0, params["top_p"])
            token = int(values.argmax() if greedy else self.random.choice(self.vocabulary, p=np.exp(values)))
            while self.endless and token == EOS:
                token = int(self.random.choice(self.vocabulary, p=np.exp(values)))
            tokens.append(token)
            new = tokens[begin:]
            text = self.tokenizer.decode(new)
            if token in params["stop_token_ids"] or any(stop in text for stop in params["stop"]):
                finish = "stop"
            elif len(new) == params["max_tokens"] or len(tokens) == self.length:
                finish = "length"
            yield token, float(values[token]), finish
            if not self.pace:
                await asyncio.sleep(0)


def truth(
    trajectory: Any,
    temperature: float = 1.0,
    top_p: float = 1.0,
    vocabulary: int = 257,
    versions: Iterable[int] = range(10),
) -> np.ndarray:
    """Return the version that gives each sampled token its log-prob, (A,) int; -1 if none of `versions` does."""
    tokens, found = [int(token) for token in trajectory.tokens], []
    for at in np.flatnonzero(trajectory.sampled):
        values = {v: logps(v, tokens[:at], temperature, top_p, vocabulary)[tokens[at]] for v in versions}
        close = [v for v, value in values.items() if math.isclose(value, trajectory.logprobs[at], abs_tol=1e-5)]
        found.append(close[0] if close else -1)
    return np.array(found)
