"""Make the records of rollouts for the store: ids, counts, scores, versions and file positions, no text or tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mgrpo.engine.rollout.episodes import Rollout
from mgrpo.engine.run.trajectories import Position, TrajectoryWriter
from mgrpo.engine.store import CallRecord, RolloutRecord
from mgrpo.engine.types import MAIN, Trajectory

STATUSES = ("scored", "unscored", "failed")
PLAYED = ("played", "failed")  # of episodes that nobody is asked to score


def write_rollouts(
    writers: Mapping[str, TrajectoryWriter], rollouts: Sequence[Rollout]
) -> tuple[list[RolloutRecord], list[CallRecord]]:
    """Write the rollouts' trajectories durably; return the records that may then be stored.

    Raises OSError if they cannot be written, for example because the disk is full.
    """
    calls: list[CallRecord] = []
    for name, writer in writers.items():
        made = [(r, i) for r in rollouts for i, agent in enumerate(agents_of(r)) if agent == name]
        positions = writer.append([trajectory for r, i in made if (trajectory := r.trajectories[i]) is not None])
        writer.sync()
        made = [(r, i) for r, i in made if r.trajectories[i] is not None]
        calls += [call_record(r, i, position) for (r, i), position in zip(made, positions, strict=True)]
    return [rollout_record(rollout) for rollout in rollouts], calls


def agents_of(rollout: Rollout) -> list[str]:
    """Return the agent of each of a rollout's trajectories."""
    return [MAIN, *(call.agent for call in rollout.episode.calls)]


def demonstrated(agent: str, rollouts: Sequence[Rollout]) -> list[Trajectory]:
    """Return the agent's trajectories in scripted episodes, without those in which it had no turn."""
    return [
        trajectory
        for rollout in rollouts
        for name, trajectory in zip(agents_of(rollout), rollout.trajectories, strict=True)
        if name == agent and trajectory is not None and trajectory.sampled.any() and rollout.status != "failed"
    ]


def rollout_counts(rollouts: Sequence[Rollout], statuses: Sequence[str] = STATUSES) -> dict[str, float]:
    """Return how many rollouts ended with each status, as metrics."""
    return {f"rollouts/{status}": sum(rollout.status == status for rollout in rollouts) for status in statuses}


def rollout_record(rollout: Rollout) -> RolloutRecord:
    """Return the record of a rollout, without its calls."""
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
    """Return the record of one call: ids, counts, scores, versions, the position of its tokens and their digests.

    index: of its trajectory in the rollout. The record's `rows` is the index of the last sampled token; from it and the
    digests every rank can plan the same batches without reading the tokens.
    """
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
        step=trajectory.step,
        version_last=trajectory.version_last,
        rows=trajectory.rows,
        digest=trajectory.digest,
        sampler_digest=trajectory.sampler_digest,
    )
