"""Run episodes: the main agent acts, calls its sub-agents, reads their reports and answers; the environment judges.

Every episode is a coroutine whose code follows the order of events. Episodes run side by side, each at its own pace,
and a sampler advances all turns that are waiting for it together. Tokens stay ids: only the environment's texts are
tokenised, once.

Samplers in this process are stepped by this loop, each time the episodes have gone as far as they can. Samplers on
servers end a turn by themselves. While no sampler of this process has work, the loop sleeps until a turn is requested
or an episode ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from mgrpo.engine.config.schema import Config
from mgrpo.engine.environment.base import Environment, ToolError
from mgrpo.engine.environment.calls import UserCodeError, ask_action, ask_score, ask_text
from mgrpo.engine.inference.sampler import Completion, Sampler, Session
from mgrpo.engine.model.pieces import for_pieces
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

POLL = 0.25  # longest wait in seconds before a stream asks for more jobs, even if none of its episodes has moved
log = logging.getLogger(__name__)


class Tokenizer(Protocol):
    """Turn text into token ids. Tokenizers of `transformers` do."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> Sequence[int]: ...


@dataclass(frozen=True)
class Job:
    """One rollout to make: the rollout-th episode of a query, which asks a task."""

    query: int
    rollout: int
    task: Task
    greedy: bool = False


@dataclass
class Rollout:
    """The outcome of a job. trajectories[0] is the main agent's, trajectories[1 + i] that of episode.calls[i].

    status: "scored"; "unscored" (the judge failed: the rollout is left out of its group); "failed" (the user's code
    raised). seconds: how long the episode took. error: the reason, where the status is not "scored".
    """

    job: Job
    episode: Episode
    status: str = "failed"
    score: Score | None = None
    trajectories: list[Trajectory | None] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""


def _copy_of(episode: Episode) -> Episode:
    """Return a copy of an episode with copies of its calls and turns; the task is the same object."""
    main, *calls = (
        replace(call, turns=[replace(turn) for turn in call.turns]) for call in (episode.main, *episode.calls)
    )
    return Episode(main, calls)


