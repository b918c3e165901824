"""Log a run to trackio: on this machine, or to what TRACKIO_SPACE_ID or TRACKIO_SERVER_URL names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from mgrpo.engine.report.loggers.base import LoggedRollout, LoggedRun, Logger, Status

NAMES = ("status", "reward", "query", "rollout")  # what is told of an episode beside its text


class TrackIO(Logger):
    """Log to one trackio run. trackio knows runs by their names, so that the id is a part of the name."""

    def check(self) -> None:
        """Refuse a Space or a server without a key."""
        if os.environ.get("TRACKIO_SPACE_ID"):
            from huggingface_hub import get_token

            if not get_token():
                raise ValueError("TRACKIO_SPACE_ID is set, but there is no token: run `hf auth login`, or set HF_TOKEN")
        url = os.environ.get("TRACKIO_SERVER_URL", "")
        if url and "write_token=" not in url and not os.environ.get("TRACKIO_WRITE_TOKEN"):
            raise ValueError("TRACKIO_SERVER_URL is set, but there is no token: set TRACKIO_WRITE_TOKEN")

    def begin(self, run: LoggedRun) -> str | None:
        """Begin the run, or go on with that of the same name."""
        import trackio

        self.trackio = trackio
        self.run: Any = trackio.init(
            project=run.project,
            name=f"{run.name}-{run.id}",
            config={**run.config, "tags": run.tags},
            resume="allow",
            embed=False,
            auto_log_gpu=False,  # these would be of the logger's process, as if it were the run
            auto_log_cpu=False,
        )
        there = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL", "").partition("?")[0]
        return there or f"trackio show --project {run.project}"

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of the step."""
        self.run.log(dict(values), step=step)

    def rollouts(self, step: int, rollouts: Sequence[LoggedRollout]) -> None:
        """Log each episode as a trace of one message."""
        for number, rollout in enumerate(rollouts):
            told = {name: getattr(rollout, name) for name in NAMES}
            trace = self.trackio.Trace([{"role": "assistant", "content": rollout.text}], metadata=told)
            self.run.log({f"rollouts/{number}": trace}, step=step)

    def finish(self, status: Status) -> None:
        """Send what is left."""
        self.run.finish()
