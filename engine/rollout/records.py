"""What crosses the store of a rollout: ids, counts, scores, versions and file positions, never text or tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mgrpo.engine.rollout.episodes import Rollout
from mgrpo.engine.run.trajectories import Position, TrajectoryWriter
from mgrpo.engine.store.groups import CallRecord, RolloutRecord
from mgrpo.engine.types import MAIN, Trajectory


def write_rollouts(
    writers: Mapping[str, TrajectoryWriter], rollouts: Sequence[Rollout]
) -> tuple[list[RolloutRecord], list[CallRecord]]:
    """Writes the rollouts' trajectories, durably; returns what may then be recorded of them.

    Raises OSError when they cannot be written, as when the disk is full.
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
    """The agent of each of a rollout's trajectories."""
    return [MAIN, *(call.agent for call in rollout.episode.calls)]


def demonstrated(agent: str, rollouts: Sequence[Rollout]) -> list[Trajectory]:
    """The agent's trajectories in scripted episodes."""
    return [
        trajectory
        for rollout in rollouts
        for name, trajectory in zip(agents_of(rollout), rollout.trajectories, strict=True)
        if name == agent and trajectory is not None and rollout.status != "failed"
    ]


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
    """What crosses the store of one call: ids, counts, scores, versions, the place of its tokens and their digests.

    rows: index of the last sampled token. With it and the digests alone can every rank plan the same batches.
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
