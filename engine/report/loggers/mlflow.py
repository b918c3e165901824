"""Log a run to MLflow: to the server or database that MLFLOW_TRACKING_URI names, else to mlflow.db beside the run."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from mgrpo.engine.report.loggers.base import LoggedRollout, LoggedRun, Logger, Status

LONGEST = 500  # characters of a parameter
BATCH = 100  # parameters that a request may hold
ENDED = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
ID = "mgrpo.run"  # the tag by which a run is found again


class MLflow(Logger):
    """Log to one MLflow run of the experiment that log.project names."""

    def begin(self, run: LoggedRun) -> str | None:
        """Begin the run, or go on with the one that has its id in a tag."""
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        beside, given = run.folder.parent, os.environ.get("MLFLOW_TRACKING_URI")
        uri = given or f"sqlite:///{beside}/mlflow.db"
        self.client, self.metric = MlflowClient(uri), Metric
        experiment = self.client.get_experiment_by_name(run.project)
        files = None if given else f"{beside}/mlartifacts"
        known = experiment.experiment_id if experiment else self.client.create_experiment(run.project, files)
        found: Sequence[Any] = self.client.search_runs([known], f"tags.`{ID}` = '{run.id}'", max_results=1)
        self.id = found[0].info.run_id if found else self._create(known, run)
        self.client.update_run(self.id, "RUNNING")
        params = [] if found else [Param(key, str(value)[:LONGEST]) for key, value in run.config.items()]
        for first in range(0, len(params), BATCH):
            self.client.log_batch(self.id, params=params[first : first + BATCH])
        return given or f"mlflow ui --backend-store-uri {uri}"

    def _create(self, experiment: str, run: LoggedRun) -> str:
        tags = {ID: run.id, **{f"tag.{tag}": "true" for tag in run.tags}}
        created: str = self.client.create_run(experiment, tags=tags, run_name=run.name).info.run_id
        return created

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of the step."""
        now = int(time.time() * 1000)
        self.client.log_batch(self.id, metrics=[self.metric(key, value, now, step) for key, value in values.items()])

    def rollouts(self, step: int, rollouts: Sequence[LoggedRollout]) -> None:
        """Keep the episodes as a text file of the step, among the run's artifacts."""
        self.client.log_text(self.id, "\n\n\n".join(r.text for r in rollouts), f"rollouts/step-{step:05d}.txt")

    def finish(self, status: Status) -> None:
        """Say how the run ended."""
        self.client.set_terminated(self.id, ENDED[status])
