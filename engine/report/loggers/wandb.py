"""Log a run to Weights & Biases, online or offline as WANDB_MODE says.

The number of the row is W&B's own step, which may only grow; curves are drawn over "step", that of the run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from mgrpo.engine.report.loggers.base import LoggedRollout, LoggedRun, Logger, Status

COLUMNS: list[str | int] = ["step", "query", "rollout", "status", "reward", "text"]
UNWATCHED = ("offline", "disabled", "dryrun")  # modes that need no key


class WandB(Logger):
    """Log to one W&B run, which goes on under the same id."""

    def check(self) -> None:
        """Refuse a machine that is not logged in."""
        import wandb

        if wandb.setup().settings.mode in UNWATCHED:
            return
        try:
            known = wandb.login()
        except wandb.errors.Error as error:  # there is no terminal to ask for a key
            raise ValueError(f"not logged in ({error}): {_LOGIN}") from error
        if not known:
            raise ValueError(f"not logged in: {_LOGIN}")

    def begin(self, run: LoggedRun) -> str | None:
        """Begin the run, or go on with that of the same id. Its files lie in wandb/ of the run's directory."""
        import wandb

        settings = wandb.Settings(
            console="off",  # it would capture this process' output, not the run's
            x_disable_stats=True,
            disable_git=True,
            disable_code=True,
            disable_job_creation=True,
            silent=True,
        )
        self.row, self.wandb = run.rows, wandb
        self.run: Any = wandb.init(
            project=run.project,
            id=run.id,
            name=run.name,
            tags=run.tags,
            config=run.config,
            dir=os.environ.get("WANDB_DIR", str(run.folder)),
            resume="allow",
            settings=settings,
        )
        for stage in ("", "warmup/"):
            self.run.define_metric(f"{stage}step", hidden=True)
        self.run.define_metric("*", step_metric="step", step_sync=False)  # each row has its own; none is filled in
        self.run.define_metric("warmup/*", step_metric="warmup/step", step_sync=False)
        return f"offline; wandb sync {run.folder}/wandb/*{run.id}" if self.run.offline else self.run.url

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Log the row as the next one."""
        stage = "warmup/" if any(key.startswith("warmup/") for key in values) else ""
        self.run.log({**values, f"{stage}step": step}, step=self.row)
        self.row += 1

    def rollouts(self, step: int, rollouts: Sequence[LoggedRollout]) -> None:
        """Log the episodes as a table of the step, beside its numbers, which come next."""
        rows = [[step, *(getattr(rollout, str(column)) for column in COLUMNS[1:])] for rollout in rollouts]
        self.run.log({"rollouts": self.wandb.Table(columns=COLUMNS, data=rows), "step": step}, step=self.row)

    def finish(self, status: Status) -> None:
        """Send what is left, and mark a run that has failed."""
        self.run.finish(exit_code=1 if status == "failed" else 0)


_LOGIN = "run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline to log to files"
