"""What crosses the store of a rollout: ids, counts, scores, versions and file positions, never text or tokens."""

from __future__ import annotations

from collections.abc import Sequence

from mgrpo.engine.rollout import Rollout
from mgrpo.engine.store import CallRecord, RolloutRecord
from mgrpo.engine.trajectories import Position
from mgrpo.engine.types import MAIN


def agents_of(rollout: Rollout) -> list[str]:
    """The agent of each of a rollout's trajectories."""
    return [MAIN, *(call.agent for call in rollout.episode.calls)]


def rollout_counts(rollouts: Sequence[Rollout]) -> dict[str, float]:
    return {f"rollouts/{s}": sum(r.status == s for r in rollouts) for s in ("scored", "unscored", "failed")}


def rollout_record(rollout: Rollout) -> RolloutRecord:
    score, job = rollout.score, rollout.job
    return RolloutRecord(
        job.query,
        job.rollout,
        rollout.status,
        bool(score and score.format),
        float(score.correct) if score else 0.0,
        rollout.seconds,
        rollout.error,
    )


def call_record(rollout: Rollout, index: int, position: Position) -> CallRecord:
    """What crosses the store of one call: ids, counts, scores, version and the place of its tokens."""
    episode, trajectory, score = rollout.episode, rollout.trajectories[index], rollout.score
    call = episode.main if index == 0 else episode.calls[index - 1]
    sub_score = score.calls[index - 1] if score and index else None
    assert trajectory is not None
    return CallRecord(
        agent=call.agent,
        query=rollout.job.query,
        rollout=rollout.job.rollout,
        call=sum(agent == call.agent for agent in agents_of(rollout)[:index]),
        format=bool(sub_score.format if sub_score else score and score.format),
        expert=float(sub_score.expert) if sub_score else None if index == 0 else 0.0,
        version=trajectory.version,
        tokens=len(trajectory),
        actions=int(trajectory.sampled.sum()),
        turns=len(call.turns),
        truncated=call.truncated,
        ended=call.ended,
        position=position,
    )
