"""Sample on vLLM servers over HTTP: send token ids, receive token ids and their log-probs.

How episodes drive it. A sampler in this process computes when `Episodes` calls `step`; this one never has pending
calls. All communication runs in an event loop in its own thread, so that streams are read, servers watched and hanging
ones noticed while the main thread steps another agent's sampler or waits for the store or the disk. Connections live as
long as the sampler. `act` hands a turn to the thread and awaits its future, which wakes the episodes' loop when the
turn is complete. Only the main thread touches sessions, and only complete turns reach them: an episode that is given up
in the middle of a turn leaves nothing half done.

A turn is *streamed*, and outlives its server. When a server dies, hangs or sends invalid data, the tokens received so
far are a valid prefix, recorded with the weights that sampled them, and another server continues after them under a new
request id. The same `Ending` as in-process decides where a turn ends. A server that sends more tokens than requested,
or impossible tokens or log-probs, counts as dead. The servers draw their own random numbers, so unlike in-process, two
runs with one seed differ.

Unlike with an ordinary client, weights change while it samples. A turn is recorded with the oldest and the newest
weights that had a part in it: exact, by the server's own count, if its stream came to an end; otherwise bounded by the
labels in the header and in the stream, which can only make the span too wide.
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
from mgrpo.engine.hub.snapshots import folder
from mgrpo.engine.inference.sampler import Completion, Ending, Session, WeightsCheck
from mgrpo.engine.inference.vllm import api
from mgrpo.engine.inference.vllm.router import FAULTS, NoServerError, Router, Server, body_of
from mgrpo.engine.inference.vllm.streamed_turn import InvalidTurnError, StreamedTurn, parsed, reason
from mgrpo.engine.model.causal_lm import read_model_config
from mgrpo.engine.model.pieces import end_tokens, generation_config
from mgrpo.engine.types import NO_WEIGHTS, WeightsVersion

DRAIN = 1.0  # seconds that a stream may take to close after its last token; only then is its connection used again
LONGEST_LINE = 1 << 20  # bytes: the longest line of a stream
R = TypeVar("R")


class VLLMSampler:
    """Sample one agent on the servers at `urls`, with at most `concurrency` calls at a time.

    It starts a thread, which `stop` ends. initial: whether to sample weights that no trainer has sent. replayed: tokens
    from which another server continued a turn.
    """

    pending = 0

    def __init__(
        self,
        name: str,
        agent: AgentConfig,
        tokenizer: PreTrainedTokenizerBase,
        urls: Sequence[str],
        concurrency: int,
        initial: bool = False,
    ) -> None:
        self.name, self.agent, self.tokenizer = name, agent, tokenizer
        self.vocabulary = int(read_model_config(name, agent)["vocab_size"])
        self.ending = Ending(tokenizer, agent.stop, end_tokens(tokenizer, generation_config(folder(name, agent))))
        self.homes: dict[int, Server] = {}  # the server with a session's cache, by the session's id
        self.rl_steps: dict[int, int] = {}  # rl step of each published version, by its optimizer steps
        self.replayed = 0
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True, name=f"vllm-{name}")
        self.thread.start()
        self.router, self.free = self.wait(self._open(urls, concurrency, initial))

    async def _open(self, urls: Sequence[str], concurrency: int, initial: bool) -> tuple[Router, asyncio.Semaphore]:
        return Router(self.name, self.agent, urls, initial), asyncio.Semaphore(concurrency)

    def wait(self, work: Coroutine[Any, Any, R]) -> R:
        """Run a coroutine in the thread's event loop, and return its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def stop(self) -> None:
        """Close all connections and end the thread."""
        self.wait(self.router.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    # ---- weights

    @property
    def version(self) -> WeightsVersion:
        """The newest weights of any server in service; NO_WEIGHTS if there is none."""
        return max((self._published(server.version) for server in self.router.ready()), default=NO_WEIGHTS)

    def expect(self, version: WeightsVersion, check: WeightsCheck | None = None) -> None:
        """Prefer servers with this published version, and record what they sample under its rl step.

        check: a server with these weights that has passed no check since it came into service gets no turn before it
        passes this one; if the check is due, no server does. For each version only the first check counts. Raises
        NoServerError if no server was up for vllm.patience seconds, ValueError if one can never serve, and what the
        check's judge raised.
        """
        self.router.check_hope(self.loop.time())
        if version.optimizer_steps != self.router.published:
            self.router.check = check  # before `published`, because the thread reads both
            self.router.published = version.optimizer_steps
        self.rl_steps[version.optimizer_steps] = version.rl_steps

    def _published(self, version: WeightsVersion) -> WeightsVersion:
        """Return the version with the rl step that published it last; for unchanged weights, servers know the first."""
        steps = version.optimizer_steps
        return WeightsVersion(steps, self.rl_steps.get(steps, version.rl_steps))

    def counts(self) -> dict[str, float]:
        """Return for the metrics how many servers are in service, their faults, and the replayed tokens."""
        ready, faults = len(self.router.ready()), self.router.faults
        return {"servers": ready, "server_faults": faults, "tokens_replayed": self.replayed}

    # ---- turns

    async def act(self, session: Session) -> Completion:
        """Sample until a stop string, an end-of-sequence token or a limit, and append the tokens to the session.

        Raises NoServerError if no server was up for vllm.patience seconds, ValueError if one refuses permanently.
        """
        allowed = min(self.agent.max_new_tokens, self.agent.max_context - len(session.tokens))
        if allowed < 1:
            return Completion("", 0, truncated=True)
        turn = StreamedTurn(list(session.tokens), allowed, self.ending, self.vocabulary, self.router.initial)
        own = self.agent.temperature if session.temperature is None else session.temperature
        work = self._sample(turn, 0.0 if session.greedy else own, self.homes.get(id(session)))
        self.homes[id(session)] = await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.loop))
        oldest, *newer = sorted(map(self._published, turn.versions))
        session.begin_turn(oldest)
        session.append(turn.tokens, [0.0] * len(turn.tokens) if session.greedy else turn.logprobs)
        for version in newer:
            session.begin_turn(version)
        return Completion(self.ending.text(turn.tokens), len(turn.tokens), truncated=not turn.stopped)

    def step(self) -> None:
        """Fail, because no call is ever pending here."""
        raise AssertionError("step without pending calls")

    def close(self, session: Session) -> None:
        """End a session, perhaps in the middle of a turn."""
        self.homes.pop(id(session), None)

    async def _sample(self, turn: StreamedTurn, temperature: float, home: Server | None) -> Server:
        """Sample a whole turn, on several servers in succession if necessary. Return the last one."""
        spared: Server | None = None
        async with self.free:
            since = self.router.now()  # when the turn last got a token
            while True:
                server, had = await self.router.pick(home), len(turn.tokens)
                home = server
                try:
                    await self._stream(server, turn, temperature)
                    server.faults = 0
                except (*FAULTS, InvalidTurnError) as error:
                    since = self.router.now() if len(turn.tokens) > had else since
                    if turn.left and isinstance(error, aiohttp.ServerDisconnectedError) and spared is not server:
                        spared = server  # most likely it closed an idle connection just as we used that again
                    elif turn.left:
                        self._failed(server, turn, error, since)
                if turn.left == 0:
                    return server

    def _failed(self, server: Server, turn: StreamedTurn, error: Exception, since: float) -> None:
        """Take the server out of service. Raises NoServerError if the turn got no token for vllm.patience seconds."""
        self.router.fault(server, reason(error))
        self.replayed += len(turn.tokens)
        if self.router.now() - since > self.router.vllm.patience:
            message = f"agents.{self.name}.vllm: a turn got no token for {self.router.vllm.patience:g} s"
            raise NoServerError(f"{message}, last from {server.url}: {reason(error)}") from error

    async def _stream(self, server: Server, turn: StreamedTurn, temperature: float) -> None:
        """Continue the turn on this server; temperature 0 is greedy.

        Raises InvalidTurnError or one of FAULTS if the stream breaks off.
        """
        body = api.generate_body(
            turn.prompt + turn.tokens,
            max_tokens=turn.left,
            temperature=temperature,
            top_p=self.agent.top_p,
            stop=self.agent.stop,
            ends=sorted(self.ending.ends),
        )
        headers = {api.REQUEST_ID: secrets.token_hex(16)}
        with self.router.turn(server) as alarm:
            async with alarm, self.router.post(server, api.GENERATE, body, headers) as response:
                await self.router.check_status(response)
                turn.begin(response.headers.get(api.LABEL_HEADER, ""))
                try:
                    finish = await self._read(server, turn, response)
                finally:
                    turn.settle()
                turn.end(finish)
                if finish:
                    alarm.reschedule(self.router.now() + DRAIN)
                    await body_of(response)

    async def _read(self, server: Server, turn: StreamedTurn, response: aiohttp.ClientResponse) -> str | None:
        """Read a stream. Return why the server ended the turn, or None if it did not."""
        rest = b""
        async for data in response.content.iter_any():
            server.heard = self.router.now()
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                chunk = parsed(api.read_line, line) or api.Chunk()
                turn.take(chunk)
                if chunk.finish or not turn.left:
                    return chunk.finish
            if len(rest) > LONGEST_LINE:
                raise InvalidTurnError(f"a line of more than {LONGEST_LINE} bytes")
        return None

    # ---- a check of the weights

    def logprobs(self, tokens: Sequence[int]) -> list[float]:
        """Return log p of each token but the first, given those before it, at the agent's temperature without top_p.

        Raises ConnectionError if no server answers.
        """
        return self.wait(self._logprobs(tokens))

    async def _logprobs(self, tokens: Sequence[int]) -> list[float]:
        try:
            return await self.router.scores(await self.router.pick(None), tokens)
        except (*FAULTS, InvalidTurnError) as error:
            raise ConnectionError(f"agents.{self.name}.vllm: log-probs: {reason(error)}") from error
