"""Define the protocol that every sampler meets, and the sessions that samplers extend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from mgrpo.engine.model.pieces import end_tokens, for_pieces
from mgrpo.engine.types import INITIAL_WEIGHTS, Trajectory, WeightsVersion


@dataclass
class Session:
    """Hold one call's tokens as they grow, and a random generator that no other session shares.

    oldest, newest: versions of the weights that sampled it. logprobs: the sampler's, 0 for tokens it did not sample.
    temperature: None, that of the agent.
    """

    seed: tuple[int, ...]
    greedy: bool = False
    oldest: WeightsVersion = INITIAL_WEIGHTS
    newest: WeightsVersion = INITIAL_WEIGHTS
    tokens: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    temperature: float | None = None

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
    """Decide when a turn ends, for every sampler: at an end-of-sequence token or at the first stop string.

    ends: the ids of all end-of-sequence tokens; None: only the tokenizer's. Text is decoded to the letter, as the next
    piece of a longer text: no space is added, taken away or tidied up.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], ends: frozenset[int] | None = None):
        self.tokenizer, self.stop = for_pieces(tokenizer), stop
        self.ends = end_tokens(tokenizer, None) if ends is None else ends
        # A token that shows at all holds at least one byte, so no stop string is spread over more of them than this.
        # Some decoders write a space in front of a token unless it is the first, hence one more.
        self.longest_stop = max((len(one.encode()) + 1 for one in stop), default=0)
        self._shown: dict[int, bool] = {}  # whether an id decodes to any text

    def reached(self, turn: list[int]) -> bool:
        """Return whether the last token of the turn ended it."""
        return turn[-1] in self.ends or self._has_stop(self._last(turn))

    def length(self, turn: list[int]) -> int | None:
        """Return the number of tokens up to the first one that ended the turn, or None if it goes on."""
        before = turn[:-1]
        if self.ends.isdisjoint(before) and not self._has_stop(before):
            # The common case takes two decodings instead of one for each token.
            return len(turn) if turn and self.reached(turn) else None
        return next((n for n in range(1, len(turn) + 1) if self.reached(turn[:n])), None)

    def text(self, turn: list[int]) -> str:
        """Decode the turn, with its stop string and without its end-of-sequence token."""
        return self._decode(turn[:-1] if turn[-1] in self.ends else turn)

    def _last(self, turn: list[int]) -> list[int]:
        """Return the turn from where a stop string that its last token completes can begin at the earliest."""
        begin, left = len(turn), self.longest_stop
        while begin and left:
            begin -= 1
            left -= self._shows(turn[begin])
        return turn[begin:]

    def _shows(self, token: int) -> bool:
        """Return whether an id decodes to any text; those beyond the tokenizer's vocabulary, for example, do not."""
        if token not in self._shown:
            self._shown[token] = bool(self._decode([token]))
        return self._shown[token]

    def _has_stop(self, tokens: list[int]) -> bool:
        text = self._decode(tokens) if tokens and self.stop else ""
        return any(one in text for one in self.stop)

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


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
