"""Measure a checkpoint's accuracy on held-out tasks."""

from __future__ import annotations

from pathlib import Path

from mgrpo.engine.config.schema import Config
from mgrpo.engine.environment.loader import load_environment
from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.rollout.curriculum import accuracy, eval_jobs, load_tasks
from mgrpo.engine.rollout.episodes import Episodes
from mgrpo.engine.run.directory import RunDirectory, RunPaths, latest_of
from mgrpo.engine.system.process import keep_memory
from mgrpo.engine.training.colocated import restore
from mgrpo.engine.training.leader import read_checkpoint_info


def evaluate(config: Config, checkpoint: Path) -> str:
    """Return a sentence with the held-out accuracy of a checkpoint.

    checkpoint: a checkpoint of a colocated run, or the run directory of a decoupled run, whose agents' last checkpoints
    are taken. Raises ValueError if there is none, or if it is incomplete or of another model.
    """
    keep_memory()
    if not checkpoint.is_dir():
        raise ValueError(f"--checkpoint: {checkpoint} is not a directory: expected one of a run's checkpoints/")
    environment = load_environment(config.environment)
    policies = {name: Policy(name, agent, config.compute) for name, agent in config.agents.items()}
    loaded = _restore(policies, checkpoint)
    samplers = {name: policy.sampler() for name, policy in policies.items()}
    jobs = eval_jobs(load_tasks(environment, "held_out"), config)
    row = accuracy(Episodes(config, environment, samplers).run(jobs))
    return (
        f"{checkpoint}: {loaded}: held-out accuracy {row['eval/held_out_accuracy']:.1%} "
        f"(95 % interval {row['eval/low']:.1%} to {row['eval/high']:.1%}) on {row['eval/questions']} questions, "
        f"{row['eval/failed']} of them failed or unscored"
    )


def _restore(policies: dict[str, Policy], checkpoint: Path) -> str:
    """Load the policies' weights and return which stage and step they are from."""
    if not RunPaths(checkpoint).agents.is_dir():
        stage, step = restore(policies, RunDirectory.open_checkpoint(checkpoint))
        return f"{stage} step {step}"
    loaded = []
    for name, policy in policies.items():
        folder = latest_of(RunPaths(checkpoint).agent(name).checkpoints)
        if folder is None:
            raise ValueError(f"--checkpoint: {checkpoint} given: expected a checkpoint of agent {name!r} in it")
        saved = read_checkpoint_info(folder)
        policy.load_state(folder / name, verified=True)
        loaded.append(f"{name} {saved.stage} step {saved.step}")
    return ", ".join(loaded)
