"""Run the user's plain functions in threads, so that one that blocks holds up nobody else.

Usually such a function returns at once. The event loop waits for it a moment, and goes on as if it had called the
function itself: coroutines take turns in the same order, so that a seeded run samples the same batches. A function that
takes longer runs beside the loop. Threads are used again, the last one first, so that quick functions nearly always run
in the same thread.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from queue import Empty, SimpleQueue
from typing import Any

from mgrpo.engine.environment.loop_watch import LoopWatch

MOST = 96  # threads of one pool
STUCK = 16  # calls that were given up and still run, at which a process does not go on
QUICK = 0.05  # seconds that the event loop waits for a function, unless its last call took longer
IDLE = 10.0  # seconds after which a thread without work ends


class StuckError(ValueError):
    """Report that so many calls of the user's code have never returned that this process must not go on."""


class NoThreadError(Exception):
    """Report that a call did not begin: those that do not return hold all threads, or the system gives no more."""


class PlainCall:
    """Hold one call of a plain function, from another thread's point of view. error: what it raised, of any kind."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.function, self.args, self.context = function, args, copy_context()
        self.value: Any = None
        self.error: BaseException | None = None
        self.done = False
        self.seconds = 0.0
        self._running = threading.Lock()
        self._running.acquire()
        self._awaited: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    def run(self) -> None:
        """Call the function. Whatever it raises is kept, SystemExit and KeyboardInterrupt too."""
        began = time.perf_counter()
        try:
            self.value = self.context.run(self.function, *self.args)
        except BaseException as error:  # the user's code may raise anything, and nobody above this could catch it
            self.error = error
        self.seconds = time.perf_counter() - began

    def finish(self) -> None:
        """Wake who waits for the call."""
        self.done = True
        self._running.release()
        if self._awaited is not None:
            loop, future = self._awaited
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_settle, future)

    def wait(self, seconds: float) -> bool:
        """Block until the call has ended, for at most that many seconds; return whether it has."""
        return self._running.acquire(timeout=min(max(seconds, 0.0), threading.TIMEOUT_MAX))

    async def ended(self) -> None:
        """Wait for the call's end while other coroutines go on."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._awaited = loop, future
        if not self.done:  # else it may have ended before it could know of the future
            await future

    def export_context(self) -> None:
        """Set the context variables that the function has set, as if it had been called here."""
        for variable, value in self.context.items():
            if variable.get(None) is not value:
                variable.set(value)


