"""Call the user's environment and check what it returns. Every failure there becomes a UserCodeError.

A plain function runs in a thread, an async one in the event loop (`threads`, `limits`). Whatever they raise is a
failure of the episode that asked, also SystemExit, KeyboardInterrupt, or a CancelledError that nobody here has sent.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import signal
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np

from mgrpo.engine.environment.base import Environment, ToolError
from mgrpo.engine.environment.limits import CURRENT, TimeLimit, driven
from mgrpo.engine.environment.loop_watch import LoopWatch
from mgrpo.engine.environment.threads import NoThreadError, UserThreads, name_of
from mgrpo.engine.system.process import StopNow
from mgrpo.engine.types import Action, Answer, Call, CallScore, Delegate, Episode, Malformed, Score, ToolCall

PAUSE = 1.0  # seconds before a judge that failed is asked again; doubled each time
# A judge may always be asked again for SPARE rollouts, and after that for every EARNS-th one that it scored: if it is
# down, or wrong, a run does not spend its time on pauses.
SPARE, EARNS = 10.0, 10.0


class UserCodeError(Exception):
    """Report that the environment's code raised, timed out, or returned something invalid."""


class UserCode:
    """Call one environment's methods, with the threads that they need.

    in_order: wait for every plain function but judges before anything else goes on, as far as the time limit allows, so
    that the order of events does not depend on how long functions take. tries: how often a judge is asked for a
    rollout. Every method raises UserCodeError if the user's code fails.
    """

    def __init__(self, environment: Environment, in_order: bool = False, tries: int = 1) -> None:
        self.environment, self.in_order, self.tries = environment, in_order, tries
        self.watch = LoopWatch()
        self.threads = UserThreads(self.watch)
        self.spare = SPARE  # rollouts for which a judge may be asked again

    async def ask(self, function: Callable[..., Any], *args: Any, patience: float | None = None) -> Any:
        """Call the user's code, plain or async, and return its result. No other place catches all its exceptions."""
        limit = CURRENT.get()
        with limit.counting(name_of(function)) if limit else nullcontext():
            result = await self._begin(function, args, patience)
            try:
                if not inspect.isawaitable(result):
                    return result
                work = result if inspect.iscoroutine(result) else _awaiting(result)
                return await driven(work, self.watch.restart)
            except BaseException as error:  # as the docstring says
                if from_outside(error):
                    raise
                raise _failure(function, error) from error

    async def _begin(self, function: Callable[..., Any], args: tuple[Any, ...], patience: float | None) -> Any:
        """Call a function, in a thread if it is plain; return what it returns, perhaps an awaitable."""
        if not self.environment.in_threads or inspect.iscoroutinefunction(function):
            self.watch.restart()
            try:
                return function(*args)
            except BaseException as error:  # as above
                if from_outside(error):
                    raise
                raise _failure(function, error) from error
        if self.in_order and patience is None:
            limit = CURRENT.get()
            patience = limit.remaining if limit else math.inf
        try:
            call = await self.threads.call(function, args, patience)
        except NoThreadError as error:
            raise UserCodeError(f"{name_of(function)}: {error}") from None
        if call.error is not None:
            raise _failure(function, call.error) from call.error
        return call.value

    async def text(self, function: Callable[..., Any], *args: Any) -> str:
        """Call the user's code for a text."""
        text: str = _checked(function, lambda text: _check_text(function, text), await self.ask(function, *args))
        return text

    async def action(self, call: Call, text: str) -> Action:
        """Ask for the action in a turn's text."""
        parse = self.environment.parse
        action: Action = _checked(parse, _check_action, await self.ask(parse, call, text))
        return action

    async def tool(self, call: Call, use: ToolCall) -> str:
        """Run a tool. A ToolError is a result too."""
        try:
            return await self.text(self.environment.tool, call, use)
        except UserCodeError as error:
            if isinstance(error.__cause__, ToolError):
                return f"error: {_text_of(error.__cause__)}"
            raise

    async def ask_score(self, fresh: Callable[[], Episode], seconds: float) -> Score:
        """Ask the judge for a score; it may take at most that many seconds, with all that it is asked again.

        fresh: returns the episode as it was recorded, because a judge may change what it gets.
        """
        judge, made = self.environment.score, len(fresh().calls)
        score: Score = await self._judged(judge, lambda score: _check_score(made, score), fresh, seconds)
        return score

    async def ask_correct(self, fresh: Callable[[], Episode], seconds: float) -> Score:
        """Ask for the correctness of an episode of an evaluation, and return a score in which nothing else counts."""
        if type(self.environment).correct is Environment.correct:
            scored: Score = await self._judged(self.environment.score, _check_correct, fresh, seconds)
            return scored
        correct: float = await self._judged(self.environment.correct, _check_number, fresh, seconds)
        return Score(True, correct)

    async def _judged(
        self,
        judge: Callable[[Episode], Any],
        check: Callable[[Any], None],
        fresh: Callable[[], Episode],
        seconds: float,
    ) -> Any:
        await self._thread_for(judge)  # before the time begins
        try:
            async with TimeLimit(seconds):
                return await self._patiently(judge, check, fresh)
        except TimeoutError as error:
            raise UserCodeError(f"score: no result within reward.timeout = {seconds} s") from error

    async def _patiently(
        self, judge: Callable[[Episode], Any], check: Callable[[Any], None], fresh: Callable[[], Episode]
    ) -> Any:
        """Ask a judge, and again after growing pauses if it fails, as often as `tries` and the spare tries allow."""
        for number in range(self.tries):
            try:
                result = _checked(judge, check, await self.ask(judge, fresh(), patience=0.0))
                self.spare = min(SPARE, self.spare + 1 / EARNS)
                return result
            except UserCodeError:
                if number + 1 == self.tries or self.spare < 1:
                    raise
                self.spare -= 1
                await asyncio.sleep(PAUSE * 2**number)
        raise AssertionError

    async def _thread_for(self, function: Callable[..., Any]) -> None:
        try:
            await self.threads.room()
        except NoThreadError as error:
            raise UserCodeError(f"{name_of(function)}: {error}") from None


