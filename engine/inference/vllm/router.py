"""Route turns to the vLLM servers of one agent, and keep track of which servers are in service.

One task per server asks every TICK seconds which weights the server has. Only servers with the newest weights get
turns. A server that missed an update, or has just started with its initial weights, waits until the trainer has sent it
the newest. A server that reports the published weights must confirm them by its log-probs each time it comes into
service, and as often as a check is due.

Every failure of a server is a *fault*: the server is taken out of service, its running turns move to others, and it is
asked again after a pause that doubles. A turn goes to the server that holds the cache of the session's earlier turns,
unless that server is much busier than another; a new session goes to the least busy server.

Everything here runs in the event loop of the sampler's thread, except where a docstring says "any thread".
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from mgrpo.engine.config.schema import AgentConfig
from mgrpo.engine.inference.sampler import WeightsCheck
from mgrpo.engine.inference.vllm import api
from mgrpo.engine.inference.vllm.auth import TOKEN
from mgrpo.engine.inference.vllm.streamed_turn import InvalidTurnError, parsed, reason
from mgrpo.engine.run.weights import GapError
from mgrpo.engine.system import secrets
from mgrpo.engine.types import NO_WEIGHTS, WeightsVersion

TICK = 0.1  # seconds between two requests for a server's version
ASK = 10.0  # seconds that a server may take to answer such a request
SLACK = 16  # a session stays on its server until that has more than 2x + SLACK the turns of the least busy one
LONGEST = 5.0  # seconds: the longest pause before a server that is out of service is asked again
MOST_BYTES = 16 << 20  # of an answer that is no stream
FAULTS = (aiohttp.ClientError, OSError)  # raised by connections; OSError includes TimeoutError

log = logging.getLogger(__name__)


class NoServerError(RuntimeError):
    """Report that no server was in service for vllm.patience seconds. OSErrors are retried, so this is none."""


class MovedError(InvalidTurnError):
    """Report that a server answered with other weights than those it was asked about."""


@dataclass(eq=False)
class Server:
    """Hold what is known of one server.

    up: it is in service, provided its weights are the newest. fits: its vLLM and its context length were checked.
    verified: the last check that it passed since it came into service. heard: when it last sent a token, or was first
    asked for one. faults: their number since its last complete turn. due: when to ask it again. why: its last fault.
    turns: timeouts of the turns that it runs.
    """

    url: str
    up: bool = False
    fits: bool = False
    version: WeightsVersion = NO_WEIGHTS
    verified: WeightsCheck | None = None
    heard: float = 0.0
    faults: int = 0
    due: float = 0.0
    why: str = "not reached yet"
    turns: set[asyncio.Timeout] = field(default_factory=set)

    def saw(self, version: WeightsVersion) -> None:
        """Record the version that the server reports. NO_WEIGHTS means that it was restarted."""
        self.version = version
        if version == NO_WEIGHTS:
            self.verified = None


class Router:
    """Hold all servers of one agent. Create and use it in one event loop.

    name: of the agent. urls: without a path. initial: whether weights that no trainer has sent may be sampled.
    published: optimizer steps of the version that was published last, -1
    before the first; check: of that version. error: the reason why no server can ever serve again. lost: the time since
    which none is up; None while one is.
    """

    def __init__(self, name: str, agent: AgentConfig, urls: Sequence[str], initial: bool = False) -> None:
        assert agent.vllm is not None
        self.initial = initial
        self.name, self.agent, self.vllm = name, agent, agent.vllm
        self.servers = [Server(url.rstrip("/")) for url in urls]
        self.published = -1
        self.check: WeightsCheck | None = None
        self.error: Exception | None = None
        self.faults = 0
        self.changed = asyncio.Event()
        token = secrets.get(TOKEN)
        self.http = aiohttp.ClientSession(
            headers=api.bearer(token) if token else {},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=ASK),
            connector=aiohttp.TCPConnector(limit=0),
        )
        self.lost: float | None = self.now()
        self.watches = [asyncio.create_task(self._watch(server)) for server in self.servers]

    async def close(self) -> None:
        """End the tasks and all connections."""
        for watch in self.watches:
            watch.cancel()
        await asyncio.gather(*self.watches, return_exceptions=True)
        await self.http.close()

    @staticmethod
    def now() -> float:
        """Return the event loop's time in seconds."""
        return asyncio.get_running_loop().time()

    # ---- which server

    def ready(self) -> list[Server]:
        """Return the servers up with the weights published last or, if there are none, the newest. For any thread."""
        named = [s for s in self.servers if s.up and (self.initial or s.version != NO_WEIGHTS)]
        up = [s for s in named if not self.unverified(s)]
        steps = {server.version.optimizer_steps for server in up}
        best = self.published if self.published in steps else max(steps, default=-1)
        return [server for server in up if server.version.optimizer_steps == best]

    def unverified(self, server: Server) -> bool:
        """Return whether the server's weights still need to be verified. For any thread."""
        check = self.check
        if check is None or server.version.optimizer_steps != self.published or server.verified is check:
            return False
        return check.due or server.verified is None

    async def pick(self, home: Server | None) -> Server:
        """Return the server for a turn: `home`, which holds its cache, if ready and not much busier than another.

        Waits while no server is ready. Raises what `check_hope` raises.
        """
        while True:
            self.check_hope(self.now())
            if ready := self.ready():
                least = min(ready, key=lambda server: len(server.turns))
                return home if home in ready and len(home.turns) <= 2 * len(least.turns) + SLACK else least
            await self.changed.wait()

    def check_hope(self, now: float) -> None:
        """Raise NoServerError if no server was up for vllm.patience seconds, other errors if waiting is useless.

        Those are ValueError for a server that can never serve, and GapError for one with wrong weights.
        """
        if self.error:
            raise self.error
        if self.lost is not None and now - self.lost > self.vllm.patience:
            whys = "; ".join(f"{server.url}: {server.why}" for server in self.servers)
            raise NoServerError(f"agents.{self.name}.vllm: no server for {self.vllm.patience:g} s: {whys}")

    @contextmanager
    def turn(self, server: Server) -> Iterator[asyncio.Timeout]:
        """Register a turn on a server while it runs. Raises TimeoutError in it when the server is found to hang."""
        if not server.turns:
            server.heard = self.now()
        alarm = asyncio.timeout(None)
        server.turns.add(alarm)
        try:
            yield alarm
        finally:
            server.turns.discard(alarm)

    # ---- the state of a server

    async def _watch(self, server: Server) -> None:
        """Keep what is known of a server up to date."""
        while True:
            if server.turns and self.now() - server.heard > self.vllm.timeout:
                self._hangs(server)
            if server.up or self.now() >= server.due:
                await self._ask(server)
            if server.up and self.unverified(server):
                await self._verify(server)
            self.changed.set()  # in any case, so that waiting turns check how long they have waited
            self.changed.clear()
            await asyncio.sleep(TICK)

    def _hangs(self, server: Server) -> None:
        """Take a server that hangs out of service, and let its turns time out."""
        self.fault(server, f"no token for {self.vllm.timeout:g} s")
        for alarm in server.turns:
            alarm.reschedule(self.now())

    async def _ask(self, server: Server) -> None:
        """Ask a server which weights it has, and put it in service if it answers."""
        began = self.now()
        try:
            async with asyncio.timeout(ASK):
                if not server.fits:
                    await self._check_fit(server)
                server.saw(api.read_label(str((await self._get(server, api.LABEL))["label"])))
        except (*FAULTS, InvalidTurnError, LookupError, TypeError) as error:
            if not server.up:
                server.why = reason(error)
                self._pause(server)
            elif server.heard < began or not server.turns:  # else it is only busy with turns
                self.fault(server, reason(error))
        except ValueError as error:
            self.error = self.error or error
        else:
            self._serves(server)

    async def _verify(self, server: Server) -> None:
        """Check a server's weights by its log-probs."""
        check = self.check
        assert check is not None
        try:
            check.judge(server.url, await self.scores(server, check.tokens))
            server.verified = check
        except MovedError:
            pass  # first ask which weights it has now
        except (*FAULTS, InvalidTurnError) as error:
            self.fault(server, reason(error))
        except (ValueError, GapError) as error:
            self.error = self.error or error

    async def scores(self, server: Server, tokens: Sequence[int]) -> list[float]:
        """Return log p of each token but the first, with the weights that the server is known to have.

        Raises InvalidTurnError or one of FAULTS.
        """
        label = api.label(server.version)
        async with asyncio.timeout(self.vllm.timeout):
            return await asyncio.gather(*(self._score(server, label, tokens, at) for at in range(1, len(tokens))))

    async def _score(self, server: Server, label: str, tokens: Sequence[int], position: int) -> float:
        body = api.score_body(tokens, position, self.agent.temperature)
        async with self.post(server, api.GENERATE, body) as response:
            await self.check_status(response)
            data = await body_of(response)
        if response.headers.get(api.LABEL_HEADER) != label:
            raise MovedError(f"{server.url}: its weights have changed")
        return float(parsed(lambda body: api.read_score(json.loads(body), tokens[position]), data))

    def _serves(self, server: Server) -> None:
        """Put a server in service."""
        if not server.up:
            log.log(logging.WARNING if server.faults else logging.INFO, "%s: in service", server.url)
        server.up, self.lost = True, None

    async def _check_fit(self, server: Server) -> None:
        """Check a server's vLLM and its context length. Raises ValueError if it can never serve this agent."""
        api.check_version((await self._get(server, api.VERSION))["version"], server.url)
        model = (await self._get(server, api.MODELS))["data"][0]
        if model["max_model_len"] < self.agent.max_context:
            raise ValueError(
                f"{server.url}: --max-model-len {model['max_model_len']}: expected at least "
                f"agents.{self.name}.max_context = {self.agent.max_context}"
            )
        server.fits = True

    async def _get(self, server: Server, path: str) -> Any:
        async with self.http.get(server.url + path, allow_redirects=False) as response:
            await self.check_status(response)
            try:
                return json.loads(await body_of(response))
            except (ValueError, RecursionError) as error:
                raise InvalidTurnError(f"{path}: {error}") from error

    def post(self, server: Server, path: str, body: Any, headers: dict[str, str] | None = None) -> Any:
        """Return a context manager that posts a request and gives the response."""
        headers = {"Content-Type": "application/json", **(headers or {})}
        data = msgspec.json.encode(body)
        return self.http.post(server.url + path, data=data, headers=headers, allow_redirects=False)

    async def check_status(self, response: aiohttp.ClientResponse) -> None:
        """Check a status. Raises InvalidTurnError if another server or a later try may succeed, ValueError if not."""
        status = response.status
        if status == 200:
            return
        text = (await response.content.read(500)).decode(errors="replace")
        if status in (401, 403):
            raise ValueError(f"{response.url}: {status}: expected another token in the environment variable {TOKEN}")
        if status in (408, 409, 425, 429) or status >= 500:
            raise InvalidTurnError(f"status {status}: {text}")
        raise ValueError(f"agents.{self.name}.vllm: {response.url}: status {status}: {text}")

    # ---- faults

    def fault(self, server: Server, why: str) -> None:
        """Take a server out of service until it answers again. If several turns notice a fault, the first counts."""
        if not server.up:
            return
        log.warning("%s: out of service: %s", server.url, why)
        server.up, server.fits, server.verified, server.why = False, False, None, why
        self.faults += 1
        self._pause(server)
        if not any(server.up for server in self.servers):
            self.lost = self.now()

    def _pause(self, server: Server) -> None:
        """Set when to ask the server again."""
        server.due = self.now() + min(TICK * 2.0 ** min(server.faults, 30), LONGEST)
        server.faults += 1


async def body_of(response: aiohttp.ClientResponse) -> bytes:
    """Return the body of a response. Raises InvalidTurnError if it is longer than MOST_BYTES."""
    body = bytearray()
    async for part in response.content.iter_any():
        body += part
        if len(body) > MOST_BYTES:
            raise InvalidTurnError(f"an answer of more than {MOST_BYTES} bytes")
    return bytes(body)
