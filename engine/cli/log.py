"""Log a run by its directory: one of a cluster while it goes on, or what the loggers of another one were not sent."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from mgrpo.engine.config.schema import Config, check_logger_names
from mgrpo.engine.report.loggers.processes import Loggers
from mgrpo.engine.report.metrics import read_rows
from mgrpo.engine.report.summary import read_config
from mgrpo.engine.run.metrics import is_evaluation

LONG = 3600.0  # seconds for loggers that may have a whole run to send
LOOK = 15.0  # seconds between looks whether the run has ended


def log(run: Path, to: Sequence[str], follow: bool) -> None:
    """Send what is new in a run directory to the run's loggers, or to those that are named.

    follow: go on until the run has taken its last step, or until Ctrl-C. Raises ValueError for a directory without a
    run, and as `Loggers` does.
    """
    config = read_config(run)
    check_logger_names(to)
    settings = msgspec.structs.replace(config.log, to=tuple(to) or config.log.to, patience=LONG)
    if not settings.to:
        raise ValueError(f"--to: nothing given, and log.to of {run} is empty: expected a logger, such as --to wandb")
    config = msgspec.structs.replace(config, log=settings)
    with Loggers(config, run.absolute(), lambda text: print(text, flush=True)) as loggers:
        loggers.begin()
        while not (done := _has_ended(run, config)) and follow:
            time.sleep(LOOK)
        loggers.end("finished" if done else "stopped")


def _has_ended(run: Path, config: Config) -> bool:
    """Return whether the run's last step was taken, and the weights after it were evaluated."""
    steps = {(row["step"], is_evaluation(row)) for row in read_rows(run, config) if row["stage"] == "rl"}
    return (config.steps, True) in steps and (not config.steps or (config.steps - 1, False) in steps)
