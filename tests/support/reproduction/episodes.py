"""Play episodes of one environment with toy agents in this process, for reproductions that need no run."""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from mgrpo.engine.environment.base import Environment
from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.rollout.episodes import Episodes, Job, Rollout
from mgrpo.engine.types import Answer, CallScore, Delegate, Score, Task
from reproduction import cannot
from reproduction.runs import new_folder
from toy import make_model, toy_config

logging.getLogger("mgrpo").setLevel(logging.CRITICAL)


class Base(Environment):
    """One task: the main agent's first turn is a request to its clerk; every answer is worth 0.5."""

    def tasks(self, split):
        return [Task("t", {})]

    def prompt(self, call):
        return f"{call.agent}\n"

    def parse(self, call, text):
        return (Delegate("clerk", text),) if call.agent == "main" and not call.turns else Answer(text)

    def score(self, episode):
        return Score(True, 0.5, tuple(CallScore(True, 0.5) for _ in episode.calls))


def make_episodes(
    environment: Environment, timeout: float = 20.0, tokens: int = 6, turns: int = 3, **changes: Any
) -> Episodes:
    """Return the player of an environment's episodes. tokens: at most per turn; turns: at most per call."""
    folder = new_folder()
    make_model(folder / "model")
    config = toy_config(folder, environment={"use": "x.py:E"}, **changes)
    limits = {"max_new_tokens": tokens, "max_turns": turns, "max_context": 200}
    agents = {name: msgspec.structs.replace(agent, **limits) for name, agent in config.agents.items()}
    config = msgspec.structs.replace(config, agents=agents)
    samplers = {name: Policy(name, agent, config.compute).sampler() for name, agent in agents.items()}
    return Episodes(config, environment, samplers, timeout)


def play(environment: Environment, number: int = 2, **limits: Any) -> list[Rollout]:
    """Return `number` rollouts of one query."""
    return make_episodes(environment, **limits).run([Job(0, k, Task("t", {})) for k in range(number)])


def check_healthy_episodes() -> None:
    """Show that episodes of a plain environment are scored here; end the script with status 2 if they are not."""
    rollouts = play(Base())
    if {rollout.status for rollout in rollouts} != {"scored"}:
        cannot(f"healthy episodes ended as {[(rollout.status, rollout.error) for rollout in rollouts]}")
