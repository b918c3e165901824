"""Define the types that every part of the engine uses: tasks, actions, calls, episodes, scores, trajectories.

A *call* is one run of one agent: the main agent's whole episode, or one invocation of a sub-agent. An *episode* is the
main agent's call together with the sub-agents' calls that it made. K episodes of the same task form a query's group.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

MAIN = "main"  # the name of the main agent; every other agent of a config is a sub-agent


@dataclass(frozen=True)
class Task:
    """Hold one question of an environment. `data` is what the environment needs to ask it and to score it."""

    id: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """End the call: with the final answer of the main agent, or the report of a sub-agent."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """Use a tool of the environment."""

    name: str
    argument: str


@dataclass(frozen=True)
class Delegate:
    """Send a request from the main agent to a sub-agent."""

    agent: str
    request: str


@dataclass(frozen=True)
class Malformed:
    """End the call because the text is not an action."""

    reason: str


Action = Answer | Malformed | tuple[ToolCall | Delegate, ...]  # the actions of a tuple run concurrently


@dataclass
class Turn:
    """Hold the agent's text, the action it stands for, and the observation in return ("" after the last turn)."""

    text: str
    action: Action
    observation: str = ""
    truncated: bool = False  # cut at max_new_tokens or at the context's end, before a stop string


@dataclass
class Call:
    """Record one run of one agent: its request, its turns and how it ended."""

    agent: str
    task: Task
    request: str = ""  # what the main agent asked; "" for the main agent itself
    turns: list[Turn] = field(default_factory=list)
    answer: str | None = None
    ended: str = ""  # "answer", "malformed", "turns" (max_turns reached) or "context" (no room left)

    @property
    def truncated(self) -> bool:
        """Whether the call or one of its turns reached a limit."""
        return self.ended in ("turns", "context") or any(turn.truncated for turn in self.turns)


@dataclass
class Episode:
    """Record the main agent's call and the sub-agents' calls that it made, in the order it made them."""

    main: Call
    calls: list[Call] = field(default_factory=list)

    @property
    def task(self) -> Task:
        """The task of the main agent's call."""
        return self.main.task


@dataclass(frozen=True)
class CallScore:
    """Score one call of a sub-agent. expert: a judge's score of that call, usually in [0, 1]."""

    format: bool
    expert: float


@dataclass(frozen=True)
class Score:
    """Score one episode. `calls` is in the order of `Episode.calls`."""

    format: bool
    correct: float
    calls: tuple[CallScore, ...] = ()


@dataclass(frozen=True, order=True)
class WeightsVersion:
    """Name an agent's weights by the number of optimizer steps and of rl steps that led to them.

    Versions are ordered as training makes them. Their text form is "OPTIMIZER_STEPS/RL_STEPS", such as "12/3".
    """

    optimizer_steps: int
    rl_steps: int

    def __str__(self) -> str:
        return f"{self.optimizer_steps}/{self.rl_steps}"

    @classmethod
    def parse(cls, text: str) -> WeightsVersion:
        """Return the version that `text` names. Raises ValueError if it names none."""
        if not re.fullmatch("[0-9]+/[0-9]+", text):
            raise ValueError(f"weights version {text!r} given: expected OPTIMIZER_STEPS/RL_STEPS, such as 12/3")
        optimizer_steps, rl_steps = text.split("/")
        return cls(int(optimizer_steps), int(rl_steps))


INITIAL_WEIGHTS = WeightsVersion(0, 0)  # the version before any training
NO_WEIGHTS = WeightsVersion(-1, -1)  # the version of weights that no trainer has sent


@dataclass
class Trajectory:
    """Hold the tokens of one call as they were sampled; they reach the loss without becoming text in between.

    tokens (L,) int32. sampled (L,) bool: true exactly where the agent itself chose the token. logprobs (L,) float32, in
    nats: the sampler's own where sampled, else 0. version and version_last: the oldest and the newest weights that
    sampled it, in optimizer steps; they are equal unless weights changed between its turns. step: the rl step that led
    to the oldest.
    """

    tokens: np.ndarray
    sampled: np.ndarray
    logprobs: np.ndarray
    version: int
    version_last: int = -1  # -1: the same as `version`
    step: int = 0

    def __post_init__(self) -> None:
        if self.version_last < 0:
            self.version_last = self.version
        assert len(self.tokens) == len(self.sampled) == len(self.logprobs)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def rows(self) -> int:
        """The index of the last sampled token, 0 if there is none: the number of tokens that training computes."""
        drawn = np.flatnonzero(self.sampled)
        return int(drawn[-1]) if len(drawn) else 0

    @cached_property
    def digest(self) -> str:
        """32 hex digits, equal for trajectories with the same tokens and flags."""
        return _digest(self.tokens, self.sampled)

    @cached_property
    def sampler_digest(self) -> str:
        """Like `digest`, but equal only if the sampler's log-probs are the same too."""
        return _digest(self.tokens, self.sampled, self.logprobs)


def _digest(*arrays_L: np.ndarray) -> str:
    return hashlib.blake2b(b"".join(array.tobytes() for array in arrays_L), digest_size=16).hexdigest()
