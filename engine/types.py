"""The words every part of the engine speaks: tasks, actions, calls, episodes, scores, trajectories.

A *call* is one run of one agent: the main agent's whole episode, or one invocation of a sub-agent. An *episode* is the
main agent's call together with the sub-agents' calls it made. K episodes of the same task form a query's group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

MAIN = "main"  # the name of the main agent; every other agent of a config is a sub-agent


@dataclass(frozen=True)
class Task:
    """One question of an environment. `data` is whatever the environment needs to ask and to score it."""

    id: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """The agent is done: for the main agent the final answer, for a sub-agent its report."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """The agent uses a tool of the environment."""

    name: str
    argument: str


@dataclass(frozen=True)
class Delegate:
    """The main agent hands a request to a sub-agent."""

    agent: str
    request: str


@dataclass(frozen=True)
class Malformed:
    """The text is no action. The call ends here."""

    reason: str


Action = Answer | Malformed | tuple[ToolCall | Delegate, ...]  # a tuple runs side by side


@dataclass
class Turn:
    """What the agent wrote, what it meant, and what it was shown in return ("" after the last turn)."""

    text: str
    action: Action
    observation: str = ""
    truncated: bool = False  # cut at max_new_tokens or at the context's end, before a stop string


@dataclass
class Call:
    """One run of one agent: its request, its turns and how it ended."""

    agent: str
    task: Task
    request: str = ""  # what the main agent asked; "" for the main agent itself
    turns: list[Turn] = field(default_factory=list)
    answer: str | None = None
    ended: str = ""  # "answer", "malformed", "turns" (max_turns reached) or "context" (no room left)

    @property
    def truncated(self) -> bool:
        return self.ended in ("turns", "context") or any(turn.truncated for turn in self.turns)


@dataclass
class Episode:
    """The main agent's call and the sub-agents' calls it made, in the order it made them."""

    main: Call
    calls: list[Call] = field(default_factory=list)

    @property
    def task(self) -> Task:
        return self.main.task


@dataclass(frozen=True)
class CallScore:
    """Of one sub-agent call. expert: a judge's score of that call, in [0, 1] by custom."""

    format: bool
    expert: float


@dataclass(frozen=True)
class Score:
    """Of one episode. `calls` is aligned with `Episode.calls`."""

    format: bool
    correct: float
    calls: tuple[CallScore, ...] = ()


@dataclass
class Trajectory:
    """The tokens of one call, as sampled: ids from the sampler to the loss, never turned to text and back.

    tokens (L,) int32; sampled (L,) bool, true exactly where the agent itself chose the token;
    logprobs (L,) float32, the sampler's own where sampled, else 0. Of the weights that sampled it: the oldest and the
    newest version, in optimizer steps (one and the same unless weights changed between its turns), and the rl step that
    had led to the oldest.
    """

    tokens: np.ndarray
    sampled: np.ndarray
    logprobs: np.ndarray
    version: int
    version_last: int = -1  # as `version`
    step: int = 0

    def __post_init__(self) -> None:
        if self.version_last < 0:
            self.version_last = self.version
        assert len(self.tokens) == len(self.sampled) == len(self.logprobs)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def rows(self) -> int:
        """Index of the last sampled token, 0 where none is: as many tokens have to be computed to train on it."""
        drawn = np.flatnonzero(self.sampled)
        return int(drawn[-1]) if len(drawn) else 0

    @cached_property
    def digest(self) -> str:
        """32 hex digits, the same for trajectories of the same tokens and flags."""
        return _digest(self.tokens, self.sampled)

    @cached_property
    def sampler_digest(self) -> str:
        """As `digest`, of the sampler's log-probs too."""
        return _digest(self.tokens, self.sampled, self.logprobs)


def _digest(*arrays_L: np.ndarray) -> str:
    return hashlib.blake2b(b"".join(array.tobytes() for array in arrays_L), digest_size=16).hexdigest()
