"""Compute when episodes that share a worker end, exactly, if a token of each of n takes step_seconds + n * row_seconds.

This is the processor sharing of queueing theory. All episodes get their tokens at the same pace, so that one virtual
time serves them all: the number of tokens of an episode that decodes from the start. An episode that begins at virtual
time v with k tokens to go ends at v + k, even if other episodes begin or end.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class ProcessorSharing(Generic[Item]):
    """Decode the episodes of one worker. Call `settle` with the time before each method that changes anything."""

    def __init__(self, step_seconds: float, row_seconds: float) -> None:
        self.step_seconds, self.row_seconds = step_seconds, row_seconds
        self.stopped = False
        self.virtual = 0.0
        self.busy = self.tokens = 0.0  # seconds in which any episode decoded; tokens of all episodes
        self._settled, self._serial = 0.0, 0
        self._heap: list[tuple[float, int, Item]] = []  # by virtual time of the end

    def __len__(self) -> int:
        return len(self._heap)

    def settle(self, now: float) -> None:
        """Count what was decoded until `now`, in seconds."""
        seconds, self._settled = now - self._settled, now
        if self._heap and not self.stopped:
            tokens = seconds / self.token_seconds(len(self._heap))
            self.virtual += tokens
            self.tokens += tokens * len(self._heap)
            self.busy += seconds

    def token_seconds(self, count: int) -> float:
        """Return the seconds that one token of each of `count` episodes takes."""
        return self.step_seconds + count * self.row_seconds

    def add(self, tokens: float, item: Item) -> None:
        """Begin an episode with this number of tokens."""
        self._serial += 1
        heapq.heappush(self._heap, (self.virtual + tokens, self._serial, item))

    def remove(self, which: Callable[[Item], bool]) -> None:
        """Remove the episodes for which `which` is true."""
        self._heap = [entry for entry in self._heap if not which(entry[2])]
        heapq.heapify(self._heap)

    def left(self) -> float | None:
        """Return the seconds until the next end, if no episode is added or removed; None if none decodes."""
        if not self._heap or self.stopped:
            return None
        return max(0.0, (self._heap[0][0] - self.virtual) * self.token_seconds(len(self._heap)))

    def pop_next(self) -> list[Item]:
        """Remove and return the episodes that end next; call it when they do."""
        self.virtual = self._heap[0][0]
        ended = []
        while self._heap and self._heap[0][0] <= self.virtual:
            ended.append(heapq.heappop(self._heap)[2])
        return ended
