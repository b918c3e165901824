"""Topology `colocated`: one process runs the rollouts and trains every agent, step by step.

A run is warm-up (supervised, on scripted episodes), then rl. A checkpoint named <stage>-<step> stands for everything
before that step. On resume the metrics and the store are taken back to the latest checkpoint: groups it has trained on
are acked, all others are sampled again, because the weights that sampled them are gone.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mgrpo.engine.config.resume import check_unchanged
from mgrpo.engine.config.schema import Config, dump_config, read_dump
from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.report.display import Display
from mgrpo.engine.report.summary import draw
from mgrpo.engine.rollout.curriculum import accuracy, eval_due, eval_jobs, load_tasks, pick, warmup_jobs
from mgrpo.engine.rollout.episodes import Demonstrations, Episodes, Job, Rollout, load_environment
from mgrpo.engine.rollout.records import demonstrated, rollout_counts, write_rollouts
from mgrpo.engine.run.directory import RunDirectory
from mgrpo.engine.run.trajectories import TrajectoryWriter
from mgrpo.engine.store.groups import Store
from mgrpo.engine.store.open import files_of
from mgrpo.engine.system.process import Interrupted, ctrl_c, keep_memory, log_file, make_deterministic
from mgrpo.engine.training.trainer import AgentTrainer, Row


def train(config: Config, resume: bool, display: Display) -> None:
    """Run or go on with a training run. Raises ValueError for bad input, Interrupted after Ctrl-C."""
    run = RunDirectory(config.run_dir, resume)
    try:
        checkpoint = run.latest_checkpoint()
        if checkpoint is not None:  # before the first, everything begins anew, with whatever config
            check_unchanged(read_dump(run.config.read_text()), config)
        with log_file(run.log), ctrl_c() as interrupted:
            system = Colocated(config, run, display, interrupted)
            run.write_config(dump_config(config))  # all that it names was there
            system.run(checkpoint)
    finally:
        run.close()


class Colocated:
    """All agents of a run in this process."""

    def __init__(self, config: Config, run: RunDirectory, display: Display, interrupted: Callable[[], bool]):
        self.config, self.rundir, self.display, self.interrupted = config, run, display, interrupted
        keep_memory()
        make_deterministic(config.seed, config.deterministic)
        self.environment = load_environment(config.environment)
        self.tasks = {split: load_tasks(self.environment, split) for split in ("train", "held_out")}
        self.policies = {name: Policy(name, agent, config.compute) for name, agent in config.agents.items()}
        self.samplers = {name: policy.sampler() for name, policy in self.policies.items()}
        self.episodes = Episodes(config, self.environment, dict(self.samplers))
        self.demonstrations = Demonstrations(config, self.environment, dict(self.samplers))
        self.store = Store(run.store_url, run=config.topology)
        root = files_of(config, "trajectories")
        self.writers = {name: TrajectoryWriter(root, name) for name in config.agents}
        self.trainers = [AgentTrainer(config, policy, root) for policy in self.policies.values()]
        self.unacked: dict[str, list[int]] = {name: [] for name in config.agents}

    def run(self, checkpoint: Path | None) -> None:
        """Both stages, from a checkpoint or from the start."""
        stage, step = self._restore(checkpoint)
        if stage == "warmup":
            self._warmup(step)
            for policy in self.policies.values():
                policy.reset_optimizer()
                if self.config.algorithm.kl_coef:
                    policy.keep_reference()
            self._update_samplers(0)
            step = 0
            self._save("rl", 0)
        self._rl(step)
        self.store.close()

    def _warmup(self, first: int) -> None:
        """Supervised steps on scripted episodes."""
        steps = self.config.warmup.steps
        self.display.stage("warmup", first, steps)
        for step in range(first, steps):
            started = time.monotonic()
            rollouts = self.demonstrations.run(warmup_jobs(self.tasks["train"], self.config, step))
            row = rollout_counts(rollouts)
            for trainer in self.trainers:
                if shown := demonstrated(trainer.name, rollouts):
                    row |= prefix(trainer.name, trainer.learn(shown))
            self._log("warmup", step, row, started)
            self._after_step("warmup", step + 1, steps)

    def _rl(self, first: int) -> None:
        """The main loop: evaluate when due, sample the step's queries, train each agent on them, save when due."""
        steps = self.config.steps
        self.display.stage("rl", first, steps)
        for step in range(first, steps + 1):
            if eval_due(self.config, step):
                self._evaluate(step)
            if step == steps:
                break
            started = time.monotonic()
            row = self._sample(step)
            row["time/rollout"] = time.monotonic() - started
            for trainer in self.trainers:
                groups = self.store.claim(trainer.name, self.config.queries_per_step, holder=trainer.name).groups
                self.unacked[trainer.name] += [group.query for group in groups]
                row |= prefix(trainer.name, trainer.train(step, groups))
            self._update_samplers(step + 1)
            self._log("rl", step, row, started)
            self._after_step("rl", step + 1, steps)

    def _sample(self, step: int) -> Row:
        """K rollouts of each of the step's queries, into the trajectory files and the store."""
        config = self.config
        queries = {
            query: pick(self.tasks["train"], config.seed, query)
            for query in range(step * config.queries_per_step, (step + 1) * config.queries_per_step)
        }
        agents = list(config.agents)
        self.store.open_queries([(q, t.id) for q, t in queries.items()], agents, config.algorithm.rollouts, step)
        jobs = [Job(q, k, task) for q, task in queries.items() for k in range(config.algorithm.rollouts)]
        rollouts = self.episodes.run(jobs)
        self._record(rollouts)
        for sampler in self.samplers.values():
            sampler.release_cache()
        row = rollout_counts(rollouts)
        if not row["rollouts/scored"]:
            reason = next(rollout.error for rollout in rollouts if rollout.error)
            raise ValueError(f"step {step}: none of {len(rollouts)} rollouts was scored; the first error: {reason}")
        return row

    def _record(self, rollouts: Sequence[Rollout]) -> None:
        """Trajectories first, durably; then, in one transaction, what refers to them."""
        self.store.record(*write_rollouts(self.writers, rollouts))

    def _evaluate(self, step: int) -> None:
        """Greedy episodes on held-out tasks. An episode that failed or was not scored counts as wrong."""
        started = time.monotonic()
        rollouts = self.episodes.run(eval_jobs(self.tasks["held_out"], self.config))
        for sampler in self.samplers.values():
            sampler.release_cache()
        row = {"stage": "rl", "step": step, **accuracy(rollouts), "time/eval": time.monotonic() - started}
        self.rundir.log_metrics(row)
        self.display.row(row)
        draw(self.rundir.path)

    def _update_samplers(self, step: int) -> None:
        """The in-process samplers read the trainers' own weights: only their names are news."""
        for name, policy in self.policies.items():
            self.samplers[name].version, self.samplers[name].weights_step = policy.version, step

    def _log(self, stage: str, step: int, row: Row, started: float) -> None:
        row["time/step"] = time.monotonic() - started
        row["perf/peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self.rundir.log_metrics({"stage": stage, "step": step, **row})
        self.display.row({"stage": stage, "step": step, **row})

    def _after_step(self, stage: str, done: int, steps: int) -> None:
        stopping = self.interrupted()
        if stopping or done == steps or done % self.config.checkpoint.every == 0:
            self._save(stage, done)
        if stopping:
            raise Interrupted(f"stopped after {stage} step {done} of {steps}; --resume goes on from here")

    def _save(self, stage: str, step: int) -> None:
        """Everything before (stage, step), atomically; then the store may know."""

        def write(folder: Path) -> None:
            agents = {name: policy.save_state(folder / name) for name, policy in self.policies.items()}
            (folder / "state.json").write_text(json.dumps({"stage": stage, "step": step, "agents": agents}))

        self.rundir.save_checkpoint(f"{stage}-{step:05d}", write, self.config.checkpoint.keep)
        for name, queries in self.unacked.items():
            self.store.ack(name, queries)
            self.unacked[name] = []

    def _restore(self, checkpoint: Path | None) -> tuple[str, int]:
        stage, step = "warmup", 0
        if checkpoint is not None:
            stage, step = restore(self.policies, self.rundir.open_checkpoint(checkpoint))
            self._update_samplers(step if stage == "rl" else 0)
        lost = self.store.reclaim(step if stage == "rl" else 0)
        self.rundir.rewind_metrics(step, stage)
        if checkpoint is not None:
            again = f"; {lost} queries sampled since then are sampled again" if lost else ""
            self.display.say(f"resumed from {checkpoint.name}{again}")
        return stage, step


def restore(policies: dict[str, Policy], checkpoint: Path) -> tuple[str, int]:
    """Load a verified checkpoint into the policies; returns its stage and step."""
    state = json.loads((checkpoint / "state.json").read_text())
    if sorted(state["agents"]) != sorted(policies):
        raise ValueError(f"{checkpoint}: agents {sorted(state['agents'])} found, expected {sorted(policies)}")
    for name, policy in policies.items():
        policy.load_state(checkpoint / name)
    return state["stage"], state["step"]


def prefix(agent: str, row: Row) -> Row:
    return {f"{agent}/{key}": value for key, value in row.items()}
