"""Make rows of rollouts and calls for tests of the store."""

from __future__ import annotations

from mgrpo.engine.run.trajectories import Position
from mgrpo.engine.store import CallRecord, RolloutRecord

AGENTS = ("main", "search")


def call(query: int, rollout: int, number: int = 0, agent: str = "main", version: int = 3) -> CallRecord:
    """Make the record of one call."""
    expert = None if agent == "main" else 0.25 * number
    position = Position(f"{agent}-00000.arrow", 8 * rollout, number)
    return CallRecord(agent, query, rollout, number, True, expert, version, 90, 30, 2, False, "answer", position)


def episode(query: int, rollout: int, subs: int = 2, version: int = 3) -> tuple[list[RolloutRecord], list[CallRecord]]:
    """Make the records of a scored rollout: one call of main and `subs` of search."""
    ended = RolloutRecord(query, rollout, "scored", True, 0.5, 1.25)
    return [ended], [call(query, rollout, version=version), *(call(query, rollout, n, "search") for n in range(subs))]
