"""Episodes that share a worker, exactly: a token of each of n of them takes step_seconds + n * row_seconds.

All that decode get their tokens at the same pace, so one virtual time serves them all: the tokens of an episode that
decodes from the start. One that begins at virtual time v with k tokens to go ends at v + k, whoever comes or goes.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Sharing(Generic[Item]):
    """The decoding of one worker. Every method that changes it wants `settle` before, at the same time."""

    def __init__(self, step_seconds: float, row_seconds: float) -> None:
        self.step_seconds, self.row_seconds = step_seconds, row_seconds
        self.stopped = False
        self.virtual = 0.0
        self.busy = self.tokens = 0.0  # seconds in which any decoded; tokens of all
        self._settled, self._serial = 0.0, 0
        self._heap: list[tuple[float, int, Item]] = []  # by virtual end

    def __len__(self) -> int:
        return len(self._heap)

    def settle(self, now: float) -> None:
        """Counts what was decoded until now."""
        seconds, self._settled = now - self._settled, now
        if self._heap and not self.stopped:
            tokens = seconds / self.token_seconds(len(self._heap))
            self.virtual += tokens
            self.tokens += tokens * len(self._heap)
            self.busy += seconds

    def token_seconds(self, count: int) -> float:
        """Of a token of each of `count` episodes."""
        return self.step_seconds + count * self.row_seconds

    def add(self, tokens: float, item: Item) -> None:
        self._serial += 1
        heapq.heappush(self._heap, (self.virtual + tokens, self._serial, item))

    def remove(self, which: Callable[[Item], bool]) -> None:
        self._heap = [entry for entry in self._heap if not which(entry[2])]
        heapq.heapify(self._heap)

    def left(self) -> float | None:
        """Seconds until the next end if nobody comes or goes; None if there is none."""
        if not self._heap or self.stopped:
            return None
        return max(0.0, (self._heap[0][0] - self.virtual) * self.token_seconds(len(self._heap)))

    def pop_next(self) -> list[Item]:
        """Those that end next, now that they do."""
        self.virtual = self._heap[0][0]
        ended = []
        while self._heap and self._heap[0][0] <= self.virtual:
            ended.append(heapq.heappop(self._heap)[2])
        return ended