async def _awaiting(result: Any) -> Any:
    return await result


def from_outside(error: BaseException) -> bool:
    """Return whether an exception in the user's code is meant for us: it is cancelled, or Ctrl-C was pressed twice."""
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0
    pressed = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return isinstance(error, StopNow) or (isinstance(error, KeyboardInterrupt) and pressed)


def _failure(function: Callable[..., Any], error: BaseException) -> UserCodeError:
    failure = UserCodeError(f"{name_of(function)}: {type(error).__name__}: {_text_of(error)}")
    failure.__cause__ = error
    return failure


def _text_of(error: BaseException) -> str:
    """Return the text of an error, also of one that fails to give any."""
    try:
        return str(error)
    except Exception as another:  # the user's code may raise anything
        return f"(its text cannot be shown: {type(another).__name__})"


def _checked(function: Callable[..., Any], check: Callable[[Any], None], value: Any) -> Any:
    """Return a value that passes its check. An object of the user's may raise anything when it is looked at."""
    try:
        check(value)
    except UserCodeError:
        raise
    except Exception as error:  # as above
        raise _failure(function, error) from error
    return value


def _check_text(function: Callable[..., Any], text: Any) -> None:
    if not isinstance(text, str):
        raise UserCodeError(f"{name_of(function)}: {type(text).__name__} returned: expected str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserCodeError(
            f"{name_of(function)}: text with {text[error.start]!r} at {error.start} returned: expected text that UTF-8 "
            "can express"
        ) from None


def _check_action(action: Any) -> None:
    uses = isinstance(action, tuple) and action and all(isinstance(use, ToolCall | Delegate) for use in action)
    answered = isinstance(action, Answer) and isinstance(action.text, str)
    if not (answered or isinstance(action, Malformed) or uses):
        raise UserCodeError(
            f"parse: {action!r} returned: expected Answer, Malformed, or a tuple of ToolCall and Delegate"
        )


def _check_score(made: int, score: Any) -> None:
    """Check the score of an episode with this number of calls."""
    _check_correct(score)
    if not isinstance(score.calls, tuple) or not all(isinstance(call, CallScore) for call in score.calls):
        raise UserCodeError(f"score: calls is {score.calls!r}: expected a tuple of CallScore")
    if len(score.calls) != made:
        raise UserCodeError(f"score: calls has {len(score.calls)} scores: expected one for each of {made} calls")
    formats = {"format": score.format} | {f"calls[{i}].format": call.format for i, call in enumerate(score.calls)}
    for name, valid in formats.items():
        if not isinstance(valid, bool | np.bool_):
            raise UserCodeError(f"score: {name} is {valid!r}: expected True or False")
    for i, call in enumerate(score.calls):
        _check_number(call.expert, f"score: calls[{i}].expert")


def _check_correct(score: Any) -> None:
    if not isinstance(score, Score):
        raise UserCodeError(f"score: {type(score).__name__} returned: expected a Score")
    _check_number(score.correct, "score: correct")


def _check_number(number: Any, name: str = "correct: it") -> None:
    """Check that a number is one that a reward can be made of."""
    try:
        finite = isinstance(number, int | float | np.number) and math.isfinite(float(number))
    except (TypeError, ValueError, OverflowError):  # a time, a complex number, or an integer beyond all floats
        finite = False
    if not finite:
        raise UserCodeError(f"{name} is {number!r:.80}: expected a finite number")
