"""Define what a logger is: what it is told about a run, and what it does with the run's numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from mgrpo.engine.config.schema import Config

Status = str  # how a run ended: "finished", "stopped" (it may go on) or "failed"
STATUSES = ("finished", "stopped", "failed")


class LoggedRun(msgspec.Struct, frozen=True, kw_only=True):
    """Describe a run to its loggers.

    id: the same each time that the run goes on; project, name, tags: as [log] has them; folder: the run's directory;
    config: every key of the config that holds no secret and no address, by its full name; rows: how many rows of
    numbers this logger was sent before, 0 for a new run.
    """

    id: str
    project: str
    name: str
    tags: list[str]
    folder: Path
    config: dict[str, Any]
    rows: int = 0


class LoggedRollout(msgspec.Struct, frozen=True, kw_only=True):
    """Hold one episode to read. status: as in the store; reward: the main agent's; text: all its calls."""

    query: int
    rollout: int
    status: str
    reward: float
    text: str


class Logger:
    """Send a run's numbers to a tool: the base of all loggers, also of a user's own, which is made without arguments.

    It runs in a process of its own, so that it may be slow, raise or block: the run goes on. What raises is called
    again with the same arguments, after a while.

    replays: whether `begin` forgets what was logged of the run before. All rows are sent again then, so that a run that
    went back to a checkpoint is shown as it is now. Others are sent each step once, as it was first.
    """

    replays: ClassVar[bool] = False

    def check(self) -> None:
        """Say what is missing before a run begins, as a ValueError: a key, an address. Ask no network."""

    def begin(self, run: LoggedRun) -> str | None:
        """Begin to log the run, or go on with it; return where it can be seen, in words, if that is known."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of one row of metrics: a step, or an evaluation of the weights before it.

        values: by key, as docs/metrics.md lists them, with "warmup/" before those of the warm-up, whose steps are
        counted from 0 too.
        """
        raise NotImplementedError

    def rollouts(self, step: int, rollouts: Sequence[LoggedRollout]) -> None:
        """Log some episodes of an rl step; called only if log.rollouts > 0."""

    def finish(self, status: Status) -> None:
        """Send what is left, because the run has ended. status: one of STATUSES."""


def public_config(config: Config) -> dict[str, Any]:
    """Return the keys of a config by their full names, without those that may hold secrets or addresses.

    Of the environment's options only the names are kept, of the store and the servers nothing.
    """
    raw = msgspec.to_builtins(config)
    raw["environment"]["options"] = sorted(raw["environment"]["options"])
    del raw["store"], raw["log"]
    for agent in raw["agents"].values():
        for key in ("urls", "arguments"):
            (agent.get("vllm") or {}).pop(key, None)
    return dict(_flat("", raw))


def _flat(key: str, value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [(key, value)]
    return [pair for name, inner in value.items() for pair in _flat(f"{key}.{name}" if key else name, inner)]
