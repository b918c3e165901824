"""Episodes: the main agent acts, calls its sub-agents, reads what comes back, and answers; the environment judges.

Every episode is a coroutine written the way it reads; episodes run side by side and come and go, and the samplers
advance whatever turns are waiting together. Tokens stay ids: only what the environment writes is tokenised, once.
Samplers in this process are stepped here, between looks at what the episodes do; others, on servers, end a turn when
they have it. While no sampler here has work, this loop sleeps until a turn is asked for or an episode ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from mgrpo.engine.config.schema import Config, EnvironmentConfig
from mgrpo.engine.environment.base import Environment, ToolError
from mgrpo.engine.environment.calls import UserCodeError, ask_action, ask_score, ask_text
from mgrpo.engine.inference.sampler import Completion, Sampler, Session
from mgrpo.engine.system.imports import load_name
from mgrpo.engine.types import (
    MAIN,
    Answer,
    Call,
    Delegate,
    Episode,
    Malformed,
    Score,
    Task,
    ToolCall,
    Trajectory,
    Turn,
)

POLL = 0.25  # seconds after which a stream of episodes asks for more, though none of its own went on
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One rollout to make: the rollout-th episode of a query, which asks a task."""

    query: int
    rollout: int
    task: Task
    greedy: bool = False


@dataclass
class Rollout:
    """What became of a job. trajectories[0] is the main agent's, [1 + i] that of episode.calls[i].

    status: "scored"; "unscored" (the judge failed: out of its group); "failed" (the user's code raised).
    """

    job: Job
    episode: Episode
    status: str = "failed"
    score: Score | None = None
    trajectories: list[Trajectory | None] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""


