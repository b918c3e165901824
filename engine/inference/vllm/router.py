"""The vLLM servers behind one agent: which of them are in service, and which takes the next turn.

A task per server asks it, TICK by TICK, which weights it has. Only servers with the newest weights are given turns: one
that missed an update, or has just started and has none of the trainer's, waits until the trainer has brought it up to
date; and one that says that it has the published ones must prove it by its log-probs, each time that it comes into
service and as often as is due. Whatever goes wrong with a server is a *fault*: it is taken out of service, its running
turns are given to others, and it is asked again after a pause that doubles. A turn goes to the server that holds the
cache of those before it, unless that has far more than another, and else to the one with the fewest.

All of it runs in the event loop of the sampler's thread, but what is said to be for any.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from mgrpo.engine.config.schema import AgentConfig
from mgrpo.engine.inference.sampler import WeightsCheck
from mgrpo.engine.inference.vllm import api as adapter
from mgrpo.engine.inference.vllm.auth import TOKEN
from mgrpo.engine.inference.vllm.streamed_turn import InvalidTurnError, parsed, reason
from mgrpo.engine.run.weights import GapError

TICK = 0.1  # seconds between two looks at a server
ASK = 10.0  # seconds that a server may take to say which weights it has
SLACK = 16  # turns that a server may have beyond twice as many as another, and still be given its own
LONGEST = 5.0  # seconds between two tries to reach one that is out of service
FAULTS = (aiohttp.ClientError, OSError)  # of a connection; OSError includes TimeoutError

log = logging.getLogger(__name__)


class NoServerError(RuntimeError):
    """None was in service for as long as one may wait: no OSError, that one would wait for once more."""


class Moved(InvalidTurnError):
    """It has other weights than those it was asked about."""


@dataclass(eq=False)
class Server:
    """One server, as it was last heard of."""

    url: str
    up: bool = False  # in service, if its weights are the newest too
    fits: bool = False  # its vLLM and its longest context were looked at
    version: int = -1  # of its weights; -1: none of the trainer's
    step: int = -1
    proved: WeightsCheck | None = None  # since it came into service, the last that it gave
    heard: float = 0.0  # when it last said a token, or was first asked for one
    faults: int = 0  # since it last ended a turn
    due: float = 0.0  # when to ask it again
    why: str = "not reached yet"
    turns: set[asyncio.Timeout] = field(default_factory=set)  # that run there

    def label(self, known: tuple[int, int] | None) -> None:
        self.version, self.step = known or (-1, -1)
        self.proved = self.proved if known else None  # else it was started again


class Router:
    """All servers of one agent. To be made and used in one event loop.

    name: the agent's; urls: without a path.
    """

    def __init__(self, name: str, agent: AgentConfig, urls: Sequence[str]) -> None:
        assert agent.vllm is not None
        self.name, self.agent, self.vllm = name, agent, agent.vllm
        self.servers = [Server(url.rstrip("/")) for url in urls]
        self.wanted = -1  # the version that was published last
        self.proof: WeightsCheck | None = None  # of that version
        self.error: Exception | None = None  # no other server would help
        self.faults = 0
        self.changed = asyncio.Event()
        token = os.environ.get(TOKEN)
        self.http = aiohttp.ClientSession(
            headers=adapter.bearer(token) if token else {},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=ASK),
            connector=aiohttp.TCPConnector(limit=0),
        )
        self.lost: float | None = self.now()  # since when no server was up
        self.watches = [asyncio.create_task(self._watch(server)) for server in self.servers]

    async def close(self) -> None:
        for watch in self.watches:
            watch.cancel()
        await asyncio.gather(*self.watches, return_exceptions=True)
        await self.http.close()

    @staticmethod
    def now() -> float:
        return asyncio.get_running_loop().time()

    # ---- which server

    def ready(self) -> list[Server]:
        """Those up with the weights that were published last, or else the newest. For any thread."""
        up = [server for server in self.servers if server.up and server.version >= 0 and not self.doubts(server)]
        versions = {server.version for server in up}
        best = self.wanted if self.wanted in versions else max(versions, default=-1)
        return [server for server in up if server.version == best]

    def doubts(self, server: Server) -> bool:
        """Whether it must prove first that it has the weights that it says."""
        proof, owed = self.proof, server.version == self.wanted and server.proved is not self.proof
        return owed and proof is not None and (proof.due or server.proved is None)

    async def pick(self, home: Server | None) -> Server:
        """The server for a turn: `home`, which holds its cache, if it is ready and has not far more than another.

        Waits while none is; raises as `check_hope`.
        """
        while True:
            self.check_hope(self.now())
            if ready := self.ready():
                least = min(ready, key=lambda server: len(server.turns))
                return home if home in ready and len(home.turns) <= 2 * len(least.turns) + SLACK else least
            await self.changed.wait()

    def check_hope(self, now: float) -> None:
        """Raise NoServerError if none was up in vllm.patience seconds, ValueError or GapError if waiting is useless."""
        if self.error:
            raise self.error
        if self.lost is not None and now - self.lost > self.vllm.patience:
            whys = "; ".join(f"{server.url}: {server.why}" for server in self.servers)
            raise NoServerError(f"agents.{self.name}.vllm: no server for {self.vllm.patience:g} s: {whys}")

    @contextmanager
    def turn(self, server: Server) -> Iterator[asyncio.Timeout]:
        """A turn that runs there: TimeoutError when the server turns out to hang."""
        if not server.turns:
            server.heard = self.now()
        alarm = asyncio.timeout(None)
        server.turns.add(alarm)
        try:
            yield alarm
        finally:
            server.turns.discard(alarm)

    # ---- what a server says of itself

    async def _watch(self, server: Server) -> None:
        while True:
            if server.turns and self.now() - server.heard > self.vllm.timeout:
                self._hangs(server)
            if server.up or self.now() >= server.due:
                await self._ask(server)
            if server.up and self.doubts(server):
                await self._prove(server)
            self.changed.set()  # also that who waits looks at the clock
            self.changed.clear()
            await asyncio.sleep(TICK)

    def _hangs(self, server: Server) -> None:
        self.fault(server, f"no token for {self.vllm.timeout:g} s")
        for alarm in server.turns:
            alarm.reschedule(self.now())

    async def _ask(self, server: Server) -> None:
        began = self.now()
        try:
            async with asyncio.timeout(ASK):
                if not server.fits:
                    await self._fits(server)
                server.label(adapter.read_label(str((await self._get(server, adapter.LABEL))["label"])))
        except (*FAULTS, InvalidTurnError, LookupError, TypeError) as error:
            if not server.up:
                server.why = reason(error)
                self._pause(server)
            elif server.heard < began or not server.turns:  # else it is busy with what it was asked before
                self.fault(server, reason(error))
        except ValueError as error:
            self.error = self.error or error
        else:
            self._greet(server)

    async def _prove(self, server: Server) -> None:
        proof = self.proof
        assert proof is not None
        try:
            proof.judge(server.url, await self.scores(server, proof.tokens))
            server.proved = proof
        except Moved:
            pass  # what it has now is to be looked at first
        except (*FAULTS, InvalidTurnError) as error:
            self.fault(server, reason(error))
        except (ValueError, GapError) as error:
            self.error = self.error or error

    async def scores(self, server: Server, tokens: Sequence[int]) -> list[float]:
        """Return log p of each token but the first, by the weights that the server is known to have.

        Raises InvalidTurnError or one of FAULTS.
        """
        label = adapter.label(server.version, server.step)
        async with asyncio.timeout(self.vllm.timeout):
            return await asyncio.gather(*(self._score(server, label, tokens, at) for at in range(1, len(tokens))))

    async def _score(self, server: Server, label: str, tokens: Sequence[int], position: int) -> float:
        body = adapter.score_body(tokens, position, self.agent.temperature)
        async with self.post(server, adapter.GENERATE, body) as response:
            await self.check(response)
            said = await response.read()
        if response.headers.get(adapter.LABEL_HEADER) != label:
            raise Moved(f"{server.url}: other weights meanwhile")
        return float(parsed(lambda body: adapter.read_score(json.loads(body), tokens[position]), said))

    def _greet(self, server: Server) -> None:
        if not server.up:
            log.log(logging.WARNING if server.faults else logging.INFO, "%s: in service", server.url)
        server.up, self.lost = True, None

    async def _fits(self, server: Server) -> None:
        """Raises ValueError for a server that could never do."""
        adapter.check_version((await self._get(server, adapter.VERSION))["version"], server.url)
        model = (await self._get(server, adapter.MODELS))["data"][0]
        if model["max_model_len"] < self.agent.max_context:
            raise ValueError(
                f"{server.url}: --max-model-len {model['max_model_len']}: expected at least "
                f"agents.{self.name}.max_context = {self.agent.max_context}"
            )
        server.fits = True

    async def _get(self, server: Server, path: str) -> Any:
        async with self.http.get(server.url + path) as response:
            await self.check(response)
            try:
                return json.loads(await response.read())
            except ValueError as error:
                raise InvalidTurnError(f"{path}: {error}") from error

    def post(self, server: Server, path: str, body: Any, headers: dict[str, str] | None = None) -> Any:
        """A response, as a context."""
        given = {"Content-Type": "application/json", **(headers or {})}
        return self.http.post(server.url + path, data=msgspec.json.encode(body), headers=given)

    async def check(self, response: aiohttp.ClientResponse) -> None:
        """Raise InvalidTurnError for a status that another server or later try may not have, else ValueError."""
        status = response.status
        if status == 200:
            return
        said = (await response.content.read(500)).decode(errors="replace")
        if status in (401, 403):
            raise ValueError(f"{response.url}: {status}: expected another token in the environment's {TOKEN}")
        if status in (408, 409, 425, 429) or status >= 500:
            raise InvalidTurnError(f"status {status}: {said}")
        raise ValueError(f"agents.{self.name}.vllm: {response.url}: status {status}: {said}")

    # ---- what goes wrong

    def fault(self, server: Server, why: str) -> None:
        """Out of service, until it is asked again and answers. Of all the turns that notice, the first counts."""
        if not server.up:
            return
        log.warning("%s: out of service: %s", server.url, why)
        server.up, server.fits, server.proved, server.why = False, False, None, why
        self.faults += 1
        self._pause(server)
        if not any(server.up for server in self.servers):
            self.lost = self.now()

    def _pause(self, server: Server) -> None:
        """Before it is asked again."""
        server.due = self.now() + min(TICK * 2.0 ** min(server.faults, 30), LONGEST)
        server.faults += 1
