"""The rollout worker: every agent's sampler, the episodes, the evaluations. It trains nothing and knows no trainer.

It takes queries from the store as far as the gate there lets it run ahead, samples their episodes with the newest
published weights, and records each as it ends. Episodes come and go: while a straggler runs, others begin.

With switch = "episode" all of an episode is sampled by the same weights: this process holds them once, so when new ones
come no episode begins until those running have ended. With "turn" they come in between the turns of running episodes.
Agents that vLLM servers sample are apart: the trainer writes new weights into the servers at any moment.

It may be killed at any time: a query that it leased is free again when the lease lapses, and only rollouts that were
not recorded are sampled anew. A store that cannot be reached, a full disk and weights that cannot be read are waited
for, PATIENCE seconds; what had ended meanwhile is recorded then. A late or second record of a rollout is no harm.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from mgrpo.engine.config.schema import Config
from mgrpo.engine.inference.in_process import InProcessSampler
from mgrpo.engine.inference.sampler import Sampler
from mgrpo.engine.inference.vllm.endpoints import find
from mgrpo.engine.model.causal_lm import load_model, load_tokenizer
from mgrpo.engine.rollout.curriculum import accuracy, eval_due, eval_jobs, load_tasks, pick
from mgrpo.engine.rollout.episodes import Episodes, Job, Rollout, load_environment
from mgrpo.engine.rollout.records import rollout_counts, write_rollouts
from mgrpo.engine.rollout.weight_loader import Heartbeat, WeightLoader, WorkerMetrics
from mgrpo.engine.run.directory import JsonLines, locked
from mgrpo.engine.run.trajectories import TrajectoryWriter
from mgrpo.engine.run.weights import DamagedWeightsError
from mgrpo.engine.store.groups import CallRecord, Lease, RolloutRecord, Store
from mgrpo.engine.store.open import files_of
from mgrpo.engine.system.process import doubling, keep_memory, make_deterministic

if TYPE_CHECKING:
    from mgrpo.engine.inference.vllm.client import VLLMSampler

LOOK = 0.25  # seconds between looks into the store while episodes run
FLUSH = 0.5  # seconds that an ended rollout waits, at most, for others to be recorded with
PATIENCE = 600.0  # seconds that a store, a disk or weights may be out of reach
# Seconds between looks when there is nothing to do: at first, and what doubling leads to. Less than LOOK, so that who
# has nothing comes before who has taken its share and looks for more.
IDLE = (0.02, 0.2)
RETRY = (0.5, 15.0)  # likewise, between tries of what failed

log = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")


class Stopped(Exception):
    """The worker was asked to end."""


class Worker:
    """One rollout worker of a run. name: its own among all workers of the run, on whatever machine.

    Raises ValueError for bad input, or when a process of that name runs on this directory.
    """

    def __init__(self, config: Config, name: str, store: Store, run_dir: str | Path) -> None:
        self.config, self.name, self.store = config, name, store
        keep_memory()
        make_deterministic(config.seed, config.deterministic)
        environment = load_environment(config.environment)
        self.train, self.held_out = load_tasks(environment, "train"), load_tasks(environment, "held_out")
        samplers = {name: _make_sampler(name, config) for name, agent in config.agents.items() if agent.vllm is None}
        self.served = {name: _make_client(name, config) for name, agent in config.agents.items() if agent.vllm}
        both: dict[str, Sampler] = {**samplers, **self.served}
        self.episodes = Episodes(config, environment, both, config.sampling.timeout)
        folder = Path(run_dir) / "workers" / name
        folder.mkdir(parents=True, exist_ok=True)
        self.lock, self.metrics = locked(folder / "lock"), JsonLines(folder / "metrics.jsonl")
        self.arrivals = WeightLoader(config, store, samplers, files_of(config, "weights"), self.served)
        self.writers = {a: TrajectoryWriter(files_of(config, "trajectories"), f"{a}-{name}") for a in config.agents}
        self.heartbeat = Heartbeat(store, name, config.store.lease)
        self.mine: set[tuple[int, int]] = set()  # queries' rollouts that run here, or ended and are not recorded yet
        self.ended: list[Rollout] = []  # to be recorded
        self.ended_at = self.looked_at = 0.0
        self.in_doubt = False  # whether queries may be leased that we do not know of
        self.stop: Callable[[], bool] = lambda: False
        self.window = WorkerMetrics(self.arrivals, lambda: self.episodes.busy)

    def run(self, stop: Callable[[], bool]) -> None:
        """Works until the run is at its end, or until `stop`: then running episodes are dropped and leases given back.

        To be called once. Raises GapError when a sampler's log-probs are not its trainer's; NoServerError when an
        agent's servers stay away; OSError or ValueError when the store, the disk or published weights stay out of reach
        or damaged, or weights are of another model.
        """
        self.stop = stop
        try:
            self._patiently(self.store.give_back, self.name)  # what a killed worker of this name had leased
            self.heartbeat.start()
            self._work()
        except Stopped:
            log.info("worker %s: stopped", self.name)
        finally:
            self._leave()

    def _work(self) -> None:
        pauses = doubling(*IDLE)
        while not self._over():
            step = self._evaluation()
            if step is not None:
                self._evaluate(step)
            elif not self._sample():
                self._wait(next(pauses))
                continue
            pauses = doubling(*IDLE)

    def _over(self) -> bool:
        """Whether every agent has published its last step, and all evaluations are made."""
        steps = self.config.steps
        if self.arrivals.step < steps:
            return False
        made = self._patiently(self.store.evaluations)
        left = [step for step in range(steps + 1) if eval_due(self.config, step) and step not in made]
        for step in left:  # its trainers do this, unless they were killed between publishing and that
            self._patiently(self.store.open_evaluation, step)
        return not left

    # ---- sampling

    def _sample(self) -> bool:
        """Episodes, until no query may be taken, or new weights or an evaluation wait. False when there were none."""
        self.looked_at, recorded = 0.0, self.window.recorded
        self.episodes.stream(self._more, self._end)
        return self.window.recorded > recorded

    def _more(self, running: int) -> list[Job]:
        """Between steps of the samplers: record what ended, load new weights, take queries as far as there is room."""
        now, stopping = time.monotonic(), self.stop()
        if self.ended and (stopping or not running or now - self.ended_at >= FLUSH):
            self._record()
        if stopping:
            raise Stopped
        if running and now - self.looked_at < LOOK and not self.arrivals.held:
            return []
        self.looked_at = now
        if not self._patiently(self._refresh, running) or self._evaluation() is not None:
            return []
        return self._take(running)

    def _refresh(self, running: int) -> bool:
        """Loads the newest weights; False while there are none, or running episodes or turns hold them up."""
        self.arrivals.look()
        if self.arrivals.step < 0 or (running and self.arrivals.outdated and self.config.sampling.switch == "episode"):
            return False
        return self.arrivals.bring(self.arrivals.published)

    def _take(self, running: int) -> list[Job]:
        """Not more at a time than a worker's share of a step, so that all workers get some."""
        config, queries = self.config, self.config.queries_per_step
        room = math.ceil((config.compute.concurrency - running) / config.algorithm.rollouts)
        if room < 1:
            return []
        leases = self._patiently(self._lease, min(room, math.ceil(queries / config.sampling.workers)))
        new = [(lease.query, k) for lease in leases for k in lease.missing if (lease.query, k) not in self.mine]
        self.mine.update(new)
        return [Job(query, k, pick(self.train, config.seed, query)) for query, k in new]

    def _lease(self, count: int) -> list[Lease]:
        """A call that failed may have leased queries all the same: they are given back, or nobody would sample them."""
        config, queries = self.config, self.config.queries_per_step
        if self.in_doubt:
            self.store.give_back(self.name)
        self.in_doubt = True
        leases = self.store.take(
            self.name,
            count,
            ahead=(config.sampling.max_staleness + 1) * queries,
            total=config.steps * queries,
            task_of=lambda query: pick(self.train, config.seed, query).id,
            lease=config.store.lease,
            loaded={agent: publication.step for agent, publication in self.arrivals.loaded.items()},
        )
        self.in_doubt = False
        return leases

    def _end(self, rollout: Rollout) -> None:
        if not self.ended:
            self.ended_at = time.monotonic()
        self.ended.append(rollout)

    def _record(self) -> None:
        """Trajectories first, durably; then, in one transaction, what refers to them."""
        rollouts, calls = self._patiently(self._write)
        self._patiently(self.store.record, rollouts, calls)
        self.window.add(rollout_counts(self.ended), calls)
        self.mine -= {(rollout.query, rollout.rollout) for rollout in rollouts}
        self.ended = []
        if self.window.recorded_since >= self.config.queries_per_step * self.config.algorithm.rollouts:
            self._patiently(self.metrics.append, self.window.row())

    def _write(self) -> tuple[list[RolloutRecord], list[CallRecord]]:
        try:
            return write_rollouts(self.writers, self.ended)
        except OSError:  # the disk is full: others may have room, and what is recorded twice counts once
            self._patiently(self.store.give_back, self.name)
            raise

    # ---- evaluation

    def _evaluation(self) -> int | None:
        """The step whose evaluation is this worker's to make now."""
        return self._patiently(self.store.take_evaluation, self.name, self.config.store.lease)

    def _evaluate(self, step: int) -> None:
        """Greedy episodes on held-out tasks. An episode that failed or was not scored counts as wrong."""
        began, self.heartbeat.evaluating = time.monotonic(), True
        while not self._patiently(self._bring_back, step):
            self._wait(IDLE[1])
        jobs, rollouts, busy = iter([eval_jobs(self.held_out, self.config)]), list[Rollout](), self.episodes.busy
        self.episodes.stream(lambda _: self._unless_stopped(next(jobs, [])), rollouts.append)
        self.episodes.busy = busy  # with rollouts: this is time/eval
        result = accuracy(rollouts)
        self._patiently(self.store.finish_evaluation, step, self.name, result)
        self.heartbeat.evaluating = False
        row = {"stage": "rl", "step": step, **result, "time/eval": time.monotonic() - began}
        self._patiently(self.metrics.append, row)

    def _bring_back(self, step: int) -> bool:
        """The step's weights into the samplers; False while servers do not have theirs, which are the newest."""
        self.arrivals.look()
        try:
            return self.arrivals.bring(self.store.publications(step))
        except FileNotFoundError as error:  # the trainers are far ahead, and keep few files
            log.warning("step %d is evaluated with the newest weights: %s", step, error)
            return self.arrivals.bring(self.arrivals.published)

    def _unless_stopped(self, jobs: list[Job]) -> list[Job]:
        if self.stop():
            raise Stopped
        return jobs

    # ---- waiting, and the end

    def _patiently(self, what: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Tries again for PATIENCE seconds when the store, the disk or a file fails. Raises Stopped, or the failure."""
        give_up = time.monotonic() + PATIENCE
        for pause in doubling(*RETRY):
            try:
                return what(*args, **kwargs)
            except (OSError, DamagedWeightsError) as error:
                if time.monotonic() + pause > give_up:
                    raise
                log.warning("%s; trying again in %.1f s", error, pause)
            self._wait(pause)
        raise AssertionError

    def _wait(self, seconds: float) -> None:
        began = time.monotonic()
        while (left := began + seconds - time.monotonic()) > 0:
            self._unless_stopped([])
            time.sleep(min(left, 0.1))
        self.window.waited += seconds

    def _leave(self) -> None:
        self.heartbeat.end()
        try:
            self.store.give_back(self.name)
            if self.window.recorded_since:
                self.metrics.append(self.window.row())
        except OSError as error:
            log.warning("leases lapse by themselves, or a row of metrics is missing: %s", error)
        for writer in self.writers.values():
            writer.close()
        for client in self.served.values():
            client.stop()
        self.metrics.close()
        self.lock.close()


def _make_sampler(name: str, config: Config) -> InProcessSampler:
    agent = config.agents[name]
    model = load_model(name, agent, config.compute).requires_grad_(False)
    return InProcessSampler(model, load_tokenizer(name, agent), agent, config.compute.concurrency)


def _make_client(name: str, config: Config) -> VLLMSampler:
    from mgrpo.engine.inference.vllm.client import VLLMSampler

    agent = config.agents[name]
    urls, concurrency = find(name, agent).urls, config.compute.concurrency
    return VLLMSampler(name, agent, load_tokenizer(name, agent), urls, concurrency)