class EpisodeRunner(ABC):
    """Run episodes of one environment; a subclass decides where an agent's turns come from.

    tokenizers: one per agent, by the agent's name. timeout: seconds after which an episode is given up as failed.
    """

    def __init__(
        self,
        config: Config,
        environment: Environment,
        tokenizers: Mapping[str, Tokenizer],
        timeout: float | None = None,
    ):
        self.config, self.environment, self.tokenizers, self.timeout = config, environment, tokenizers, timeout
        self.for_pieces = {name: _for_pieces(tokenizer) for name, tokenizer in tokenizers.items()}
        self.agent_index = {name: i for i, name in enumerate(config.agents)}
        self.logged: set[str] = set()  # tracebacks already in the log
        self.had_room = False  # whether any prompt of the main agent has left room for an answer
        self.without_room: dict[str, str] = {}  # the error of each task whose prompt has not, by the task's id

    def run(self, jobs: Sequence[Job]) -> list[Rollout]:
        """Run all jobs side by side and return their rollouts in the jobs' order."""
        batches, rollouts = iter([jobs]), list[Rollout]()
        self.stream(lambda running: next(batches, ()), rollouts.append)
        place = {id(job): i for i, job in enumerate(jobs)}
        return sorted(rollouts, key=lambda rollout: place[id(rollout.job)])

    def stream(self, more: Callable[[int], Sequence[Job]], ended: Callable[[Rollout], None]) -> None:
        """Run jobs as they come, until none runs and no more come.

        more: receives the number of running episodes and returns the jobs to begin now. It is asked before every step
        of the samplers, and at least every POLL seconds. ended: receives each rollout as soon as it has ended. If
        either raises, all episodes are cancelled and the error is passed on. Raises ValueError at the end if the
        prompts of several tasks, and all so far, had no room for an answer.
        """
        asyncio.run(self._stream(more, ended))

    # ---- what a subclass says about an agent's turns

    def _begin(self, call: Call, seed: tuple[int, ...], greedy: bool) -> Session:
        """Return an empty session for a call."""
        return Session(seed, greedy)

    @abstractmethod
    async def _act(self, call: Call, session: Session) -> Completion:
        """Let the agent take its next turn and append it to the session."""

    def _end(self, call: Call, session: Session) -> None:  # noqa: B027 (a subclass may have nothing to release)
        """Release what a session holds in its sampler, if anything."""

    async def _advance(self) -> None:
        """Wait until an episode can go on; every coroutine has gone as far as it can."""
        self.woken.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.woken.wait(), POLL)

    # ---- the loop

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
                    if len(self.without_room) > 1 and not self.had_room:  # the setting is wrong, not one of the tasks
                        raise ValueError(next(iter(self.without_room.values())))
                    return
                for _ in range(4):  # it takes this many callbacks for a sub-agent's result to reach the main agent
                    await asyncio.sleep(0)
                for task in done:
                    running.remove(task)
                    ended(task.result())  # raises an error that concerns all episodes, not just this one
                done.clear()
                await self._advance()
        finally:  # after Ctrl-C or an error: end the other episodes before their samplers are used again
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    # ---- one episode

    async def _rollout(self, job: Job) -> Rollout:
        started = time.monotonic()
        rollout = Rollout(job, Episode(Call(MAIN, job.task)))
        rollout.trajectories.append(None)
        try:
            async with asyncio.timeout(self.timeout):
                await self._call(rollout, 0, rollout.episode.main)
            rollout.status = "unscored"
            shown, rollout.episode = rollout.episode, _copy_of(rollout.episode)  # the judge may change what it gets
            rollout.score = await ask_score(self.environment.score, shown, self.config.reward.timeout)
            rollout.status = "scored"
        except UserCodeError as error:
            rollout.error = str(error)
            self._log_once(job, error)
        except TimeoutError:
            rollout.error = f"no end within {self.timeout} s"
        rollout.seconds = time.monotonic() - started
        return rollout

    async def _call(self, rollout: Rollout, index: int, call: Call) -> None:
        """Run one agent from its prompt to its end. index: 0 for the main agent, 1 + i for the i-th sub-agent call."""
        job, agent = rollout.job, self.config.agents[call.agent]
        seed = (self.config.seed, job.query, job.rollout, self.agent_index[call.agent], index)
        session = self._begin(call, seed, job.greedy)
        prompt = await ask_text(self.environment.prompt, call)
        session.append(list(self.tokenizers[call.agent].encode(prompt, add_special_tokens=False)))
        if not session.tokens:
            raise UserCodeError("prompt: '' returned, expected some text to begin with")
        if call.agent == MAIN:
            self._check_room(job.task, len(session.tokens), agent.max_context)
        try:
            call.ended = await self._turns(rollout, call, session)
        finally:
            self._end(call, session)
            rollout.trajectories[index] = session.trajectory()

    def _check_room(self, task: Task, tokens: int, most: int) -> None:
        """Check that a prompt of the main agent leaves room for an answer.

        Raises UserCodeError, which ends this episode alone.
        """
        if tokens < most:
            self.had_room = True
            return
        error = (
            f"agents.{MAIN}.max_context: {most} given: the prompt of task {task.id!r} has {tokens} tokens already, "
            "expected room for an answer"
        )
        self.without_room[task.id] = error
        raise UserCodeError(error)

    async def _turns(self, rollout: Rollout, call: Call, session: Session) -> str:
        """Let the agent act until its call ends; return why it ended."""
        for _ in range(self.config.agents[call.agent].max_turns):
            completion = await self._act(call, session)
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
            session.append(self._encode(call, turn.observation))
        return "turns"

    # ---- tools and sub-agents

    async def _use_all(self, rollout: Rollout, call: Call, uses: tuple[ToolCall | Delegate, ...]) -> list[str]:
        """Run the tools and delegations of one turn side by side. If one raises, the others still run to their end."""
        started = [self._use(rollout, call, use) for use in uses]
        results = await asyncio.gather(*started, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return [result for result in results if isinstance(result, str)]

    def _use(self, rollout: Rollout, call: Call, use: ToolCall | Delegate) -> Awaitable[str]:
        """Begin one tool call or delegation.

        A sub-agent's call is entered in the episode at once, so that calls are numbered in the order they were made.
        """
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

    def _encode(self, call: Call, text: str) -> list[int]:
        """Return the ids of a text that continues a call, to which nothing is added at the front."""
        return list(self.for_pieces[call.agent].encode(text, add_special_tokens=False))

    def _log_once(self, job: Job, error: UserCodeError) -> None:
        trace = "".join(traceback.format_exception(error.__cause__ or error))
        if trace not in self.logged:
            self.logged.add(trace)
            log.error("task %s, rollout %d: %s\n%s", job.task.id, job.rollout, error, trace)


def _for_pieces(tokenizer: Tokenizer) -> Tokenizer:
    return for_pieces(tokenizer) if isinstance(tokenizer, PreTrainedTokenizerBase) else tokenizer


class Episodes(EpisodeRunner):
    """Run episodes whose turns are sampled, with one sampler per agent.

    timeout: seconds after which an episode is given up as failed.
    """

    def __init__(
        self, config: Config, environment: Environment, samplers: Mapping[str, Sampler], timeout: float | None = None
    ):
        super().__init__(config, environment, {name: one.tokenizer for name, one in samplers.items()}, timeout)
        self.samplers = samplers
        self.busy = 0.0  # seconds that the samplers were at work in all, those on servers included
        self.acting = 0  # turns being sampled now

    def _begin(self, call: Call, seed: tuple[int, ...], greedy: bool) -> Session:
        version = self.samplers[call.agent].version
        return Session(seed, greedy, version, version)

    async def _act(self, call: Call, session: Session) -> Completion:
        self.woken.set()
        self.acting += 1
        try:
            return await self.samplers[call.agent].act(session)
        finally:
            self.acting -= 1

    def _end(self, call: Call, session: Session) -> None:
        self.samplers[call.agent].close(session)

    async def _advance(self) -> None:
        """Step the sampler with the most waiting calls; if none waits here, wait for servers or the user's code."""
        busiest = max(self.samplers.values(), key=lambda sampler: sampler.pending)
        began = time.monotonic()
        if busiest.pending:
            busiest.step()
        else:
            await super()._advance()
            if not self.acting:  # only the user's code was at work
                return
        self.busy += time.monotonic() - began
