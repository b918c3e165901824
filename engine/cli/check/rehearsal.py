"""Play episodes of an environment in which a stub writes every turn, and report what would go wrong in a run.

A stub writes nothing at all, random tokens up to the limit, what the environment's script says, or texts made of the
words in its source (words.py). Each episode runs in a thread of its own, so that a method that never returns ends its
episode alone, by its name. A tool is called at most once for made-up texts; judges are asked only where that needs no
network, unless they may be (offline.py).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from transformers import PreTrainedTokenizerBase

from mgrpo.engine.cli.check import offline
from mgrpo.engine.cli.check.watch import EnvironmentWatch
from mgrpo.engine.cli.check.words import read_source, texts_of
from mgrpo.engine.config.schema import Config
from mgrpo.engine.environment.base import Environment
from mgrpo.engine.hub.snapshots import folder
from mgrpo.engine.inference.sampler import Completion, Ending, Session
from mgrpo.engine.model.causal_lm import read_model_config
from mgrpo.engine.model.pieces import end_tokens, generation_config
from mgrpo.engine.rollout.episodes import EpisodeRunner, Job, Rollout
from mgrpo.engine.types import MAIN, Call, Delegate, Task, ToolCall

POLL = 0.01  # seconds between looks at what runs
BUDGET = 2.0  # seconds for the prompts of all tasks, and again for the texts made of words
VAIN = 60  # of these texts that lead to nothing new before no more are tried
PROMPTS = 200  # tasks whose prompts are written, at most
TOGETHER = 25  # of them side by side
FULL = "the prompt of task"  # words of the error of an episode whose prompt leaves no room

Texts = Mapping[str, str]  # by agent, what it writes in its first turn


@dataclass(frozen=True)
class Stub:
    """Say what agents write. kind: "empty text", "random text", "script" or "words"; texts: for words."""

    kind: str
    texts: Texts = field(default_factory=dict)


@dataclass
class Findings:
    """Hold what was found, each once. faults: a run would fail or lose episodes. notes: it may be meant so."""

    faults: dict[str, None] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)

    def fault(self, text: str) -> None:
        """Add a fault."""
        self.faults.setdefault(text)

    def note(self, text: str) -> None:
        """Add a note."""
        self.notes.setdefault(text)


class StubbedEpisodes(EpisodeRunner):
    """Run episodes whose turns a stub writes, as far as a sampler could: within the limits, ended by stop strings.

    lengths: tokens of the longest prompt of each agent.
    """

    def __init__(
        self,
        config: Config,
        environment: Environment,
        tokenizers: Mapping[str, PreTrainedTokenizerBase],
        findings: Findings,
        judged: bool,
    ) -> None:
        super().__init__(config, environment, tokenizers, judged=judged)
        self.stub, self.findings = Stub("empty text"), findings
        self.lengths: dict[str, int] = {}
        self.had_room = True  # so that prompts without room are no error of the whole, but counted here
        self.endings = {
            name: Ending(
                tokenizers[name], agent.stop, end_tokens(tokenizers[name], generation_config(folder(name, agent)))
            )
            for name, agent in config.agents.items()
        }
        models = {name: read_model_config(name, agent) for name, agent in config.agents.items()}
        self.vocabularies = {name: model["vocab_size"] for name, model in models.items()}

    def play(self, tasks: Sequence[Task], stub: Stub) -> list[Rollout]:
        """Play an episode of each task, side by side."""
        self.stub = stub
        return self.run([Job(i, 0, task) for i, task in enumerate(tasks)])

    async def _advance(self) -> None:
        """Let the episodes go on at once; most of them have ended by now."""
        await asyncio.sleep(0.001)

    async def _act(self, call: Call, session: Session) -> Completion:
        self._look(call, session)
        agent, ending = self.config.agents[call.agent], self.endings[call.agent]
        allowed = min(agent.max_new_tokens, agent.max_context - len(session.tokens))
        if allowed < 1:
            return Completion("", 0, truncated=True)
        tokens = await self._written(call, allowed)
        stop = ending.length(tokens)
        turn = tokens[: min(allowed, len(tokens) if stop is None else stop)]
        session.append(turn, [0.0] * len(turn))
        return Completion(ending.text(turn), len(turn), truncated=stop is None)

    async def _written(self, call: Call, allowed: int) -> list[int]:
        """Return the tokens that the stub writes, at least one."""
        end = min(self.endings[call.agent].ends)
        if self.stub.kind == "random text":
            random = np.random.default_rng([self.config.seed, len(call.turns)])
            return random.integers(0, len(self.tokenizers[call.agent]), allowed).tolist()  # type: ignore[arg-type]
        if self.stub.kind == "script":
            return await self._scripted(call, allowed)
        text = "" if call.turns else self.stub.texts.get(call.agent, "")
        closing = self.config.agents[call.agent].stop[:1]
        return [*self._encode(call, text + "".join(closing)), end] if text else [end]

    async def _scripted(self, call: Call, allowed: int) -> list[int]:
        text = await self.code.text(self.environment.script, call)
        tokens, agent, key = self._encode(call, text), self.config.agents[call.agent], f"agents.{call.agent}"
        if len(tokens) > agent.max_new_tokens:
            self.findings.note(
                f"{key}.max_new_tokens: {agent.max_new_tokens} given: a turn of the script has {len(tokens)} tokens: "
                "an agent that has learnt it is cut off"
            )
        if tokens and self.endings[call.agent].length(tokens) is None and len(tokens) <= allowed:
            self.findings.note(
                f"script: {text[-40:]!r} ends no turn: expected one of {key}.stop = {agent.stop} or an end-of-sequence "
                "token at its end, or agents learn never to stop"
            )
        return [*tokens, min(self.endings[call.agent].ends)]

    def _look(self, call: Call, session: Session) -> None:
        """Check what an agent is shown: that its ids are in the vocabulary, and that its prompt leaves room."""
        most = self.vocabularies[call.agent]
        beyond = [token for token in session.tokens if not 0 <= token < most]
        if beyond:
            self.findings.fault(
                f"agents.{call.agent}.model: token id {beyond[0]} in what it reads: expected ids below {most}, the "
                "size of its model's vocabulary"
            )
        if not call.turns:
            self.lengths[call.agent] = max(self.lengths.get(call.agent, 0), len(session.tokens))
            limit = self.config.agents[call.agent].max_context
            if len(session.tokens) >= limit:
                self.findings.fault(
                    f"agents.{call.agent}.max_context: {limit} given: a prompt of {call.agent} has "
                    f"{len(session.tokens)} tokens: expected room for an answer"
                )

    def _log_once(self, job: Job, error: Any) -> None:
        """Log nothing: the findings tell it."""


class Rehearsal:
    """Play stubbed episodes of an environment's tasks; `findings` holds what is wrong.

    asks: judges may be asked over the network. patience: seconds that a method may take.
    """

    def __init__(
        self,
        config: Config,
        environment: Environment,
        tokenizers: Mapping[str, PreTrainedTokenizerBase],
        asks: bool,
        patience: float,
    ) -> None:
        once = msgspec.structs.replace(config.reward, tries=1)
        self.config = msgspec.structs.replace(config, reward=once)
        self.environment, self.tokenizers, self.asks, self.patience = environment, tokenizers, asks, patience
        self.findings, self.watch = Findings(), EnvironmentWatch(environment, asks)
        self.source = read_source(environment)
        self.lengths: dict[str, int] = {}
        self.played = self.scored = 0
        self.unscored = ""  # why no judge was asked
        self.hung: set[str] = set()

    def run(self, train: Sequence[Task], held_out: Sequence[Task]) -> None:
        """Play all kinds of stubs."""
        self._prompts([*_spread(train), *_spread(held_out)])
        first = train[0]
        if not asks_unseen(self.asks) and type(self.environment).score is not Environment.score:
            self.unscored = f"{', '.join(offline.unseen())} may connect unseen"
        for stub in (Stub("script"), Stub("empty text"), Stub("random text")):
            if stub.kind != "script" or type(self.environment).script is not Environment.script:
                self._play(first, stub)
        if "script" in self.watch.called and len(train) > 1:
            self._play(train[-1], Stub("script"))
        self.watch.sparing = True
        self._words(first)

    # ---- the kinds of episodes

    def _prompts(self, tasks: Sequence[Task]) -> None:
        """Write the prompts of many tasks, as many as there is time for."""
        until, stub = time.monotonic() + BUDGET, Stub("empty text")
        full: list[str] = []
        done = 0
        for i in range(0, len(tasks), TOGETHER):
            if time.monotonic() > until or self.hung:
                break
            rollouts = self._watched(self._runner(judged=False), tasks[i : i + TOGETHER], stub)
            done += len(rollouts)
            full += [rollout.error for rollout in rollouts if FULL in rollout.error]
            for rollout in rollouts:
                self._judge_rollout(rollout, stub)
        if full:
            (self.findings.fault if len(full) == done else self.findings.note)(
                f"{full[0]} ({len(full)} of {done} tasks that were tried have no room: their episodes are lost)"
            )

    def _words(self, task: Task) -> None:
        """Try texts made of words: first for the main agent, then for each sub-agent that one of them asks."""
        asked = self._try_words(task, MAIN, {})
        for sub, asking in asked.items():
            self._try_words(task, sub, {MAIN: asking})

    def _try_words(self, task: Task, agent: str, before: Texts) -> dict[str, str]:
        """Try texts for one agent, until none leads to anything new; return those that ask each sub-agent."""
        until, since = time.monotonic() + BUDGET / len(self.config.agents), 0
        asked: dict[str, str] = {}
        known: set[str] = set()
        for text in texts_of(self.source.words):
            if self.hung or since > VAIN or time.monotonic() > until:
                break
            rollout = self._play(task, Stub("words", {**before, agent: text}), judged=False)
            found = [use for call in _calls(rollout) if call.agent == agent for use in _uses(call)]
            kinds = {f"{type(use).__name__} {_name(use)}" for use in found}
            since = 0 if kinds - known else since + 1
            known |= kinds
            for use in found:
                if isinstance(use, Delegate) and use.agent in self.config.subs:
                    asked.setdefault(use.agent, text)
        return asked

    # ---- one episode

    def _play(self, task: Task, stub: Stub, judged: bool = True) -> Rollout | None:
        runner = self._runner(judged and not self.unscored)
        offline.take_refused()
        rollout = next(iter(self._watched(runner, [task], stub)), None)
        if rollout is None:
            return None
        if offline.take_refused() and rollout.status == "unscored":
            self.unscored = "it needs the network"
        else:
            self._judge_rollout(rollout, stub)
        self.scored += rollout.status == "scored"
        self._look(rollout, stub)
        return rollout

    def _runner(self, judged: bool) -> StubbedEpisodes:
        return StubbedEpisodes(self.config, self.environment, self.tokenizers, self.findings, judged)

    def _watched(self, runner: StubbedEpisodes, tasks: Sequence[Task], stub: Stub) -> list[Rollout]:
        """Play episodes in a thread; none is returned if a method does not return, which is then a finding."""
        found: list[Rollout] = []
        ended, work = threading.Event(), (found, runner, tasks, stub)
        if self.environment.in_threads:
            threading.Thread(target=_play_into, args=(ended, *work), daemon=True).start()
        else:  # its code must not leave the main thread, so nothing here can end a method that hangs
            _play_into(ended, *work)
        while not ended.wait(POLL):
            if name := self.watch.overdue(self.patience):
                self._hangs(name, stub)
                offline.lift()
                return []
        self.played += len(found)
        for agent, length in runner.lengths.items():
            self.lengths[agent] = max(length, self.lengths.get(agent, 0))
        return found

    def _hangs(self, method: str, stub: Stub) -> None:
        self.hung.add(method)
        self.findings.fault(
            f"{type(self.environment).__name__}.{method}: no result within {self.patience:g} s, with {stub.kind}: "
            "expected a method that returns (--patience gives it longer)"
        )

    def _judge_rollout(self, rollout: Rollout, stub: Stub) -> None:
        """Report why an episode failed, with the place where the user's code raised."""
        if rollout.error and FULL not in rollout.error:
            raised = next((place for text, place in self.watch.raised.items() if rollout.error.endswith(text)), "")
            place = f" ({raised})" if raised else ""
            self.findings.fault(f"{rollout.error}{place}, with {stub.kind}")

    def _look(self, rollout: Rollout, stub: Stub) -> None:
        """Report sub-agents and tools that do not exist, as far as the environment, not a made-up text, names them."""
        calls = _calls(rollout)
        written = " ".join(turn.text for call in calls for turn in call.turns) if stub.kind != "script" else ""
        for call in calls:
            for use in _uses(call):
                if isinstance(use, Delegate):
                    self._check_delegate(call, use, written)
                else:
                    self._check_tool(use, written)

    def _check_delegate(self, call: Call, use: Delegate, written: str) -> None:
        known = _name(use) not in written or _name(use) in self.source.agents
        if call.agent == MAIN and use.agent not in self.config.subs and known:
            self.findings.fault(
                f"parse: Delegate({use.agent!r}, …) returned: expected one of the sub-agents {self.config.subs}, or a "
                f"section [agents.{use.agent}]"
            )
        elif call.agent != MAIN:
            self.findings.note(f"parse: {call.agent} asks {use.agent!r}: only {MAIN} can ask sub-agents")

    def _check_tool(self, use: ToolCall, written: str) -> None:
        none = type(self.environment).tool is Environment.tool
        name = _name(use)
        if name in self.watch.missing and (none or name not in written or name in self.source.tools):
            self.findings.fault(
                f"parse: ToolCall({use.name!r}, …) returned, and {type(self.environment).__name__}.tool knows no such "
                "tool: expected one that it runs"
            )


def asks_unseen(asks: bool) -> bool:
    """Return whether judges may be asked in any case: they are allowed to connect, or none could unseen."""
    return asks or not offline.unseen()


def _calls(rollout: Rollout | None) -> list[Call]:
    return [rollout.episode.main, *rollout.episode.calls] if rollout is not None else []


def _uses(call: Call) -> list[ToolCall | Delegate]:
    return [use for turn in call.turns if isinstance(turn.action, tuple) for use in turn.action]


def _name(use: ToolCall | Delegate) -> str:
    return str(use.name if isinstance(use, ToolCall) else use.agent)


def _spread(tasks: Sequence[Task]) -> list[Task]:
    """Return at most PROMPTS / 2 tasks, from all over."""
    step = max(1, len(tasks) * 2 // PROMPTS)
    return [tasks[i] for i in range(0, len(tasks), step)]


def _play_into(
    ended: threading.Event, found: list[Rollout], runner: StubbedEpisodes, tasks: Sequence[Task], stub: Stub
) -> None:
    try:
        found += runner.play(tasks, stub)
    finally:
        ended.set()
