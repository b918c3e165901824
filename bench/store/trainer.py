"""Measure the trainer in `mgrpo bench store`: a decoupled step's cost outside the model, and the gain of a second rank.

*Overhead.* The main agent's trainer runs as `AgentProcess` runs it, on a SQLite store with sealed groups of the agent
mix (`bench/step/case.py`): it claims, weighs, reads, plans and fills, publishes all weights with the probe, and logs.
All groups exist beforehand, so it never waits for any. The model's part is `time/forward_backward`: forwards, backwards
and the optimizer. A checkpoint and the ack that follows it are timed after each step and reported separately, because a
run saves only now and then. Old weights are deleted in the background after a publication: here during the checkpoint.

*Scaling.* The model's part of the same step is run by one rank and by two that share its micro-batches, each on one
thread. The code is not the same: a single rank holds its bf16 weights whole, while two ranks hold float32 rows (FSDP2),
so that their time includes gathering every layer's weights over gloo, in each forward and backward, and summing the
gradients.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

import msgspec
import torch
from torch.multiprocessing import spawn

from mgrpo.bench.harness import CPU, Result, figure
from mgrpo.bench.step.case import Case, mix
from mgrpo.bench.step.models import make_model
from mgrpo.bench.step.targets import Plan, plan_for
from mgrpo.engine.config.schema import Config
from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.store import Group
from mgrpo.engine.store.open import open_store
from mgrpo.engine.system import distributed
from mgrpo.engine.system.process import RENDEZVOUS, keep_memory
from mgrpo.engine.training.decoupled import AgentProcess
from mgrpo.engine.training.launcher import LOOPBACK
from mgrpo.engine.training.leader import Leader
from mgrpo.engine.training.trainer import AgentTrainer
from mgrpo.engine.types import MAIN

MOST = 3.0  # target: % of a SmolLM2 step outside the model
RANKS = (1, 2)


class Parts(NamedTuple):
    """Hold the seconds of one step, the sum of all fields except save, which is the checkpoint with its ack."""

    claim: float
    prepare: float
    model: float
    publish: float
    log: float
    save: float

    @property
    def step(self) -> float:
        """Seconds of the step."""
        return sum(self) - self.save

    @property
    def overhead(self) -> float:
        """Time outside the model, in % of the step."""
        return 100 * (1 - self.model / self.step)


WORDS = ("claim", "rewards, plan, read and fill", "the model", "publish", "log and the rest", "checkpoint and ack")


def measure(quick: bool) -> list[Result]:
    """Measure both, on SmolLM2-135M's architecture, with --quick on a tiny one."""
    plan = plan_for(CPU, quick)
    with tempfile.TemporaryDirectory() as name:
        case = make_case(plan, Path(name))
        print(f"\ntrainer: {plan.model}, {len(case.groups)} queries x {plan.rollouts} rollouts of {case.name}")
        steps = steps_of(case, plan.rounds)
        results = overhead(plan.model, steps, None if quick else MOST)
        return results + scaling(plan.model, case, plan.rounds)


def make_case(plan: Plan, folder: Path) -> Case:
    """Make the groups of a run in that folder."""
    model = make_model(folder / "model", plan.sizes)
    compute = {**plan.compute, "device": "cpu"}
    case = mix(MAIN, model, folder / "trajectories", plan.factor, plan.queries, plan.rollouts, **compute)
    return replace(case, config=msgspec.structs.replace(case.config, run_dir=str(folder)))


# ---- overhead


def overhead(model: str, steps: Sequence[Parts], most: float | None) -> list[Result]:
    """Return the median over the steps of each part. most: target, in % of the step, for the time outside the model."""
    seconds = [(word, median(values)) for word, values in zip(WORDS, zip(*steps, strict=True), strict=True)]
    share = median(step.overhead for step in steps)
    return [
        figure(f"{model}, trainer: a step", median(step.step for step in steps), "s"),
        *(figure(f"{model}, trainer: {word}", value, "s") for word, value in seconds),
        figure(f"{model}, trainer: overhead outside the model", share, "%", at_most=most),
    ]