class Episodes:
    """Runs episodes of one environment with one sampler per agent.

    timeout: seconds after which an episode is given up as failed.
    """

    def __init__(
        self, config: Config, environment: Environment, samplers: dict[str, Sampler], timeout: float | None = None
    ):
        self.config, self.environment, self.samplers, self.timeout = config, environment, samplers, timeout
        self.agent_index = {name: i for i, name in enumerate(config.agents)}
        self.logged: set[str] = set()  # tracebacks already in the log
        self.busy = 0.0  # seconds that the samplers took, in all; on servers too
        self.acting = 0  # turns that run

    def run(self, jobs: Sequence[Job]) -> list[Rollout]:
        """Run all jobs side by side and return their rollouts in the jobs' order."""
        batches, rollouts = iter([jobs]), list[Rollout]()
        self.stream(lambda running: next(batches, ()), rollouts.append)
        place = {id(job): i for i, job in enumerate(jobs)}
        return sorted(rollouts, key=lambda rollout: place[id(rollout.job)])

    def stream(self, more: Callable[[int], Sequence[Job]], ended: Callable[[Rollout], None]) -> None:
        """Run jobs as they come, until none runs and no more come.

        more: given how many run, the jobs to begin now; asked before every step of the samplers, and at least every
        POLL seconds. ended: told of each rollout as soon as it ended. What either raises ends all episodes.
        """
        asyncio.run(self._stream(more, ended))

    async def _stream(self, more: Callable[[int], Sequence[Job]], ended: Callable[[Rollout], None]) -> None:
        self.woken = asyncio.Event()  # a turn waits for its sampler, or an episode has ended
        running: set[asyncio.Task[Rollout]] = set()
        done: list[asyncio.Task[Rollout]] = []

        def note(task: asyncio.Task[Rollout]) -> None:
            done.append(task)
            self.woken.set()

        try:
            while True:
                for job in more(len(running)):
                    task = asyncio.create_task(self._rollout(job))
                    task.add_done_callback(note)
                    running.add(task)
                if not running:
                    return
                for _ in range(4):  # a sub-agent's result reaches the main agent's next turn through as many callbacks
                    await asyncio.sleep(0)
                for task in done:
                    running.remove(task)
                    ended(task.result())  # raises what ends all of them: an error that is not one episode's
                done.clear()
                await self._advance()
        finally:  # Ctrl-C, or an error of one: end the others before their samplers are used again
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _advance(self) -> None:
        """Every coroutine went as far as it can: advance the sampler with the most calls waiting."""
        busiest = max(self.samplers.values(), key=lambda sampler: sampler.pending)
        if busiest.pending:
            began = time.monotonic()
            busiest.step()
            self.busy += time.monotonic() - began
        else:  # they wait for the user's async code, or for servers
            began = time.monotonic()
            self.woken.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.woken.wait(), POLL)
            if self.acting:
                self.busy += time.monotonic() - began

    async def _rollout(self, job: Job) -> Rollout:
        started = time.monotonic()
        rollout = Rollout(job, Episode(Call(MAIN, job.task)))
        rollout.trajectories.append(None)
        try:
            async with asyncio.timeout(self.timeout):
                await self._call(rollout, 0, rollout.episode.main)
            rollout.status = "unscored"
            rollout.score = await ask_score(self.environment.score, rollout.episode, self.config.reward.timeout)
            rollout.status = "scored"
        except UserCodeError as error:
            rollout.error = str(error)
            self._log_once(job, error)
        except TimeoutError:
            rollout.error = f"no end within {self.timeout} s"
        rollout.seconds = time.monotonic() - started
        return rollout

    async def _call(self, rollout: Rollout, index: int, call: Call) -> None:
        """One agent's run from its prompt to its end. index: 0 for main, 1 + i for the i-th sub-agent call."""
        job, sampler, agent = rollout.job, self.samplers[call.agent], self.config.agents[call.agent]
        seed = (self.config.seed, job.query, job.rollout, self.agent_index[call.agent], index)
        session = Session(seed, job.greedy, sampler.version, sampler.version, sampler.weights_step)
        session.append(self._encode(sampler, await ask_text(self.environment.prompt, call)))
        if not session.tokens:
            raise UserCodeError("prompt: '' returned, expected some text to begin with")
        if len(session.tokens) >= agent.max_context and call.agent == MAIN:
            raise ValueError(
                f"agents.{MAIN}.max_context: {agent.max_context} given: the prompt of task {job.task.id!r} "
                f"has {len(session.tokens)} tokens already, expected room for an answer"
            )
        try:
            call.ended = await self._turns(rollout, call, sampler, session)
        finally:
            sampler.close(session)
            rollout.trajectories[index] = session.trajectory()

    async def _turns(self, rollout: Rollout, call: Call, sampler: Sampler, session: Session) -> str:
        for _ in range(self.config.agents[call.agent].max_turns):
            completion = await self._act(call, sampler, session)
            if completion.tokens == 0:
                return "context"
            action = await ask_action(self.environment.parse, call, completion.text)
            turn = Turn(completion.text, action, truncated=completion.truncated)
            call.turns.append(turn)
            if isinstance(action, Answer):
                call.answer = action.text
                return "answer"
            if isinstance(action, Malformed):
                return "malformed"
            results = await self._use_all(rollout, call, action)
            turn.observation = await ask_text(
                self.environment.observation, call, list(zip(action, results, strict=True))
            )
            session.append(self._encode(sampler, turn.observation))
        return "turns"

    async def _act(self, call: Call, sampler: Sampler, session: Session) -> Completion:
        self.woken.set()
        self.acting += 1
        try:
            return await sampler.act(session)
        finally:
            self.acting -= 1

    async def _use_all(self, rollout: Rollout, call: Call, uses: tuple[ToolCall | Delegate, ...]) -> list[str]:
        """Tools and delegations of one turn, side by side. A sibling of one that raises still runs to its end."""
        started = [self._use(rollout, call, use) for use in uses]
        results = await asyncio.gather(*started, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return [result for result in results if isinstance(result, str)]

    def _use(self, rollout: Rollout, call: Call, use: ToolCall | Delegate) -> Awaitable[str]:
        """Begin one; a sub-agent's call is entered in the episode at once: calls are numbered in the order made."""
        if isinstance(use, ToolCall):
            return self._tool(call, use)
        if call.agent != MAIN or use.agent not in self.config.subs:
            return self._refuse(call, use)
        sub = Call(use.agent, rollout.episode.task, use.request)
        rollout.episode.calls.append(sub)
        rollout.trajectories.append(None)
        return self._report(rollout, len(rollout.episode.calls), sub)

    async def _refuse(self, call: Call, use: Delegate) -> str:
        return f"error: {call.agent} cannot ask {use.agent!r}"

    async def _report(self, rollout: Rollout, index: int, call: Call) -> str:
        await self._call(rollout, index, call)
        return call.answer if call.answer is not None else f"error: {call.agent} gave no answer"

    async def _tool(self, call: Call, use: ToolCall) -> str:
        try:
            return await ask_text(self.environment.tool, call, use)
        except UserCodeError as error:
            if isinstance(error.__cause__, ToolError):
                return f"error: {error.__cause__}"
            raise

    def _encode(self, sampler: Sampler, text: str) -> list[int]:
        return list(sampler.tokenizer.encode(text, add_special_tokens=False))

    def _log_once(self, job: Job, error: UserCodeError) -> None:
        trace = "".join(traceback.format_exception(error.__cause__ or error))
        if trace not in self.logged:
            self.logged.add(trace)
            log.error("task %s, rollout %d: %s\n%s", job.task.id, job.rollout, error, trace)


class Demonstrations(Episodes):
    """Episodes in which the environment's script takes every agent's actions; nothing is sampled."""

    async def _act(self, call: Call, sampler: Sampler, session: Session) -> Completion:
        text = await ask_text(self.environment.script, call)
        tokens = self._encode(sampler, text)
        session.append(tokens, [0.0] * len(tokens))
        return Completion(text, len(tokens), truncated=False)


def load_environment(config: EnvironmentConfig) -> Environment:
    """Construct the user's environment. Raises ValueError if it cannot be found or made."""
    cls = load_name(config.use, "environment.use", "Class")
    if not (isinstance(cls, type) and issubclass(cls, Environment)):
        module, _, name = config.use.rpartition(":")
        raise ValueError(f"environment.use: {name!r} in {module} is {cls!r}: expected a subclass of Environment")
    try:
        return cls(**config.options)
    except TypeError as error:
        raise ValueError(f"environment.options: {config.options} given: {error}") from error