class UserThreads:
    """Hold the threads in which one environment's functions run, and the calls that do not return.

    The threads are daemons: one that never ends does not hold up the end of the process. Only `stuck` is shared with
    them, beside what the lock guards; all methods are called in the event loop's thread.

    watch: leaves out the time for which the event loop waits here. stuck: calls that were given up and still run.
    """

    def __init__(self, watch: LoopWatch) -> None:
        self.watch = watch
        self.stuck: set[PlainCall] = set()
        self._lock = threading.Lock()
        self._idle: list[SimpleQueue[PlainCall]] = []
        self._living = 0
        self._queue: deque[asyncio.Future[None]] = deque()  # calls that wait for a thread
        self._slow: set[str] = set()  # functions whose last call was not quick

    async def call(
        self, function: Callable[..., Any], args: tuple[Any, ...], patience: float | None = None
    ) -> PlainCall:
        """Call a function and return its call, which has ended.

        patience: seconds to wait for it before other coroutines go on; by default QUICK for a function that was quick
        the last time, and 0 for others. If the coroutine is cancelled meanwhile, the call counts as stuck until it
        ends. Raises NoThreadError if there is no thread for it, now or ever.
        """
        await self.room()
        call, name = PlainCall(function, args), name_of(function)
        try:
            self._start(call)
            with self.watch.paused():
                call.wait((0.0 if name in self._slow else QUICK) if patience is None else patience)
            if not call.done:
                await self._await(call)
        finally:
            self._let_next()
        (self._slow.add if call.seconds > QUICK else self._slow.discard)(name)
        call.export_context()
        return call

    def check(self) -> None:
        """Raise StuckError, naming the functions, if too many calls are stuck."""
        if len(self.stuck) < STUCK:
            return
        names = sorted({name_of(call.function) for call in list(self.stuck)})
        raise StuckError(
            f"environment: {len(self.stuck)} calls of {', '.join(names)} were given up and have not returned: "
            "expected functions that end, such as requests with a timeout"
        )

    async def _await(self, call: PlainCall) -> None:
        self._slow.add(name_of(call.function))
        try:
            await call.ended()
        except asyncio.CancelledError:
            self.stuck.add(call)
            if call.done:  # it may have ended before it could know that it is given up
                self.stuck.discard(call)
            raise

    async def room(self) -> None:
        """Wait until a thread is free or may be started. Raises NoThreadError if there is none and calls are stuck."""
        while not self._idle and self._living >= MOST:
            if len(self.stuck) >= STUCK:
                names = sorted({name_of(call.function) for call in list(self.stuck)})
                raise NoThreadError(f"not called: {len(self.stuck)} calls of {', '.join(names)} have not returned")
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._queue.append(future)
            await future

    def _let_next(self) -> None:
        """Let one of the calls that wait for a thread try again; all of them, if calls are stuck."""
        while self._queue:
            future = self._queue.popleft()
            if not future.done():  # else it was given up
                future.set_result(None)
                if len(self.stuck) < STUCK:
                    return

    def _start(self, call: PlainCall) -> None:
        with self._lock:
            queue = self._idle.pop() if self._idle else None
            self._living += queue is None
        if queue is None:
            queue = SimpleQueue()
            self._add_thread(queue)
        queue.put(call)

    def _add_thread(self, queue: SimpleQueue[PlainCall]) -> None:
        try:
            threading.Thread(target=self._serve, args=(queue,), daemon=True, name="user code").start()
        except RuntimeError as error:  # the system allows this process no more threads
            with self._lock:
                self._living -= 1
            raise NoThreadError(f"not called: {error}") from error

    def _serve(self, queue: SimpleQueue[PlainCall]) -> None:
        """Run calls in this thread, until none has come for a while. While it waits, it holds no call's episode."""
        while self._serve_next(queue):
            pass

    def _serve_next(self, queue: SimpleQueue[PlainCall]) -> bool:
        call = self._next(queue)
        if call is None:
            return False
        thread = threading.current_thread()
        thread.name = name_of(call.function)  # debuggers show it
        call.run()
        thread.name = "user code"
        with self._lock:  # idle before it is known to have ended, so that the next call finds this thread
            self._idle.append(queue)
        call.finish()
        self.stuck.discard(call)
        return True

    def _next(self, queue: SimpleQueue[PlainCall]) -> PlainCall | None:
        try:
            return queue.get(timeout=IDLE)
        except Empty:
            with self._lock:
                if queue in self._idle:
                    self._idle.remove(queue)
                    self._living -= 1
                    return None
            return queue.get()  # a call came just now


class DaemonExecutor(ThreadPoolExecutor):
    """Run what async code passes to `asyncio.to_thread` in daemon threads, which cannot hold up the process's end."""

    def __init__(self) -> None:
        super().__init__(1)  # its own threads are never started

    def submit(self, function: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        """Start the function in a thread of its own."""
        future: Future[Any] = Future()
        thread = threading.Thread(target=_run_into, args=(future, function, args, named), daemon=True)
        thread.name = f"to_thread: {name_of(function)}"
        thread.start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave the threads to themselves."""


def name_of(function: Callable[..., Any]) -> str:
    """Return a function's name with that of its class; for other callables, such as partial objects, their type's."""
    return str(getattr(function, "__qualname__", type(function).__name__))


def _run_into(future: Future[Any], function: Callable[..., Any], args: Any, named: Any) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(function(*args, **named))
        except BaseException as error:  # as in an executor's threads
            future.set_exception(error)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():  # else who waited has given up
        future.set_result(None)