def steps_of(case: Case, count: int) -> list[Parts]:
    """Take `count` steps after one that warms up."""
    config = run_of(case, count + 1)
    with Leader(config, case.agent, lambda: False) as leader:
        process = AgentProcess(config, case.agent, leader)
        process.publish(0)
        record(config, case.groups)
        return [step_of(process, step) for step in range(count + 1)][1:]


def run_of(case: Case, steps: int) -> Config:
    """Return the config of a decoupled run of one agent, which may take all steps on one sampling and does not end."""
    config, change = case.config, msgspec.structs.replace
    return change(
        config,
        topology="local",
        agents={case.agent: config.agents[case.agent]},
        steps=steps + 1,
        queries_per_step=len(case.groups),
        algorithm=change(config.algorithm, rollouts=len(case.groups[0].rollouts)),
        checkpoint=change(config.checkpoint, every=steps + 1),
        sampling=change(config.sampling, max_staleness=steps),
    )


def record(config: Config, groups: Sequence[Group]) -> None:
    """Do the worker's part: record queries for all steps, each step's with the groups' rollouts and calls."""
    count = (config.steps - 1) * len(groups)
    with closing(open_store(config)) as store:
        for lease in store.queries.take("worker", count, ahead=count, total=count, task_of=str, lease=3600):
            group, query = groups[lease.query % len(groups)], lease.query
            ended = [replace(rollout, query=query) for rollout in group.rollouts]
            store.queries.record(ended, [replace(call, query=query) for call in group.calls])


def step_of(process: AgentProcess, step: int) -> Parts:
    """Take one step and save a checkpoint."""
    started = perf_counter()
    row = process.rl_step(step)
    ended = perf_counter()
    process.save("rl", step + 1)
    saved = perf_counter() - ended
    claim, train, model, publish = (row[f"time/{p}"] for p in ("waiting", "train", "forward_backward", "publish"))
    return Parts(claim, train - model, model, publish, ended - started - claim - train - publish, saved)


# ---- scaling


def scaling(model: str, case: Case, count: int) -> list[Result]:
    """Return the median times of 1 rank and of 2 ranks, and their ratio; without values if there are too few cores."""
    cores, found = len(os.sched_getaffinity(0)), dict[int, float]()
    why = f"{cores} core for {max(RANKS)} ranks" if cores < max(RANKS) else None
    if not why:
        found = {ranks: median(seconds_of(case, ranks, count)) for ranks in RANKS}
    name = f"{model}, the model's part of a step"
    return [
        *(figure(f"{name}: {ranks} ranks of one thread", found.get(ranks), "s", why=why) for ranks in RANKS),
        figure(f"{name}: times as fast by 2 ranks as by 1", found[1] / found[2] if found else None, "x", why=why),
    ]


def seconds_of(case: Case, ranks: int, count: int) -> list[float]:
    """Return rank 0's seconds in `count` steps, after one that warms up."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(take_part, (ranks, case, count, Path(folder)), nprocs=ranks)
        seconds: list[float] = json.loads((Path(folder) / "seconds.json").read_text())
        return seconds


def take_part(rank: int, ranks: int, case: Case, count: int, folder: Path) -> None:
    """Run as one of the ranks that a local run starts."""
    environment = {"RANK": str(rank), "WORLD_SIZE": str(ranks), RENDEZVOUS: f"file://{folder}/meeting"}
    os.environ.update(LOOPBACK | environment)
    torch.set_num_threads(1)
    keep_memory()
    with distributed.joined(CPU):
        policy = Policy(case.agent, case.config.agents[case.agent], case.config.compute)
        trainer = AgentTrainer(case.config, policy, case.trajectories)
        rows = [trainer.train(step, case.groups) for step in range(count + 1)]
    if rank == 0:
        (folder / "seconds.json").write_text(json.dumps([row["time/forward_backward"] for row in rows[1:]]))
