"""A judge that does not return within reward.timeout leaves its thread behind, and nothing limits their number.

When there can be no more (ulimit -u, a container's limit), Thread.start raises a RuntimeError, which ends the worker.
"""

import threading
import time

from mgrpo.engine.rollout.episodes import Job
from mgrpo.engine.types import Answer, Task
from reproduction import fault, held
from reproduction.episodes import Base, check_healthy_episodes, make_episodes


class Overloaded(Base):
    """Its judge asks an overloaded service, without a timeout."""

    def parse(self, call, text):
        return Answer(text)

    def score(self, episode):
        time.sleep(3600)


check_healthy_episodes()
episodes = make_episodes(Overloaded(), reward={"timeout": 0.05})
for step in range(3):
    episodes.run([Job(step, k, Task("t", {})) for k in range(100)])
left = sum("score" in thread.name for thread in threading.enumerate())
if left > 100:
    fault(f"{left} threads of judges are left after 300 rollouts")
held(f"{left} threads of judges are left after 300 rollouts")
