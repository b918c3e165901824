"""A turn while servers sample it: what is kept of what they say, and when it is whole.

What they say is not trusted: what can be no token or no log-prob, or is more than was asked for, is an
`InvalidTurnError`, and what came before it stays. The same `Ending` decides as in the in-process sampler, over the
whole turn: a stop string that one server began and another ended is noticed here only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

from mgrpo.engine.inference.sampler import Ending
from mgrpo.engine.inference.vllm.api import Chunk, StreamError, read_label

MALFORMED = (ValueError, LookupError, TypeError, AttributeError, StreamError)  # what reading nonsense raises
ROUNDING = 1e-3  # by which a log-prob may be above 0

Label = tuple[int, int]  # of weights: version, rl step
R = TypeVar("R")


class InvalidTurnError(Exception):
    """What a server did that it must not."""


class StreamedTurn:
    """Tokens after `prompt`, at most `allowed`. vocabulary: how many ids there are."""

    def __init__(self, prompt: list[int], allowed: int, ending: Ending, vocabulary: int) -> None:
        self.prompt, self.allowed, self.ending, self.vocabulary = prompt, allowed, ending, vocabulary
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.labels: set[Label] = set()  # of the weights that had, or may have had, a part in it
        self.stopped = False
        self._before: set[Label] = set()  # of the servers before this one
        self._said: set[Label] = set()  # by this one

    @property
    def left(self) -> int:
        """Tokens that may still come."""
        return 0 if self.stopped else self.allowed - len(self.tokens)

    def begin(self, label: str) -> None:
        """A server goes on with it, with those weights."""
        self._before, self._said = set(self.labels), {_read(label)}

    def take(self, chunk: Chunk) -> None:
        """What it said. Raises InvalidTurnError, and keeps nothing of it, if it is not to be believed."""
        self._check(chunk)
        if chunk.label is not None:
            self._said.add(_read(chunk.label))
        self.tokens += chunk.tokens
        self.logprobs += map(float, chunk.logprobs)
        if chunk.tokens:
            self.labels |= self._said
        if chunk.spans is not None:  # of all its tokens, exactly
            self.labels = self._before | {_read(label) for label, begin, end in chunk.spans if begin < end}

    def _check(self, chunk: Chunk) -> None:
        if len(chunk.tokens) > self.left:
            raise InvalidTurnError(f"{len(chunk.tokens)} tokens more: expected at most {self.left}")
        for token in chunk.tokens:
            if type(token) is not int or not 0 <= token < self.vocabulary:
                raise InvalidTurnError(f"token {token!r}: expected an id below {self.vocabulary}")
        for logprob in chunk.logprobs:
            if not isinstance(logprob, int | float) or not math.isfinite(logprob) or logprob > ROUNDING:
                raise InvalidTurnError(f"log-prob {logprob!r}: expected a number of at most 0")

    def settle(self) -> None:
        """The server says no more: what came after the turn's end is dropped."""
        length = self.ending.length(self.tokens)
        if length is not None:
            del self.tokens[length:], self.logprobs[length:]
            self.stopped = True

    def end(self, finish: str | None) -> None:
        """The server's own word for why it ended; None: it broke off.

        Raises InvalidTurnError unless the turn is whole; ValueError when the server's context is too short for it.
        """
        if self.left == 0:
            return
        if finish == "length":
            raise ValueError(
                f"a turn ended after {len(self.prompt) + len(self.tokens)} tokens of context: expected room for "
                f"{len(self.prompt) + self.allowed}, a larger --max-model-len"
            )
        if finish != "stop" or not self.tokens:
            raise InvalidTurnError(f"a stream ended with {finish!r} after {len(self.tokens)} of {self.allowed} tokens")
        self.stopped = True  # by a stop string that its decoding shows and ours does not


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")


def parsed(parse: Callable[[bytes], R], said: bytes) -> R:
    """Raises InvalidTurnError for what the adapter cannot read."""
    try:
        return parse(said)
    except MALFORMED as error:
        raise InvalidTurnError(f"{said[:100]!r}: {reason(error)}") from error


def _read(label: str) -> Label:
    try:
        known = read_label(label)
    except ValueError as error:
        raise InvalidTurnError(str(error)) from error
    if known is None:
        raise InvalidTurnError("its weights are none that a trainer has sent")
    return known
