"""Adapt environments of other shapes: a text game, or an agent's own loop around a chat function.

Both are for a single agent, the main one. Usually such code asks the model for replies. Here episodes ask the
environment, so a loop runs as a coroutine beside its episode, and each of its requests becomes a turn. What was said so
far in a conversation is never rendered again: tokens stay as they were sampled.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from mgrpo.engine.environment.base import Environment
from mgrpo.engine.types import Action, Answer, Call, Delegate, Episode, Score, Task, ToolCall

Value = TypeVar("Value")
Message = dict[str, str]  # "role" and "content"
Chat = Callable[[Sequence[Message]], Awaitable[str]]
Results = Sequence[tuple[ToolCall | Delegate, str]]


class _PerCall(Generic[Value]):
    """Hold a value for each call, as long as the call exists."""

    def __init__(self) -> None:
        self._values: dict[int, Value] = {}

    def __setitem__(self, call: Call, value: Value) -> None:
        self._values[id(call)] = value
        weakref.finalize(call, self._values.pop, id(call), None)

    def __getitem__(self, call: Call) -> Value:
        return self._values[id(call)]


class Game(Protocol):
    """Describe a game with Gymnasium's methods, over texts."""

    def reset(self) -> tuple[str, dict[str, Any]]: ...

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Return the text to read next, a reward, whether the game is over, whether it was cut off, and an info."""


@dataclass
class _Match:
    game: Game
    text: str
    reward: float = 0.0


class TextGame(Environment):
    """Train on a game. Subclasses define `tasks` and `make`.

    Each turn of the agent is a step of the game, and the episode's reward is the sum of the steps' rewards. The format
    is valid if the game ended or was cut off, and invalid if the agent ran out of turns or of context before that.
    """

    def __init__(self) -> None:
        self._matches: _PerCall[_Match] = _PerCall()

    def make(self, task: Task) -> Game:
        """Return a new game for one episode."""
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
    """Train an agent that is written as a loop around a chat function. Subclasses define `tasks` and `play`.

    begin, end: the text before and after a message, by default ChatML's. The model must close its replies with `end`,
    as a stop string or as its end-of-sequence token. break_: the text between two messages.
    """

    begin, end, break_ = "<|im_start|>{role}\n", "<|im_end|>", "\n"

    def __init__(self) -> None:
        self._conversations: _PerCall[_Conversation] = _PerCall()

    async def play(self, chat: Chat, task: Task) -> float:
        """Run the agent's loop and return its reward. It calls `await chat(messages)` for each reply it needs.

        messages: the whole conversation in OpenAI's form: the messages of the last request, the reply, and new ones.
        """
        raise NotImplementedError

    async def prompt(self, call: Call) -> str:  # type: ignore[override]  # an environment's methods may be async
        self._conversations[call] = conversation = _Conversation(self.play, call.task)
        weakref.finalize(call, _cancel, conversation.running)  # if the episode fails, `score` is not called
        messages = await conversation.next_request()
        if messages is None:
            raise ValueError("play: it returned without calling chat: expected at least one call")
        return self._render(messages)

    async def parse(self, call: Call, text: str) -> Action:  # type: ignore[override]
        conversation = self._conversations[call]
        conversation.answer(text.removesuffix(self.end))
        conversation.unread = await conversation.next_request()
        return Answer(text) if conversation.unread is None else (ToolCall("chat", ""),)

    def tool(self, call: Call, use: ToolCall) -> str:
        unread = self._conversations[call].unread
        assert unread is not None
        return self._render(unread)

    def observation(self, call: Call, results: Results) -> str:
        """Return the new messages, after the end of a reply that was cut off and so has none."""
        closing = self.end if call.turns[-1].truncated else ""
        return closing + self.break_ + "".join(text for _, text in results)

    async def score(self, episode: Episode) -> Score:  # type: ignore[override]
        conversation = self._conversations[episode.main]
        conversation.running.cancel()  # it may be waiting for a reply that will not come
        return Score(format=episode.main.ended == "answer", correct=conversation.reward)

    def _render(self, messages: Sequence[Message]) -> str:
        """Return the text of messages and of the beginning of the reply."""
        texts = [f"{self.begin.format(role=m['role'])}{m['content']}{self.end}{self.break_}" for m in messages]
        return "".join(texts) + self.begin.format(role="assistant")


def _cancel(running: asyncio.Task[None]) -> None:
    """Cancel a loop from any thread."""
    loop = running.get_loop()
    if not loop.is_closed():
        loop.call_soon_threadsafe(running.cancel)


class _Conversation:
    """Run a loop as a task. unread: the new messages of the last request; None after the end."""

    def __init__(self, play: Callable[[Chat, Task], Awaitable[float]], task: Task):
        self.requests: asyncio.Queue[list[Message] | None] = asyncio.Queue()
        self.reply: asyncio.Future[str] | None = None
        self.history: list[Message] = []
        self.unread: list[Message] | None = None
        self.reward = 0.0
        self.running = asyncio.create_task(self._run(play, task))

    async def _run(self, play: Callable[[Chat, Task], Awaitable[float]], task: Task) -> None:
        try:
            self.reward = float(await play(self._chat, task))
        except (SystemExit, KeyboardInterrupt) as error:  # as a task's error it would end the event loop
            raise RuntimeError(f"play: {type(error).__name__}: {error}") from error
        finally:
            self.requests.put_nowait(None)

    async def _chat(self, messages: Sequence[Message]) -> str:
        if self.reply is not None:
            raise ValueError("chat: called while a reply is being written: expected one call at a time")
        given, known = [dict(message) for message in messages], len(self.history)
        if given[:known] != self.history or len(given) == known:
            raise ValueError(f"chat: {given} given: expected {self.history} and new messages after it")
        self.reply = asyncio.get_running_loop().create_future()
        self.requests.put_nowait(given[known:])
        text = await self.reply
        self.reply = None
        self.history = [*given, {"role": "assistant", "content": text}]
        return text

    def answer(self, text: str) -> None:
        """Return the model's reply to the loop."""
        assert self.reply is not None
        self.reply.set_result(text)

    async def next_request(self) -> list[Message] | None:
        """Return the new messages of the next request, None when the loop has ended. Raises what the loop raised."""
        messages = await self.requests.get()
        if messages is None:
            await self.running
        return messages
