"""An episode whose sampling.timeout passes while its turn is being sampled ends the whole worker.

If the time passes within the loop's own round (a tool or a tokenisation that blocks for a moment), the sampler sets
the result of a future that is already cancelled: asyncio.InvalidStateError ends all other episodes too.
"""

import os
import time

from mgrpo.engine.types import ToolCall
from reproduction import fault, held
from reproduction.episodes import Base, check_healthy_episodes, play

ATTEMPTS = int(os.environ.get("ATTEMPTS", "25"))


class Slow(Base):
    """Turns of a few tokens; every second tool blocks for a moment."""

    count = 0

    def parse(self, call, text):
        return (ToolCall("t", ""),)

    def tool(self, call, use):
        Slow.count += 1
        if Slow.count % 2 == 0:
            time.sleep(0.02)
        return ""

    def observation(self, call, results):
        return "x"


check_healthy_episodes()
bad, last = 0, ""
for attempt in range(ATTEMPTS):
    try:
        play(Slow(), number=16, timeout=0.5 + 0.01 * attempt, tokens=3, turns=60)
    except Exception as error:
        bad += 1
        last = f"{type(error).__name__}: {error}"
if bad:
    fault(f"{bad} of {ATTEMPTS} times episodes that timed out ended all others: {last}")
held(f"{ATTEMPTS} times, a timeout was one episode's failure")
