"""Environments in the shapes that others write them, as ours: a text game, or an agent's own loop over a chat function.

Both are for one agent, the main one. Departs from running such code as it stands in who asks whom: our episodes ask the
environment, so a loop that asks for replies runs as a coroutine beside them, and each of its requests is a turn. What a
conversation has said so far is never rendered again: tokens stay as they were sampled.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from mgrpo.engine.environment.base import Environment
from mgrpo.engine.types import Action, Answer, Call, Delegate, Episode, Score, Task, ToolCall

Held = TypeVar("Held")
Message = dict[str, str]  # "role" and "content"
Chat = Callable[[Sequence[Message]], Awaitable[str]]
Results = Sequence[tuple[ToolCall | Delegate, str]]


class _PerCall(Generic[Held]):
    """What belongs to a call while there is one."""

    def __init__(self) -> None:
        self._held: dict[int, Held] = {}

    def __setitem__(self, call: Call, held: Held) -> None:
        self._held[id(call)] = held
        weakref.finalize(call, self._held.pop, id(call), None)

    def __getitem__(self, call: Call) -> Held:
        return self._held[id(call)]


class Game(Protocol):
    """Gymnasium's methods, over texts."""

    def reset(self) -> tuple[str, dict[str, Any]]: ...

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """What is to be read then, a reward, whether it is over, whether it was cut off, and whatever else."""


@dataclass
class _Match:
    game: Game
    text: str
    reward: float = 0.0


class TextGame(Environment):
    """A game: say `tasks` and `make`. Each turn of the agent is a step; its reward is the sum of the steps'.

    A game that is over, or cut off, was played to its end: the format is valid. One that the agent's turns or its
    context did not suffice for is not.
    """

    def __init__(self) -> None:
        self._matches: _PerCall[_Match] = _PerCall()

    def make(self, task: Task) -> Game:
        """A game of its own for one episode."""
        raise NotImplementedError

    def prompt(self, call: Call) -> str:
        game = self.make(call.task)
        text, _ = game.reset()
        self._matches[call] = _Match(game, text)
        return text

    def parse(self, call: Call, text: str) -> Action:
        match = self._matches[call]
        match.text, reward, over, cut, _ = match.game.step(text.strip())
        match.reward += float(reward)
        return Answer(text) if over or cut else (ToolCall("step", text),)

    def tool(self, call: Call, use: ToolCall) -> str:
        return self._matches[call].text

    def observation(self, call: Call, results: Results) -> str:
        return "".join(text for _, text in results)

    def score(self, episode: Episode) -> Score:
        return Score(format=episode.main.ended == "answer", correct=self._matches[episode.main].reward)


class ChatLoop(Environment):
    """An agent that is written as a loop over a chat function: say `tasks` and `play`.

    begin, end: how a message is written out, ChatML as it is. end: what the model itself closes a reply with, as a stop
    string or as its end-of-sequence token; break_: what stands between two messages.
    """

    begin, end, break_ = "<|im_start|>{role}\n", "<|im_end|>", "\n"

    def __init__(self) -> None:
        self._talks: _PerCall[_Talk] = _PerCall()

    async def play(self, chat: Chat, task: Task) -> float:
        """The agent's loop: as often as it likes `await chat(messages)`, which returns the reply; then its reward.

        messages: OpenAI's, from the first on, each time the last ones with the reply and something new behind them.
        """
        raise NotImplementedError

    async def prompt(self, call: Call) -> str:  # type: ignore[override]  # an environment's methods may be async
        self._talks[call] = talk = _Talk(self.play, call.task)
        weakref.finalize(call, _end, talk.running)  # of an episode that fails nobody asks the score
        messages = await talk.asked()
        if messages is None:
            raise ValueError("play: it ended without a word to chat")
        return self._written(messages)

    async def parse(self, call: Call, text: str) -> Action:  # type: ignore[override]
        talk = self._talks[call]
        talk.answer(text.removesuffix(self.end))
        talk.said = await talk.asked()
        return Answer(text) if talk.said is None else (ToolCall("chat", ""),)

    def tool(self, call: Call, use: ToolCall) -> str:
        said = self._talks[call].said
        assert said is not None
        return self._written(said)

    def observation(self, call: Call, results: Results) -> str:
        """A reply that was cut off is closed for the model."""
        closing = self.end if call.turns[-1].truncated else ""
        return closing + self.break_ + "".join(text for _, text in results)

    async def score(self, episode: Episode) -> Score:  # type: ignore[override]
        talk = self._talks[episode.main]
        talk.running.cancel()  # it may wait for a reply that will not come
        return Score(format=episode.main.ended == "answer", correct=talk.reward)

    def _written(self, messages: Sequence[Message]) -> str:
        """The messages, and the beginning of the reply."""
        texts = [f"{self.begin.format(role=m['role'])}{m['content']}{self.end}{self.break_}" for m in messages]
        return "".join(texts) + self.begin.format(role="assistant")


def _end(running: asyncio.Task[None]) -> None:
    loop = running.get_loop()
    if not loop.is_closed():
        loop.call_soon_threadsafe(running.cancel)


class _Talk:
    """A loop under way. said: the messages that were not there before, until they are shown."""

    def __init__(self, play: Callable[[Chat, Task], Awaitable[float]], task: Task):
        self.requests: asyncio.Queue[list[Message] | None] = asyncio.Queue()
        self.reply: asyncio.Future[str] | None = None
        self.history: list[Message] = []
        self.said: list[Message] | None = None
        self.reward = 0.0
        self.running = asyncio.create_task(self._run(play, task))

    async def _run(self, play: Callable[[Chat, Task], Awaitable[float]], task: Task) -> None:
        try:
            self.reward = float(await play(self._chat, task))
        finally:
            self.requests.put_nowait(None)

    async def _chat(self, messages: Sequence[Message]) -> str:
        if self.reply is not None:
            raise ValueError("chat: asked while a reply is being written, expected one conversation")
        given, known = [dict(message) for message in messages], len(self.history)
        if given[:known] != self.history or len(given) == known:
            raise ValueError(f"chat: {given} given: expected {self.history} and something new behind it")
        self.reply = asyncio.get_running_loop().create_future()
        self.requests.put_nowait(given[known:])
        text = await self.reply
        self.reply = None
        self.history = [*given, {"role": "assistant", "content": text}]
        return text

    def answer(self, text: str) -> None:
        assert self.reply is not None
        self.reply.set_result(text)

    async def asked(self) -> list[Message] | None:
        """The next request, None when the loop is through. Raises what the loop raised."""
        messages = await self.requests.get()
        if messages is None:
            await self.running
        return messages
