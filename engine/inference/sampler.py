"""Sampling: the protocol that every sampler meets, and the calls whose tokens it makes longer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from mgrpo.engine.types import Trajectory


@dataclass
class Session:
    """One call's tokens as they grow, and its own random numbers (independent of who else is sampled beside it)."""

    seed: tuple[int, ...]
    greedy: bool = False
    version: int = 0  # the oldest of the weights that sampled it, in optimizer steps
    version_last: int = 0  # the newest
    weights_step: int = 0  # the rl step that had led to the oldest
    tokens: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = np.random.Generator(np.random.Philox(np.random.SeedSequence(self.seed)))

    def begin_turn(self, version: int, weights_step: int) -> None:
        """The weights that sample the next turn."""
        if any(self.sampled):
            self.version, self.version_last = min(self.version, version), max(self.version_last, version)
            self.weights_step = min(self.weights_step, weights_step)
        else:
            self.version, self.version_last, self.weights_step = version, version, weights_step

    def append(self, tokens: list[int], logprobs: list[float] | None = None) -> None:
        """Add what the agent was shown, or, with log-probs, what it sampled."""
        self.tokens += tokens
        self.sampled += [logprobs is not None] * len(tokens)
        self.logprobs += [0.0] * len(tokens) if logprobs is None else logprobs

    def trajectory(self) -> Trajectory:
        return Trajectory(
            np.array(self.tokens, np.int32),
            np.array(self.sampled, bool),
            np.array(self.logprobs, np.float32),
            self.version,
            self.version_last,
            self.weights_step,
        )


@dataclass(frozen=True)
class Completion:
    """What a turn added to a session. truncated: cut by max_new_tokens or max_context before a stop string."""

    text: str
    tokens: int
    truncated: bool


class Ending:
    """When a turn is over, whoever samples it: at the end-of-sequence token, or with the first stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]):
        self.tokenizer, self.stop = tokenizer, stop
        self.most = max((len(one.encode()) for one in stop), default=0)  # tokens that a stop string can be spread over

    def reached(self, turn: list[int]) -> bool:
        """Whether its last token ended it."""
        return turn[-1] == self.tokenizer.eos_token_id or self._in(turn[-self.most :] if self.most else [])

    def length(self, turn: list[int]) -> int | None:
        """How many of its tokens there are up to the first that ended it; None if it goes on."""
        before = turn[:-1]
        if self.tokenizer.eos_token_id not in before and not self._in(before):
            return len(turn) if turn and self.reached(turn) else None  # as a rule: two decodings, not one a token
        return next((n for n in range(1, len(turn) + 1) if self.reached(turn[:n])), None)

    def text(self, turn: list[int]) -> str:
        """What it says, its stop string included."""
        return str(self.tokenizer.decode(turn[:-1] if turn[-1] == self.tokenizer.eos_token_id else turn))

    def _in(self, tokens: list[int]) -> bool:
        text = str(self.tokenizer.decode(tokens)) if tokens else ""
        return any(one in text for one in self.stop)


@dataclass(frozen=True)
class WeightsCheck:
    """By which published weights are known: `judge` takes who says so and log p of each of `tokens` but the first.

    judge raises GapError when they are not the trainer's. due: whether to ask those too who had the weights before.
    """

    tokens: list[int]
    judge: Callable[[str, Sequence[float]], None]
    due: bool


class Sampler(Protocol):
    """Turns sessions into longer sessions. `step` advances what is pending, for samplers that live in this process.

    version, weights_step: of the weights it samples with, in optimizer steps and in rl steps.
    """

    tokenizer: PreTrainedTokenizerBase

    @property
    def version(self) -> int: ...

    @property
    def weights_step(self) -> int: ...

    @property
    def pending(self) -> int: ...

    async def act(self, session: Session) -> Completion: ...

    def step(self) -> None: ...

    def close(self, session: Session) -> None: ...

    def logprobs(self, tokens: Sequence[int]) -> list[float]: ...
