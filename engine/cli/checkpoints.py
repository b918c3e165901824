"""Find the checkpoint that a command means: the latest, that of a step, or the one with the best held-out score."""

from __future__ import annotations

from pathlib import Path

from mgrpo.engine.config.schema import Config
from mgrpo.engine.report.summary import read_config
from mgrpo.engine.run.directory import RunPaths, checkpoints_in
from mgrpo.engine.run.scores import best_of
from mgrpo.engine.store.open import open_copy

BEST = "best"


def find_checkpoint(config: Config, paths: RunPaths, agent: str, step: int | str | None) -> Path:
    """Return an agent's latest checkpoint, that of an rl step, or with "best" that of the best held-out score.

    config, paths: those of the run. Raises ValueError naming the option if there is none.
    """
    kept = paths.checkpoints if config.colocated else paths.agent(agent).checkpoints
    there = checkpoints_in(kept)
    if not there:
        raise ValueError(f"RUN: {kept} given: expected a checkpoint in it, none has been written yet")
    if step is None:
        return there[-1]
    wanted = best_step(config, paths) if step == BEST else _number(step)
    for path in there:
        if path.name == f"rl-{wanted:05}":
            return path
    names = [path.name for path in there]
    which = f"{step}, which is rl step {wanted}," if step == BEST else step
    raise ValueError(f"--step: {which} given: expected one of the checkpoints that are kept: {names}")


def best_step(config: Config, paths: RunPaths) -> int:
    """Return the rl step with the run's best held-out score. Raises ValueError if it was never evaluated."""
    with open_copy(config, paths.path) as store:
        best = best_of(store.roles.evaluations(), config.eval)
    if best is None:
        raise ValueError(f"--step: {BEST} given: expected a run that was evaluated, {paths.path} was not")
    return best[0]


def run_of(folder: Path) -> tuple[Config, RunPaths] | None:
    """Return the config and the files of the run in a directory, or None if it is no run's directory.

    A model's directory has a config.json too, but no checkpoints.
    """
    paths = RunPaths(folder)
    begun = paths.config.is_file() and (paths.checkpoints.is_dir() or paths.agents.is_dir())
    return (read_config(folder), paths) if begun else None


def _number(step: int | str) -> int:
    if not str(step).isdecimal():
        raise ValueError(f"--step: {step!r} given: expected the number of rl steps, or {BEST!r}")
    return int(step)
