"""Some mistakes of user code end the whole run, where each should be one episode's failure.

In topology local they end the worker and, after `restarts` of them, the run: a tool result with a lone surrogate, a
CancelledError out of an async library, a score that float() cannot take, an exception whose __str__ raises.
"""

import asyncio
import json
import sys

import numpy as np

from mgrpo.engine.types import CallScore, Score
from reproduction import fault, held
from reproduction.episodes import Base, check_healthy_episodes, play


async def cancelled(self, call, results):
    inner = asyncio.create_task(asyncio.sleep(10))
    inner.cancel()
    await inner  # as when a client library cancels its own request


def score(correct):
    return lambda self, episode: Score(True, correct, tuple(CallScore(True, 0.5) for _ in episode.calls))


def boom(self, call, results):
    raise type("Odd", (Exception,), {"__str__": lambda self: 1 / 0})()


CASES = {
    "a tool's text with a lone surrogate": {"observation": lambda self, call, results: json.loads('"\\ud83d"') + "\n"},
    "an async tool that awaits a cancelled task": {"observation": cancelled},
    "Score(correct=10**400)": {"score": score(10**400)},
    "Score(correct=numpy.timedelta64)": {"score": score(np.timedelta64(1, "s"))},
    "an exception whose __str__ raises": {"observation": boom},
    "SystemExit": {"observation": lambda self, call, results: sys.exit(0)},
}
check_healthy_episodes()
bad = []
for name, methods in CASES.items():
    try:
        statuses = {rollout.status for rollout in play(type("E", (Base,), methods)())}
        print(f"  {name}: {statuses}")
    except BaseException as error:
        text = "division by zero" if isinstance(error, ZeroDivisionError) else error
        bad.append(f"{name}: {type(error).__name__}: {text} ended all episodes")
if bad:
    fault("\n  ".join(["", *bad]))
held("each was one episode's failure")
