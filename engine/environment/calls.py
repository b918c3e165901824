"""Call the user's environment and check what it returns. Every failure there becomes a UserCodeError."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np

from mgrpo.engine.types import Action, Answer, CallScore, Delegate, Episode, Malformed, Score, ToolCall


class UserCodeError(Exception):
    """Report that the environment's code raised, timed out, or returned something invalid."""


async def ask(function: Callable[..., Any], *args: Any) -> Any:
    """Call the user's code, plain or async, and return its result. No other place catches all its exceptions."""
    try:
        result = function(*args)
        return await result if inspect.isawaitable(result) else result
    except Exception as error:
        raise _failure(function, error) from error


async def ask_text(function: Callable[..., Any], *args: Any) -> str:
    """Call the user's code for a text. Raises UserCodeError, as all these functions do."""
    text = await ask(function, *args)
    if not isinstance(text, str):
        raise UserCodeError(f"{function.__qualname__}: {type(text).__name__} returned: expected str")
    return text


async def ask_action(function: Callable[..., Any], *args: Any) -> Action:
    """Call the user's code for an agent's action."""
    action: Action = await ask(function, *args)
    _check_action(action)
    return action


async def ask_score(judge: Callable[[Episode], Any], episode: Episode, seconds: float) -> Score:
    """Call the judge for a score; it may take at most that many seconds.

    A plain function runs in a thread, so that one that hangs does not block the run; an async one runs directly.
    """
    number = len(episode.calls)  # the judge may change the episode
    asked = ask(judge, episode) if inspect.iscoroutinefunction(judge) else _in_thread(judge, episode)
    try:
        score: Score = await asyncio.wait_for(asked, seconds)
    except TimeoutError as error:
        raise UserCodeError(f"score: no result within reward.timeout = {seconds} s") from error
    _check_score(number, score)
    return score


def _failure(function: Callable[..., Any], error: Exception) -> UserCodeError:
    failure = UserCodeError(f"{function.__qualname__}: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def _in_thread(function: Callable[[Episode], Score], episode: Episode) -> Awaitable[Score]:
    """Run a plain function in a daemon thread, which, unlike an executor's, cannot keep the process from exiting."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Score] = loop.create_future()

    def settle(set_it: Callable[[Any], None], outcome: Any) -> None:
        if not future.done():  # else the call timed out
            set_it(outcome)

    def work() -> None:
        try:
            set_it, outcome = future.set_result, function(episode)
        except Exception as error:  # as in `ask`: every error of the judge
            set_it, outcome = future.set_exception, _failure(function, error)  # type: ignore[assignment]
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, set_it, outcome)

    threading.Thread(target=work, daemon=True, name="score").start()
    return future


def _check_action(action: Action) -> None:
    uses = isinstance(action, tuple) and action and all(isinstance(use, ToolCall | Delegate) for use in action)
    answered = isinstance(action, Answer) and isinstance(action.text, str)
    if not (answered or isinstance(action, Malformed) or uses):
        raise UserCodeError(
            f"parse: {action!r} returned: expected Answer, Malformed, or a tuple of ToolCall and Delegate"
        )


def _check_score(made: int, score: Score) -> None:
    """Check the score of an episode with this number of calls."""
    if not isinstance(score, Score):
        raise UserCodeError(f"score: {type(score).__name__} returned: expected a Score")
    if not isinstance(score.calls, tuple) or not all(isinstance(call, CallScore) for call in score.calls):
        raise UserCodeError(f"score: calls is {score.calls!r}: expected a tuple of CallScore")
    if len(score.calls) != made:
        raise UserCodeError(f"score: calls has {len(score.calls)} scores: expected one for each of {made} calls")
    formats = {"format": score.format} | {f"calls[{i}].format": call.format for i, call in enumerate(score.calls)}
    for name, valid in formats.items():
        if not isinstance(valid, bool | np.bool_):
            raise UserCodeError(f"score: {name} is {valid!r}: expected True or False")
    numbers = {"correct": score.correct} | {f"calls[{i}].expert": call.expert for i, call in enumerate(score.calls)}
    for name, number in numbers.items():
        if not isinstance(number, int | float | np.number) or not math.isfinite(number):
            raise UserCodeError(f"score: {name} is {number!r}: expected a finite number")
