"""Stand between episodes and the user's environment: note what runs and since when, and what it raises."""

from __future__ import annotations

import functools
import inspect
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import Any

from mgrpo.engine.cli.check import offline
from mgrpo.engine.environment.base import Environment, ToolError
from mgrpo.engine.types import Call, ToolCall

METHODS = ("prompt", "parse", "tool", "observation", "score", "script", "correct")
SKIPPED = "skipped: called before"  # the result of a tool that is not called a second time


class EnvironmentWatch:
    """Wrap the methods of an environment in place, and hold what is noted of them.

    connected: judges may reach the network. sparing: call each tool of each agent only once. running: the name of each
    method that runs, with its start. tools: those called so far, with their agents. missing: tools that the environment
    said it does not have. raised: where, by the text of an exception.
    """

    def __init__(self, environment: Environment, connected: bool) -> None:
        self.environment, self.connected, self.sparing = environment, connected, False
        self.running: dict[int, tuple[str, float]] = {}
        self.tools: set[tuple[str, str]] = set()
        self.missing: set[str] = set()
        self.raised: dict[str, str] = {}
        self.called: set[str] = set()
        self._lock, self._next = threading.Lock(), 0
        for name in METHODS:
            vars(environment)[name] = self._wrapped(name, getattr(environment, name))

    def overdue(self, seconds: float) -> str | None:
        """Return the name of a method that has run for longer than that."""
        now = time.monotonic()
        return next((name for name, began in list(self.running.values()) if now - began > seconds), None)

    def _wrapped(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        if inspect.iscoroutinefunction(method):

            @functools.wraps(method)
            async def call_async(*args: Any) -> Any:
                if name == "tool" and self._skips(*args):
                    return SKIPPED
                with self._noting(name, args):
                    return await method(*args)

            return call_async

        @functools.wraps(method)
        def call(*args: Any) -> Any:
            if name == "tool" and self._skips(*args):
                return SKIPPED
            with self._noting(name, args):
                result = method(*args)
            return self._awaited(name, args, result) if inspect.isawaitable(result) else result

        return call

    async def _awaited(self, name: str, args: tuple[Any, ...], result: Any) -> Any:
        with self._noting(name, args):
            return await result

    def _skips(self, call: Call, use: ToolCall) -> bool:
        key = call.agent, str(use.name)
        known = key in self.tools
        self.tools.add(key)
        return known and self.sparing

    @contextmanager
    def _noting(self, name: str, args: tuple[Any, ...]) -> Any:
        self.called.add(name)
        with self._lock:
            self._next += 1
            key = self._next
        self.running[key] = name, time.monotonic()
        guarded = name in ("score", "correct") and not self.connected
        try:
            with offline.offline() if guarded else nullcontext():
                yield
        except ToolError as error:
            if _raised_by_default(error):
                self.missing.add(str(args[1].name))
            raise
        except BaseException as error:  # of the user's code: noted, and left to the episode
            self.raised.setdefault(f"{type(error).__name__}: {error}", _place(error))
            raise
        finally:
            del self.running[key]


def _raised_by_default(error: BaseException) -> bool:
    """Return whether it was `Environment.tool` itself that raised, which knows no tool."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_code is Environment.tool.__code__


def _place(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.filename}, line {last.lineno}"
