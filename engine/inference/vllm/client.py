"""Sampling by vLLM servers, over HTTP: tokens in, tokens and their log-probs out.

How episodes drive it. A sampler in this process computes when `Episodes` calls `step`; this one has none pending, ever.
All its talking is done by an event loop in a thread of its own, so that streams are read, servers watched and hanging
ones noticed while the main thread steps another agent's sampler, waits for the store or for the disk; connections live
as long as the sampler, not as one stream of episodes. `act` hands a turn over and awaits its future: when it is done,
that wakes the episodes' loop, which sleeps until then. Only the main thread touches a session: a turn is the thread's
own until it is whole, so an episode that is given up in the middle of one leaves nothing half done.

A turn is *streamed*, and outlives its server: when one dies, hangs or talks nonsense, the tokens that had come are a
valid prefix, sampled by the weights that they are recorded with, and another server goes on after them, under a new
request id. What a turn consists of is decided here, by the same `Ending` as in-process: a server that sends more than
that, or anything that can be no token or no log-prob, is as good as dead. The random numbers are the servers' own: two
runs of one seed differ, unlike in-process.

Departs from an ordinary client: the weights change while it samples. A turn is recorded with the oldest and the newest
that had a part in it: by the server's own count where its stream came to an end, else by what the guard said before and
in the stream, which can only make the span too wide.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import aiohttp
from transformers import PreTrainedTokenizerBase

from mgrpo.engine.config.schema import AgentConfig
from mgrpo.engine.inference.sampler import Completion, Ending, Session, WeightsCheck
from mgrpo.engine.inference.vllm import api as adapter
from mgrpo.engine.inference.vllm.router import FAULTS, NoServerError, Router, Server
from mgrpo.engine.inference.vllm.streamed_turn import InvalidTurnError, StreamedTurn, parsed, reason
from mgrpo.engine.model.causal_lm import read_model_config

DRAIN = 1.0  # seconds that a stream may take to close after its last token: then its connection can be used again
LINE = 1 << 20  # bytes of a stream without an end of line
R = TypeVar("R")


class VLLMSampler:
    """Samples one agent by the servers at `urls`, `concurrency` calls at a time. Starts a thread; `stop` ends it.

    version, weights_step: of the newest weights that a server in service has; -1 when there are none.
    """

    pending = 0

    def __init__(
        self, name: str, agent: AgentConfig, tokenizer: PreTrainedTokenizerBase, urls: Sequence[str], concurrency: int
    ) -> None:
        self.name, self.agent, self.tokenizer = name, agent, tokenizer
        self.vocabulary = int(read_model_config(name, agent)["vocab_size"])
        self.ending = Ending(tokenizer, agent.stop)
        self.homes: dict[int, Server] = {}  # by id of a session
        self.steps: dict[int, int] = {}  # rl step of a version, as published
        self.replayed = 0  # tokens that another server went on from
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True, name=f"vllm-{name}")
        self.thread.start()
        self.fleet, self.free = self.wait(self._open(urls, concurrency))

    async def _open(self, urls: Sequence[str], concurrency: int) -> tuple[Router, asyncio.Semaphore]:
        return Router(self.name, self.agent, urls), asyncio.Semaphore(concurrency)

    def wait(self, work: Coroutine[Any, Any, R]) -> R:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def stop(self) -> None:
        self.wait(self.fleet.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    # ---- weights

    @property
    def version(self) -> int:
        return max((server.version for server in self.fleet.ready()), default=-1)

    @property
    def weights_step(self) -> int:
        return max((self._step(server.version, server.step) for server in self.fleet.ready()), default=-1)

    def expect(self, version: int, step: int, proof: WeightsCheck | None = None) -> None:
        """These were published: who has them is preferred, and what they sample is of that rl step.

        proof: who has them, but has proved nothing since it came into service, gets no turn before it does; if it is
        due, nobody does. Of one version the first counts. Raises NoServerError when none was there for vllm.patience
        seconds, ValueError when one can never serve, and what the proof's judge raised.
        """
        self.fleet.check_hope(self.loop.time())
        if version != self.fleet.wanted:
            self.fleet.proof, self.fleet.wanted = proof, version  # in this order: the loop's thread reads them
        self.steps[version] = step

    def _step(self, version: int, said: int) -> int:
        """The rl step of a version: of weights that did not move, the server knows the first only."""
        return self.steps.get(version, said)

    def counts(self) -> dict[str, float]:
        """For the metrics: servers in service, how often one was taken out, and tokens that another went on from."""
        ready, faults = len(self.fleet.ready()), self.fleet.faults
        return {"servers": ready, "server_faults": faults, "tokens_replayed": self.replayed}

    # ---- turns

    async def act(self, session: Session) -> Completion:
        """Sample until a stop string, the end-of-sequence token or a limit; the tokens are appended to the session.

        Raises NoServerError when none was there for vllm.patience seconds; ValueError when one refuses for good.
        """
        allowed = min(self.agent.max_new_tokens, self.agent.max_context - len(session.tokens))
        if allowed < 1:
            return Completion("", 0, truncated=True)
        turn = StreamedTurn(list(session.tokens), allowed, self.ending, self.vocabulary)
        work = self._sample(turn, session.greedy, self.homes.get(id(session)))
        self.homes[id(session)] = await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.loop))
        (step, version), *newer = sorted((self._step(*label), label[0]) for label in turn.labels)
        session.begin_turn(version, step)
        session.append(turn.tokens, [0.0] * len(turn.tokens) if session.greedy else turn.logprobs)
        for step, version in newer:
            session.begin_turn(version, step)
        return Completion(self.ending.text(turn.tokens), len(turn.tokens), truncated=not turn.stopped)

    def step(self) -> None:
        raise AssertionError("step without pending calls")

    def close(self, session: Session) -> None:
        """The session is over, perhaps in the middle of a turn."""
        self.homes.pop(id(session), None)

    async def _sample(self, turn: StreamedTurn, greedy: bool, home: Server | None) -> Server:
        """The whole turn, by one server after another if need be. Returns the last."""
        spared: Server | None = None
        async with self.free:
            since = self.fleet.now()  # when it last got on
            while True:
                server, had = await self.fleet.pick(home), len(turn.tokens)
                home = server
                try:
                    await self._stream(server, turn, greedy)
                    server.faults = 0
                except (*FAULTS, InvalidTurnError) as error:
                    since = self.fleet.now() if len(turn.tokens) > had else since
                    if turn.left and isinstance(error, aiohttp.ServerDisconnectedError) and spared is not server:
                        spared = server  # as a rule it closed an idle connection just as that was used again
                    elif turn.left:
                        self._failed(server, turn, error, since)
                if turn.left == 0:
                    return server

    def _failed(self, server: Server, turn: StreamedTurn, error: Exception, since: float) -> None:
        """The turn goes on elsewhere, unless it has not got on for too long."""
        self.fleet.fault(server, reason(error))
        self.replayed += len(turn.tokens)
        if self.fleet.now() - since > self.fleet.vllm.patience:
            message = f"agents.{self.name}.vllm: a turn got no token for {self.fleet.vllm.patience:g} s"
            raise NoServerError(f"{message}, last from {server.url}: {reason(error)}") from error

    async def _stream(self, server: Server, turn: StreamedTurn, greedy: bool) -> None:
        """Stream what this server makes of the turn. Raises InvalidTurnError, or one of FAULTS, when it breaks off."""
        body = adapter.generate_body(
            turn.prompt + turn.tokens,
            max_tokens=turn.left,
            temperature=0.0 if greedy else self.agent.temperature,
            top_p=self.agent.top_p,
            stop=self.agent.stop,
            eos=self.tokenizer.eos_token_id,
        )
        headers = {adapter.REQUEST_ID: secrets.token_hex(16)}
        with self.fleet.turn(server) as alarm:
            async with alarm, self.fleet.post(server, adapter.GENERATE, body, headers) as response:
                await self.fleet.check(response)
                turn.begin(response.headers.get(adapter.LABEL_HEADER, ""))
                try:
                    finish = await self._read(server, turn, response)
                finally:
                    turn.settle()
                turn.end(finish)
                if finish:
                    alarm.reschedule(self.fleet.now() + DRAIN)
                    await response.read()

    async def _read(self, server: Server, turn: StreamedTurn, response: aiohttp.ClientResponse) -> str | None:
        """Returns why the server ended the turn; None if it did not."""
        rest = b""
        async for data in response.content.iter_any():
            server.heard = self.fleet.now()
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                chunk = parsed(adapter.read_line, line) or adapter.Chunk()
                turn.take(chunk)
                if chunk.finish or not turn.left:
                    return chunk.finish
            if len(rest) > LINE:
                raise InvalidTurnError(f"a line of more than {LINE} bytes")
        return None

    # ---- a check of the weights

    def logprobs(self, tokens: Sequence[int]) -> list[float]:
        """log p of each token but the first given those before it, at the agent's temperature, not cut to top_p.

        Raises ConnectionError when no server says so.
        """
        return self.wait(self._logprobs(tokens))

    async def _logprobs(self, tokens: Sequence[int]) -> list[float]:
        try:
            return await self.fleet.scores(await self.fleet.pick(None), tokens)
        except (*FAULTS, InvalidTurnError) as error:
            raise ConnectionError(f"agents.{self.name}.vllm: log-probs: {reason(error)}") from error
