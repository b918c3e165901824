"""Run an event loop for episodes, whatever the user's code leaves behind in it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable
from typing import Any

from mgrpo.engine.environment.calls import from_outside
from mgrpo.engine.environment.limits import CLEANUP
from mgrpo.engine.environment.loop_watch import LoopWatch
from mgrpo.engine.environment.threads import DaemonExecutor

STOPPED = "Event loop stopped before Future completed."  # by somebody else's loop.stop()

log = logging.getLogger(__name__)


def run_loop(main: Coroutine[Any, Any, None], watch: LoopWatch) -> None:
    """Run a coroutine in an event loop of its own. watch: is to see the user's code that runs after the coroutine.

    Unlike asyncio.run, it is not ended by a task of the user's code that raises SystemExit, and it waits for no task
    and no thread that does not end: tasks have CLEANUP seconds.
    """
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    loop.set_default_executor(DaemonExecutor())
    task = loop.create_task(main)
    try:
        while not task.done():
            _run_until(loop, task)
        task.result()
    finally:
        with watch.watching():
            _end(loop, {task})
            _end(loop, asyncio.all_tasks(loop))
            _end(loop, [loop.create_task(loop.shutdown_asyncgens())], cancel=False)
        asyncio.set_event_loop(None)
        loop.close()


def _run_until(loop: asyncio.AbstractEventLoop, task: asyncio.Task[None]) -> None:
    """Run the loop until the task is done, or until another task has raised what would have ended the loop."""
    try:
        loop.run_until_complete(task)
    except (SystemExit, KeyboardInterrupt, RuntimeError) as error:
        user = not from_outside(error) and (not isinstance(error, RuntimeError) or str(error) == STOPPED)
        if task.done() or not user:
            raise
        log.error("environment: a task of its own raised %s, which ends that task only", type(error).__name__)


def _end(loop: asyncio.AbstractEventLoop, tasks: Iterable[asyncio.Task[Any]], cancel: bool = True) -> None:
    """End tasks, and leave behind those that do not end."""
    left = [task for task in tasks if not task.done()]
    for task in left:
        if cancel:
            task.cancel()
    if left:
        waiting = loop.create_task(asyncio.wait(left, timeout=CLEANUP))
        while not waiting.done():
            _run_until(loop, waiting)  # type: ignore[arg-type]
    for task in left:
        if task.done() and not task.cancelled():
            task.exception()  # was raised while it was ended: nobody else asks for it
