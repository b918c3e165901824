"""Define the protocol that every sampler meets, and the sessions that samplers extend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from mgrpo.engine.types import INITIAL_WEIGHTS, Trajectory, WeightsVersion


@dataclass
class Session:
    """Hold one call's tokens as they grow, and a random generator that no other session shares.

    oldest, newest: versions of the weights that sampled it. logprobs: the sampler's, 0 for tokens it did not sample.
    """

    seed: tuple[int, ...]
    greedy: bool = False
    oldest: WeightsVersion = INITIAL_WEIGHTS
    newest: WeightsVersion = INITIAL_WEIGHTS
    tokens: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = np.random.Generator(np.random.Philox(np.random.SeedSequence(self.seed)))

    def begin_turn(self, version: WeightsVersion) -> None:
        """Record the weights that sample the next turn."""
        if any(self.sampled):
            self.oldest, self.newest = min(self.oldest, version), max(self.newest, version)
        else:
            self.oldest = self.newest = version

    def append(self, tokens: list[int], logprobs: list[float] | None = None) -> None:
        """Append tokens: those the agent sampled if log-probs are given, otherwise those it was shown."""
        self.tokens += tokens
        self.sampled += [logprobs is not None] * len(tokens)
        self.logprobs += [0.0] * len(tokens) if logprobs is None else logprobs

    def trajectory(self) -> Trajectory:
        """Return the tokens so far as arrays."""
        return Trajectory(
            np.array(self.tokens, np.int32),
            np.array(self.sampled, bool),
            np.array(self.logprobs, np.float32),
            self.oldest.optimizer_steps,
            self.newest.optimizer_steps,
            self.oldest.rl_steps,
        )


@dataclass(frozen=True)
class Completion:
    """Describe what a turn added to a session.

    tokens: their number. truncated: max_new_tokens or max_context ended the turn before a stop string did.
    """

    text: str
    tokens: int
    truncated: bool


class Ending:
    """Decide when a turn ends, for every sampler: at the end-of-sequence token or at the first stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]):
        self.tokenizer, self.stop = tokenizer, stop
        # A token holds at least one byte, so no stop string is spread over more tokens than this.
        self.longest_stop = max((len(one.encode()) for one in stop), default=0)

    def reached(self, turn: list[int]) -> bool:
        """Return whether the last token of the turn ended it."""
        if turn[-1] == self.tokenizer.eos_token_id:
            return True
        return self._has_stop(turn[-self.longest_stop :] if self.longest_stop else [])

    def length(self, turn: list[int]) -> int | None:
        """Return the number of tokens up to the first one that ended the turn, or None if it goes on."""
        before = turn[:-1]
        if self.tokenizer.eos_token_id not in before and not self._has_stop(before):
            # The common case takes two decodings instead of one for each token.
            return len(turn) if turn and self.reached(turn) else None
        return next((n for n in range(1, len(turn) + 1) if self.reached(turn[:n])), None)

    def text(self, turn: list[int]) -> str:
        """Decode the turn, with its stop string and without its end-of-sequence token."""
        return str(self.tokenizer.decode(turn[:-1] if turn[-1] == self.tokenizer.eos_token_id else turn))

    def _has_stop(self, tokens: list[int]) -> bool:
        text = str(self.tokenizer.decode(tokens)) if tokens else ""
        return any(one in text for one in self.stop)


@dataclass(frozen=True)
class WeightsCheck:
    """Check by log-probs that a sampler has the published weights.

    tokens: a probe sequence. judge: takes the sampler's name and its log p of each probe token but the first; raises
    GapError if they differ from the trainer's. due: verify again even those servers that were verified before.
    """

    tokens: list[int]
    judge: Callable[[str, Sequence[float]], None]
    due: bool


class Sampler(Protocol):
    """Extend sessions turn by turn. A sampler that lives in this process advances its pending calls in `step`.

    version: of the weights it samples with. pending: the number of calls that `step` would advance.
    """

    tokenizer: PreTrainedTokenizerBase

    @property
    def version(self) -> WeightsVersion: ...

    @property
    def pending(self) -> int: ...

    async def act(self, session: Session) -> Completion: ...

    def step(self) -> None: ...

    def close(self, session: Session) -> None: ...

    def logprobs(self, tokens: Sequence[int]) -> list[float]: ...
