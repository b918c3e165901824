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
from dataclasses import dataclass, field
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from mgrpo.engine.config.schema import Config
from mgrpo.engine.environment.base import Environment
from mgrpo.engine.environment.calls import UserCode, UserCodeError
from mgrpo.engine.environment.limits import CLEANUP, TimeLimit
from mgrpo.engine.environment.loop import run_loop
from mgrpo.engine.inference.sampler import Completion, Sampler, Session
from mgrpo.engine.model.pieces import for_pieces
from mgrpo.engine.rollout.copies import as_recorded, copy_of
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

LOGGED = 100  # most different tracebacks that one process logs, and remembers
POLL = 0.25  # longest wait in seconds before a stream asks for more jobs, even if none of its episodes has moved
log = logging.getLogger(__name__)


class Tokenizer(Protocol):
    """Turn text into token ids. Tokenizers of `transformers` do."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> Sequence[int]: ...


@dataclass(frozen=True)
class Job:
    """One rollout to make: the rollout-th episode of a query, which asks a task.

    evaluated: nothing but its correctness is asked for. temperature: None, that of each agent.
    """

    query: int
    rollout: int
    task: Task
    greedy: bool = False
    evaluated: bool = False
    temperature: float | None = None


@dataclass
class Rollout:
    """The outcome of a job. trajectories[0] is the main agent's, trajectories[1 + i] that of episode.calls[i].

    status: "scored"; "unscored" (the judge failed: the rollout is left out of its group); "failed" (the user's code
    raised, or took too long); "played" (to its end, with no judge to ask). seconds: how long the episode took. error:
    the reason, where the status is "unscored" or "failed".
    """

    job: Job
    episode: Episode
    status: str = "failed"
    score: Score | None = None
    trajectories: list[Trajectory | None] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""


class EpisodeRunner(ABC):
    """Run episodes of one environment; a subclass decides where an agent's turns come from.

    tokenizers: one per agent, by the agent's name. timeout: seconds after which an episode is given up as failed, by
    default sampling.timeout. In topology colocated and in evaluations only the seconds count in which the environment's
    code runs, since a whole step's episodes are sampled together, on whatever machine there is. judged: False asks for
    no score, and runs no tool whose result no turn could follow.
    """

    def __init__(
        self,
        config: Config,
        environment: Environment,
        tokenizers: Mapping[str, Tokenizer],
        timeout: float | None = None,
        judged: bool = True,
    ):
        self.config, self.environment, self.tokenizers, self.judged = config, environment, tokenizers, judged
        self.timeout = config.sampling.timeout if timeout is None else timeout
        self.code = UserCode(environment, config.deterministic, config.reward.tries)
        self.limits: set[TimeLimit] = set()  # of the episodes that run
        self.ending = False  # whether all episodes are being given up
        self.for_pieces = {name: _for_pieces(tokenizer) for name, tokenizer in tokenizers.items()}
        self.agent_index = {name: i for i, name in enumerate(config.agents)}
        self.logged: set[str] = set()  # tracebacks already in the log
        self.had_room = False  # whether any prompt of the main agent has left room for an answer
        self.without_room: dict[str, str] = {}  # the error of the first two tasks whose prompts have not, by their ids

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
        run_loop(self._stream(more, ended), self.code.watch)

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
        with contextlib.suppress(TimeoutError), self.code.watch.watching():
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
                with self.code.watch.watching():
                    for _ in range(4):  # it takes this many callbacks for a sub-agent's result to reach the main agent
                        await asyncio.sleep(0)
                for task in done:
                    running.remove(task)
                    ended(task.result())  # raises an error that concerns all episodes, not just this one
                done.clear()
                await self._advance()
        finally:  # after Ctrl-C or an error: end the other episodes before their samplers are used again
            await self._give_up(running)

    async def _give_up(self, running: set[asyncio.Task[Rollout]]) -> None:
        """End episodes; coroutines of theirs that do not end are left behind."""
        self.ending = True
        for give_up in (False, True):
            for limit in self.limits if give_up else ():
                limit.give_up()
            for task in running:
                task.cancel()
            if running:
                with self.code.watch.watching():
                    ended, running = await asyncio.wait(running, timeout=CLEANUP)
                for task in ended:
                    if not task.cancelled():
                        task.exception()  # known, or of no interest any more
        self.ending = False

    def blocked(self, seconds: float) -> str:
        """Say where the environment's code has held up the loop for longer than that; "" if it has not. For any thread.

        Plain functions cannot, since they run in other threads, unless `in_threads` is False, but an async one can that
        waits or computes for long. How many calls follow one another does not matter.
        """
        return self.code.watch.blocked(seconds)

    def check_stuck(self) -> None:
        """Raise StuckError, naming the functions, if too many calls of the environment have never returned."""
        self.code.threads.check()

    # ---- one episode

    async def _rollout(self, job: Job) -> Rollout:
        started = time.monotonic()
        rollout = Rollout(job, Episode(Call(MAIN, job.task)))
        rollout.trajectories.append(None)
        limit = TimeLimit(self.timeout, of_code=self.config.colocated or job.evaluated)
        self.limits.add(limit)
        try:
            async with limit:
                await self._call(rollout, 0, rollout.episode.main)
            rollout.status = "played"
            if self.judged:
                await self._judge(rollout)
        except UserCodeError as error:
            rollout.error = str(error)
            self._log_once(job, error)
        except TimeoutError:
            during = f", during {' and '.join(limit.during)}" if limit.during else ""
            rollout.error = f"no end within sampling.timeout = {self.timeout:g} s{during}"
        except asyncio.CancelledError:
            if self.ending:
                raise
            rollout.error = "the environment's code has cancelled its own episode"
        finally:
            self.limits.discard(limit)
        rollout.seconds = time.monotonic() - started
        return rollout

    async def _judge(self, rollout: Rollout) -> None:
        """Ask for the score of an episode. A judge may change the calls that it gets; what is recorded is a copy."""
        rollout.status = "unscored"
        calls = [rollout.episode.main, *rollout.episode.calls]
        rollout.episode = kept = copy_of(rollout.episode)
        ask = self.code.ask_correct if rollout.job.evaluated else self.code.ask_score
        rollout.score = await ask(lambda: as_recorded(calls, kept), self.config.reward.timeout)
        rollout.status = "scored"

    async def _call(self, rollout: Rollout, index: int, call: Call) -> None:
        """Run one agent from its prompt to its end. index: 0 for the main agent, 1 + i for the i-th sub-agent call."""
        job, agent = rollout.job, self.config.agents[call.agent]
        seed = (self.config.seed, job.query, job.rollout, self.agent_index[call.agent], index)
        session = self._begin(call, seed, job.greedy)
        session.temperature = job.temperature
        prompt = await self.code.text(self.environment.prompt, call)
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
        if len(self.without_room) < 2:  # more need not be remembered
            self.without_room[task.id] = error
        raise UserCodeError(error)

    async def _turns(self, rollout: Rollout, call: Call, session: Session) -> str:
        """Let the agent act until its call ends; return why it ended."""
        for _ in range(self.config.agents[call.agent].max_turns):
            completion = await self._act(call, session)
            if completion.tokens == 0:
                return "context"
            action = await self.code.action(call, completion.text)
            turn = Turn(completion.text, action, truncated=completion.truncated)
            call.turns.append(turn)
            if isinstance(action, Answer):
                call.answer = action.text
                return "answer"
            if isinstance(action, Malformed):
                return "malformed"
            if not self.judged and len(call.turns) == self.config.agents[call.agent].max_turns:
                await self._use_all(rollout, call, tuple(use for use in action if isinstance(use, Delegate)))
                break
            results = await self._use_all(rollout, call, action)
            pairs = list(zip(action, results, strict=True))
            turn.observation = await self.code.text(self.environment.observation, call, pairs)
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
        return await self.code.tool(call, use)

    def _encode(self, call: Call, text: str) -> list[int]:
        """Return the ids of a text that continues a call, to which nothing is added at the front."""
        return list(self.for_pieces[call.agent].encode(text, add_special_tokens=False))

    def _log_once(self, job: Job, error: UserCodeError) -> None:
        trace = "".join(traceback.format_exception(error.__cause__ or error))
        if trace in self.logged or len(self.logged) >= LOGGED:
            return
        self.logged.add(trace)
        last = f"\n{LOGGED} different errors are logged: further ones are counted only" * (len(self.logged) == LOGGED)
        log.error("task %s, rollout %d: %s\n%s%s", job.task.id, job.rollout, error, trace, last)


def _for_pieces(tokenizer: Tokenizer) -> Tokenizer:
    return for_pieces(tokenizer) if isinstance(tokenizer, PreTrainedTokenizerBase) else tokenizer


class Episodes(EpisodeRunner):
    """Run episodes whose turns are sampled, with one sampler per agent."""

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
