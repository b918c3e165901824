"""Collect a turn while servers sample it, validate what they stream, and decide when it is complete.

Servers are not trusted. A token or log-prob that is impossible, or more tokens than were requested, raises
InvalidTurnError; what came before stays valid. The same `Ending` as in the in-process sampler is applied to the whole
turn, so a stop string that one server began and another completed is found here, and only here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from mgrpo.engine.inference.sampler import Ending
from mgrpo.engine.inference.vllm.api import Chunk, StreamError, read_label
from mgrpo.engine.types import NO_WEIGHTS, WeightsVersion

# Raised by parsing invalid data; the recursion, by data that are nested too deep.
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, RecursionError, StreamError)
ROUNDING = 1e-3  # nats by which rounding may lift a log-prob above 0

R = TypeVar("R")


class InvalidTurnError(Exception):
    """Report an answer of a server that is invalid or incomplete."""


class StreamedTurn:
    """Collect at most `allowed` tokens that follow `prompt`.

    vocabulary: the number of token ids. initial: whether weights that no trainer has sent may take part. versions: of
    all weights that had, or may have had, a part in the turn.
    """

    def __init__(self, prompt: list[int], allowed: int, ending: Ending, vocabulary: int, initial: bool = False) -> None:
        self.initial = initial
        self.prompt, self.allowed, self.ending, self.vocabulary = prompt, allowed, ending, vocabulary
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.versions: set[WeightsVersion] = set()
        self.stopped = False
        self._earlier: set[WeightsVersion] = set()  # named by the servers before this one
        self._current: set[WeightsVersion] = set()  # named by this server so far
        self._before = 0  # tokens of the servers before this one

    @property
    def left(self) -> int:
        """The number of tokens that may still come."""
        return 0 if self.stopped else self.allowed - len(self.tokens)

    def begin(self, label: str) -> None:
        """Begin the part of a server whose weights have that label. Raises InvalidTurnError for an invalid label."""
        self._earlier, self._current, self._before = set(self.versions), {self._version(label)}, len(self.tokens)

    def take(self, chunk: Chunk) -> None:
        """Append a chunk. If it is invalid, raise InvalidTurnError and keep nothing of it."""
        self._check(chunk)
        exact = None if chunk.spans is None else self._exact(chunk.spans, len(chunk.tokens))
        if chunk.label is not None:
            self._current.add(self._version(chunk.label))
        self.tokens += chunk.tokens
        self.logprobs += map(float, chunk.logprobs)
        if chunk.tokens:
            self.versions |= self._current
        if exact is not None:
            self.versions = self._earlier | exact

    def _version(self, label: str) -> WeightsVersion:
        try:
            version = read_label(label)
        except ValueError as error:
            raise InvalidTurnError(str(error)) from error
        if version == NO_WEIGHTS and not self.initial:
            raise InvalidTurnError("the server has weights that no trainer has sent")
        return version

    def _exact(self, spans: Sequence[tuple[Any, Any, Any]], new: int) -> set[WeightsVersion]:
        """Return the versions that sampled this server's tokens, by its own count.

        Raises InvalidTurnError if the count leaves tokens out, or names weights newer than any that the stream named.
        """
        if any(type(number) is not int for _, *ends in spans for number in ends):
            raise InvalidTurnError(f"weight versions {spans!r:.100}: expected whole numbers as positions")
        versions = {self._version(str(label)) for label, begin, end in spans if begin < end}
        made, counted = len(self.tokens) - self._before + new, sum(max(end - begin, 0) for _, begin, end in spans)
        if counted < made:
            raise InvalidTurnError(f"weight versions of {counted} tokens: expected those of {made}")
        if versions and max(versions) > max(self._current):
            newest = max(self._current)
            raise InvalidTurnError(f"weights {max(versions)}: expected none newer than {newest}, as labelled")
        return versions

    def _check(self, chunk: Chunk) -> None:
        if len(chunk.tokens) > self.left:
            raise InvalidTurnError(f"{len(chunk.tokens)} more tokens: expected at most {self.left}")
        for token in chunk.tokens:
            if type(token) is not int or not 0 <= token < self.vocabulary:
                raise InvalidTurnError(f"token {token!r}: expected an id below {self.vocabulary}")
        for logprob in chunk.logprobs:
            if not isinstance(logprob, int | float) or not math.isfinite(logprob) or logprob > ROUNDING:
                raise InvalidTurnError(f"log-prob {logprob!r}: expected a number of at most 0")

    def settle(self) -> None:
        """Drop the tokens after the end of the turn, when the server sends no more."""
        length = self.ending.length(self.tokens)
        if length is not None:
            del self.tokens[length:], self.logprobs[length:]
            self.stopped = True

    def end(self, finish: str | None) -> None:
        """Check that the turn is complete. finish: why the server ended the stream; None if it broke off.

        Raises InvalidTurnError if the turn is incomplete, ValueError if the server's context is too short for it.
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
        self.stopped = True  # the server's decoding found a stop string that ours does not show


def reason(error: BaseException) -> str:
    """Return the kind and the text of an error in one line."""
    return f"{type(error).__name__}: {error}".rstrip(": ")


def parsed(parse: Callable[[bytes], R], data: bytes) -> R:
    """Return parse(data). Raises InvalidTurnError if `data` cannot be parsed."""
    try:
        return parse(data)
    except MALFORMED as error:
        raise InvalidTurnError(f"{data[:100]!r}: {reason(error)}") from error
