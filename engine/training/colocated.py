"""Run topology `colocated`: one process samples the rollouts and trains every agent, step by step.

A run begins with the warm-up stage (supervised, on scripted episodes); the rl stage follows. A checkpoint named
<stage>-<step> contains everything before that step. On resume, the metrics and the store are taken back to the latest
checkpoint: groups that it was trained on are acked, all others are sampled again, because the weights that sampled
them are gone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from mgrpo.engine.config.hub_names import shown
from mgrpo.engine.config.resume import check_steps, check_unchanged
from mgrpo.engine.config.schema import Config, dump_config, read_dump
from mgrpo.engine.environment.loader import load_environment, volatile_options
from mgrpo.engine.hub.settle import settle
from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.report.display import Display
from mgrpo.engine.report.loggers.processes import Loggers
from mgrpo.engine.report.summary import draw
from mgrpo.engine.rollout.curriculum import (
    digest_of,
    in_order,
    load_tasks,
    pick,
    warmup_jobs,
)
from mgrpo.engine.rollout.demonstrations import Demonstrations, check_played, check_script
from mgrpo.engine.rollout.episodes import Episodes, Job, Rollout
from mgrpo.engine.rollout.evaluation import Evaluation
from mgrpo.engine.rollout.records import PLAYED, demonstrated, rollout_counts, write_rollouts
from mgrpo.engine.rollout.watched import play
from mgrpo.engine.run.directory import RunDirectory, root_of, stage_and_step
from mgrpo.engine.run.metrics import Row
from mgrpo.engine.run.scores import best_of, ceased, eval_due, had, keeps_best, why_ended
from mgrpo.engine.run.trajectories import TrajectoryWriter
from mgrpo.engine.store import Group
from mgrpo.engine.store.open import identify, open_store
from mgrpo.engine.system.memory import peak_resident
from mgrpo.engine.system.process import Interrupted, ctrl_c, keep_memory, log_file, make_deterministic, pause
from mgrpo.engine.system.words import counted
from mgrpo.engine.training.loading import loading
from mgrpo.engine.training.trainer import AgentTrainer, DamagedGroupsError
from mgrpo.engine.training.unscored import Unscored
from mgrpo.engine.types import WeightsVersion


def train(config: Config, resume: bool, display: Display) -> None:
    """Start or resume a training run. Raises ValueError for bad input, Interrupted after Ctrl-C."""
    run = RunDirectory(config.run_dir, resume)
    try:
        checkpoint = run.latest_checkpoint()
        config = settle(config, display, run.config if checkpoint else None)
        if checkpoint is not None:  # without one the run starts afresh, and any config will do
            check_steps(config, *stage_and_step(checkpoint))
            volatile = partial(volatile_options, config.environment)
            for change in check_unchanged(read_dump(run.config.read_text()), config, volatile):
                display.say(f"resume: {change}")
        loggers = Loggers(config, run.path, display.say, anew=checkpoint is None)
        with loggers, log_file(run.log), ctrl_c() as interrupted:
            system = Colocated(config, run, display, interrupted, anew=checkpoint is None)
            run.write_config(dump_config(config))  # only now: everything that it names was found
            loggers.begin()
            system.run(checkpoint)
    finally:
        run.close()


class Colocated:
    """Hold all agents of a run in this process: their policies, samplers and trainers, and the store.

    anew: nothing of an earlier attempt counts.
    """

    def __init__(
        self, config: Config, run: RunDirectory, display: Display, interrupted: Callable[[], bool], anew: bool
    ):
        self.config, self.rundir, self.display, self.interrupted = config, run, display, interrupted
        keep_memory()
        make_deterministic(config.seed, config.deterministic)
        display.doing("loading the environment and its tasks")
        self.environment = load_environment(config.environment)
        check_script(config, self.environment)
        self.tasks = load_tasks(self.environment, "train")
        self.evaluation = Evaluation.of(config, self.environment)
        self.policies = {name: self._policy(name) for name in config.agents}
        self.samplers = {name: policy.sampler() for name, policy in self.policies.items()}
        self.episodes = Episodes(config, self.environment, self.samplers)
        tokenizers = {name: sampler.tokenizer for name, sampler in self.samplers.items()}
        self.demonstrations = Demonstrations(config, self.environment, tokenizers, judged=False)
        self.store = open_store(config, known=not anew)
        identify(self.store, config, known=not anew)
        self._settle_tasks(anew)
        root = root_of(config, "trajectories")
        self.writers = {name: TrajectoryWriter(root, name) for name in config.agents}
        self.trainers = [AgentTrainer(config, policy, root) for policy in self.policies.values()]
        self.unacked: dict[str, list[int]] = {name: [] for name in config.agents}

    def _policy(self, name: str) -> Policy:
        agent = self.config.agents[name]
        with loading(self.display, f"loading {name}: {shown(agent.model, agent.revision)}"):
            return Policy(name, agent, self.config.compute)

    def _settle_tasks(self, anew: bool) -> None:
        """Take the tasks to train on in the order of the run. Raises ValueError if it was begun with others."""
        if anew:
            self.rundir.tasks.unlink(missing_ok=True)
        self.store.identities.settle_tasks(digest_of(self.tasks), anew=anew)
        self.tasks = in_order(self.tasks, self.rundir.path)

    def run(self, checkpoint: Path | None) -> None:
        """Run both stages, from a checkpoint or from the start."""
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
        for writer in self.writers.values():
            writer.close()
        self.store.close()

    def _warmup(self, first: int) -> None:
        """Run the supervised steps on scripted episodes."""
        steps = self.config.warmup.steps
        self.display.stage("warmup", first, steps)
        self.display.doing("the first warm-up step")
        for step in range(first, steps):
            started = time.monotonic()
            rollouts = play(self.demonstrations, warmup_jobs(self.tasks, self.config, step))
            check_played(step, rollouts)
            row = rollout_counts(rollouts, PLAYED)
            for trainer in self.trainers:
                if shown := demonstrated(trainer.name, rollouts):
                    row |= prefix(trainer.name, trainer.learn(shown))
            self._log("warmup", step, row, started)
            self._after_step("warmup", step + 1, steps)

    def _rl(self, first: int) -> None:
        """Run the main loop: evaluate when due, sample the step's queries, train each agent on them, save when due."""
        steps, self.unscored = self.config.steps, Unscored(first > 0)
        self.display.stage("rl", first, steps)
        for step in range(first, steps + 1):
            if eval_due(self.config, step):
                self._evaluate(step)
            if step == steps or self._ends(step):
                break
            started = time.monotonic()
            row = self._sample(step)
            row["time/rollout"] = time.monotonic() - started
            for trainer in self.trainers:
                groups = self.store.groups.claim(trainer.name, self.config.queries_per_step, holder=trainer.name).groups
                row |= prefix(trainer.name, self._train(trainer, step, groups))
            self._update_samplers(step + 1)
            self._log("rl", step, row, started)
            self._after_step("rl", step + 1, steps)

    def _train(self, trainer: AgentTrainer, step: int, groups: list[Group]) -> Row:
        """Train an agent on a step's groups, without those that turn out to be damaged.

        Raises ValueError if all of them are.
        """
        try:
            row = trainer.train(step, groups)
        except DamagedGroupsError as error:
            self.store.groups.discard(trainer.name, error.queries, trainer.name)
            left = [group for group in groups if group.query not in error.queries]
            if not left:
                raise ValueError(f"step {step}: {error}: expected the files that this run wrote") from error
            return self._train(trainer, step, left)
        self.unacked[trainer.name] += [group.query for group in groups]
        return row

    def _sample(self, step: int) -> Row:
        """Sample K rollouts of each of the step's queries, anew after a while if none of them was scored.

        Return how many ended with each status. Raises ValueError if they stay without scores; Interrupted if the run is
        asked to stop meanwhile.
        """
        while not (row := rollout_counts(rollouts := self._play(step)))["rollouts/scored"]:
            self._wait_for_scores(step, rollouts)
        self.unscored.scored()
        return row

    def _wait_for_scores(self, step: int, rollouts: Sequence[Rollout]) -> None:
        reason = next(rollout.error for rollout in rollouts if rollout.error)
        what = f"step {step}: none of {len(rollouts)} rollouts was scored; the first error: {reason}"
        seconds = self.unscored.missed(what)
        self.display.say(f"{what}; sampled anew in {seconds:.1f} s")
        self.store.groups.reclaim(step)
        try:
            pause(seconds, self.interrupted)
        except Interrupted:
            self._save("rl", step)
            message = f"stopped after rl step {step} of {self.config.steps}; --resume goes on from here"
            raise Interrupted(message) from None

    def _play(self, step: int) -> list[Rollout]:
        """Sample K rollouts of each of the step's queries; write trajectories to files and the rest to the store."""
        config = self.config
        queries = {
            query: pick(self.tasks, config.seed, query)
            for query in range(step * config.queries_per_step, (step + 1) * config.queries_per_step)
        }
        agents = list(config.agents)
        self.store.queries.open([(q, t.id) for q, t in queries.items()], agents, config.algorithm.rollouts, step)
        jobs = [Job(q, k, task) for q, task in queries.items() for k in range(config.algorithm.rollouts)]
        rollouts = play(self.episodes, jobs)
        self._record(rollouts)
        for sampler in self.samplers.values():
            sampler.release_cache()
        return rollouts

    def _record(self, rollouts: Sequence[Rollout]) -> None:
        """Write the trajectories durably first, then what refers to them, in one transaction."""
        self.store.queries.record(*write_rollouts(self.writers, rollouts))

    def _evaluate(self, step: int) -> None:
        """Play the episodes of an evaluation, and save the weights if they are the best and are not saved yet."""
        self.display.doing("evaluating on held-out tasks")
        started = time.monotonic()
        result = self.evaluation.row(play(self.episodes, self.evaluation.jobs))
        for sampler in self.samplers.values():
            sampler.release_cache()
        row = {"stage": "rl", "step": step, **result, "time/eval": time.monotonic() - started}
        self.rundir.log_metrics(row)
        self.display.row(row)
        draw(self.rundir.path)
        self.store.roles.note_evaluation(step, result)
        if self._best() == [f"rl-{step:05d}"] and not (self.rundir.checkpoints / f"rl-{step:05d}").exists():
            self._save("rl", step)

    def _best(self) -> list[str]:
        """Return the name of the checkpoint with the best score so far, if it is to be kept."""
        best = best_of(self.store.roles.evaluations(), self.config.eval) if keeps_best(self.config) else None
        return [f"rl-{best[0]:05d}"] if best else []

    def _ends(self, step: int) -> bool:
        """Return whether the run ends here, because its score has ceased to rise; its state is then saved."""
        if not (self.config.eval.patience and ceased(self.store.roles.evaluations(), self.config)):
            return False
        if not (self.rundir.checkpoints / f"rl-{step:05d}").exists():
            self._save("rl", step)
        self.display.say(why_ended(self.config, step))
        return True

    def _update_samplers(self, step: int) -> None:
        """Tell the samplers the version of their weights, which they share with the trainers in this process."""
        for name, policy in self.policies.items():
            self.samplers[name].version = WeightsVersion(policy.version, step)

    def _log(self, stage: str, step: int, row: Row, started: float) -> None:
        row["time/step"] = time.monotonic() - started
        row["perf/peak_memory_gib"] = peak_resident() / 2**30
        self.rundir.log_metrics({"stage": stage, "step": step, **row})
        self.display.row({"stage": stage, "step": step, **row})

    def _after_step(self, stage: str, done: int, steps: int) -> None:
        stopping = self.interrupted()
        if stopping or done == steps or done % self.config.checkpoint.every == 0:
            self._save(stage, done)
        if stopping:
            raise Interrupted(f"stopped after {stage} step {done} of {steps}; --resume goes on from here")

    def _save(self, stage: str, step: int) -> None:
        """Save everything before (stage, step) atomically, then ack in the store what the checkpoint was trained on."""

        def write(folder: Path) -> None:
            agents = {name: policy.save_state(folder / name) for name, policy in self.policies.items()}
            (folder / "state.json").write_text(json.dumps({"stage": stage, "step": step, "agents": agents}))

        self.rundir.save_checkpoint(f"{stage}-{step:05d}", write, self.config.checkpoint.keep, spared=self._best())
        for name, queries in self.unacked.items():
            self.store.groups.ack(name, queries)
            self.unacked[name] = []

    def _restore(self, checkpoint: Path | None) -> tuple[str, int]:
        stage, step = "warmup", 0
        if checkpoint is not None:
            stage, step = restore(self.policies, self.rundir.open_checkpoint(checkpoint))
            self._update_samplers(step if stage == "rl" else 0)
        lost = self.store.groups.reclaim(step if stage == "rl" else 0)
        self.rundir.rewind_metrics(step, stage, keep_evaluation=stage == "rl" and not eval_due(self.config, step))
        self.store.roles.forget_evaluations(step if stage == "rl" else -1)
        if checkpoint is not None:
            for line in had(self.store.roles.evaluations(), self.config):
                self.display.say(f"resume: {line}")
            again = f"; {counted(lost, 'query', 'queries')} sampled since then, to be sampled again" if lost else ""
            self.display.say(f"resumed from {checkpoint.name}{again}")
        return stage, step


def restore(policies: dict[str, Policy], checkpoint: Path) -> tuple[str, int]:
    """Load a verified checkpoint into the policies and return its stage and step.

    Raises ValueError if the checkpoint is of other agents or of other models.
    """
    state = json.loads((checkpoint / "state.json").read_text())
    if sorted(state["agents"]) != sorted(policies):
        raise ValueError(f"{checkpoint}: agents {sorted(state['agents'])} found, expected {sorted(policies)}")
    for name, policy in policies.items():
        policy.load_state(checkpoint / name, verified=True)
    return state["stage"], state["step"]


def prefix(agent: str, row: Row) -> Row:
    """Return the row with `<agent>/` before each key."""
    return {f"{agent}/{key}": value for key, value in row.items()}
