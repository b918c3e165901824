"""The learning rate of each step."""

from __future__ import annotations

import math

from mgrpo.engine.config.schema import AgentConfig


def learning_rate(agent: AgentConfig, step: int, steps: int) -> float:
    """The rate of step `step` (from 0) of `steps`: a linear rise, then the schedule down to zero at the end."""
    if step < agent.lr_warmup_steps:
        return agent.lr * (step + 1) / (agent.lr_warmup_steps + 1)
    done = (step - agent.lr_warmup_steps) / max(1, steps - agent.lr_warmup_steps)
    return (
        agent.lr
        * {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[agent.lr_schedule]
    )
