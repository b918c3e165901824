"""Run a rollout worker: it samples episodes and evaluates. It neither trains nor talks to trainers.

The worker takes queries from the store, as many as the store lets it sample ahead of training, samples their episodes
with the newest published weights, and records each episode as it ends. While a slow episode runs, others begin.

A worker holds the weights of each agent once. With switch = "episode" all turns of an episode must be sampled by the
same weights, so when new weights come, no episode begins until the running ones have ended. With "turn" new weights
are loaded between the turns of running episodes. Neither holds for agents that vLLM servers sample: their trainer
writes new weights into the servers at any moment.

If code of the environment does not return, its episodes time out. A worker with too many such calls gives its leases
back and ends, because only its end ends them; one whose event loop is held up lets its leases lapse, and ends if that
lasts. The exit status is START_AGAIN, which does not count as a failure, if the worker has recorded any rollouts, else
1: calls that never return must not start workers again without end.

A worker may be killed at any time: the queries that it leased are free again when the lease lapses, and only rollouts
that were not recorded are sampled again. If the store cannot be reached, the disk is full or weights cannot be read,
the worker tries again for a while; what ended meanwhile is recorded afterwards. Recording a rollout late or twice does
no harm.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mgrpo.engine.config.schema import Config
from mgrpo.engine.environment.loader import load_environment
from mgrpo.engine.environment.threads import StuckError
from mgrpo.engine.inference.in_process import InProcessSampler
from mgrpo.engine.inference.sampler import Sampler
from mgrpo.engine.inference.vllm.endpoints import find
from mgrpo.engine.model.causal_lm import load_model, load_tokenizer
from mgrpo.engine.rollout.curriculum import (
    digest_of,
    find_task,
    in_order,
    load_tasks,
    pick,
)
from mgrpo.engine.rollout.episodes import Episodes, Job, Rollout
from mgrpo.engine.rollout.evaluation import Evaluation
from mgrpo.engine.rollout.records import rollout_counts, write_rollouts
from mgrpo.engine.rollout.weight_loader import WeightLoader
from mgrpo.engine.rollout.worker_metrics import WorkerMetrics
from mgrpo.engine.run.directory import RunPaths, locked, root_of
from mgrpo.engine.run.metrics import JsonLines
from mgrpo.engine.run.scores import ceased, eval_due
from mgrpo.engine.run.trajectories import TrajectoryWriter
from mgrpo.engine.run.weights import DamagedWeightsError
from mgrpo.engine.store import CallRecord, Lease, RolloutRecord, Store
from mgrpo.engine.system.files import make_private
from mgrpo.engine.system.heartbeat import Heartbeat
from mgrpo.engine.system.process import START_AGAIN, end_now, keep_memory, make_deterministic
from mgrpo.engine.system.retry import Retry, doubling, patiently

if TYPE_CHECKING:
    from mgrpo.engine.inference.vllm.client import VLLMSampler

LOOK = 0.25  # seconds between polls of the store while episodes run
FLUSH = 0.5  # longest time in seconds that an ended rollout waits to be recorded together with others
# Seconds between polls of the store while there is nothing to do: at first, and the limit that doubling leads to.
# Shorter than LOOK, so that idle workers get queries before busy ones.
IDLE = (0.02, 0.2)

log = logging.getLogger(__name__)


class Stopped(Exception):
    """The worker was asked to end."""


class Worker:
    """Run one rollout worker of a run. name: unique among all workers of the run, on every machine.

    Raises ValueError for bad input, or if a worker of that name already runs on this directory.
    """

    def __init__(self, config: Config, name: str, store: Store, run_dir: str | Path) -> None:
        self.config, self.name, self.store, self.role = config, name, store, f"worker:{name}"
        paths = RunPaths(run_dir).worker(name)  # refuses a wrong name before anything is made
        keep_memory()
        make_deterministic(config.seed, config.deterministic)
        environment = load_environment(config.environment)
        self.train, self.evaluation = load_tasks(environment, "train"), Evaluation.of(config, environment)
        patiently(store.identities.settle_tasks, digest_of(self.train))
        self.train = in_order(self.train, run_dir)
        samplers = {name: _make_sampler(name, config) for name, agent in config.agents.items() if agent.vllm is None}
        self.served = {name: _make_client(name, config) for name, agent in config.agents.items() if agent.vllm}
        both: dict[str, Sampler] = {**samplers, **self.served}
        self.episodes = Episodes(config, environment, both, config.sampling.timeout)
        make_private(paths.path)
        self.lock, self.metrics_file = locked(paths.lock), JsonLines(paths.metrics)
        self.loader = WeightLoader(config, store, samplers, root_of(config, "weights"), self.served)
        trajectories = root_of(config, "trajectories")
        self.writers = {agent: TrajectoryWriter(trajectories, f"{agent}-{name}") for agent in config.agents}
        self.patiently = Retry(errors=(OSError, DamagedWeightsError), wait=self._wait)
        self.heartbeat = Heartbeat(self._extend_leases, config.store.lease / 3, failure="leases not extended")
        self.evaluating = False
        self.unrecorded: set[tuple[int, int]] = set()  # query and number of each rollout that runs or is to be recorded
        self.ended: list[Rollout] = []  # to be recorded
        self.ended_at = self.polled_at = 0.0
        self.lease_in_doubt = False  # whether the store may have leased queries to us that we do not know of
        self.stop: Callable[[], bool] = lambda: False
        self.metrics = WorkerMetrics(self.loader, lambda: self.episodes.busy, self.episodes.code.threads)

    def run(self, stop: Callable[[], bool]) -> None:
        """Work until the run is finished, or until `stop` returns True; then drop episodes and give leases back.

        May be called once. Raises GapError if a sampler's log-probs differ from its trainer's; NoServerError if an
        agent's servers stay away; OSError or ValueError if the store, the disk or published weights stay unavailable
        or damaged, or if weights are of another model; StuckError if too many calls of the environment never return.
        """
        self.stop = stop
        try:
            self.patiently(self._extend_leases)
            self.patiently(self.store.queries.give_back, self.name)  # leases of a killed worker of this name
            self.heartbeat.start()
            self._work()
        except Stopped:
            log.info("worker %s: stopped", self.name)
        finally:
            self._close()

    def _work(self) -> None:
        pauses = doubling(*IDLE)
        while not self._finished():
            step = self._take_evaluation()
            if step is not None:
                self._evaluate(step)
            elif not self._sample():
                self._wait(next(pauses))
                continue
            pauses = doubling(*IDLE)

    def _finished(self) -> bool:
        """Return whether every agent has published its last step and all evaluations are made."""
        last = self._last()
        if self.loader.step < last:
            return False
        made = self.patiently(self.store.roles.evaluations)
        left = [step for step in range(last + 1) if eval_due(self.config, step, last) and step not in made]
        for step in left:  # trainers open evaluations too, unless they were killed after publishing
            self.patiently(self.store.roles.open_evaluation, step)
        return not left

    def _last(self) -> int:
        """Return the step with which the run ends: early, if its score has ceased to rise."""
        end = self.patiently(self.store.roles.end, patience) if (patience := self.config.eval.patience) else None
        return self.config.steps if end is None else min(end, self.config.steps)

    def _extend_leases(self) -> None:
        """Extend the worker's leases. If they lapse, others sample the queries too, and each is recorded once.

        Raises TimeoutError, an OSError, while code of the environment holds up the event loop; if that lasts, the
        process ends.
        """
        lease = self.config.store.lease
        if error := self.episodes.blocked(self.config.sampling.timeout + lease):
            log.error("%s: the worker ends", error)
            end_now(error, self.status_if_stuck)
        if error := self.episodes.blocked(lease):
            raise TimeoutError(error)
        self.store.queries.extend(self.name, self.config.store.lease)
        self.store.roles.hold(self.role, self.name, self.config.store.lease)  # shows that it is there, also when idle
        if self.evaluating:
            self.store.roles.take_evaluation(self.name, self.config.store.lease)

    @property
    def status_if_stuck(self) -> int:
        """The exit status of the process if calls of the environment never return. For any thread."""
        return START_AGAIN if self.metrics.recorded else 1

    # ---- sampling

    def _sample(self) -> bool:
        """Run episodes until no query may be taken or new weights or an evaluation wait; return whether any ended."""
        self.polled_at, recorded = 0.0, self.metrics.recorded
        self.episodes.stream(self._more, self._end)
        return self.metrics.recorded > recorded

    def _more(self, running: int) -> list[Job]:
        """Record what ended, load new weights and return new jobs; called between steps of the samplers."""
        now, stopping = time.monotonic(), self.stop()
        if self.ended and (stopping or not running or now - self.ended_at >= FLUSH):
            self._record()
        if stopping:
            raise Stopped
        self._check_stuck()
        if running and now - self.polled_at < LOOK and not self.loader.held:
            return []
        self.polled_at = now
        if not self.patiently(self._refresh, running) or self._take_evaluation() is not None:
            return []
        return self._take(running)

    def _check_stuck(self) -> None:
        """Raise StuckError if too many calls of the environment have not returned, after recording what has ended."""
        try:
            self.episodes.check_stuck()
        except StuckError as error:
            log.error("%s: the worker ends", error)
            if self.ended:
                self._record()
            raise

    def _refresh(self, running: int) -> bool:
        """Load the newest weights; return False if there are none, or if running episodes or turns hold them up."""
        self.loader.poll()
        if self.loader.step < 0 or (running and self.loader.outdated and self.config.sampling.switch == "episode"):
            return False
        return self.loader.load(self.loader.published)

    def _take(self, running: int) -> list[Job]:
        """Lease queries, at most a worker's share of a step at a time, so that all workers get some."""
        config, queries = self.config, self.config.queries_per_step
        room = math.ceil((config.compute.concurrency - running) / config.algorithm.rollouts)
        if room < 1:
            return []
        leases = self.patiently(self._lease, min(room, math.ceil(queries / config.sampling.workers)))
        tasks = {lease.query: find_task(self.train, config.seed, lease.query, lease.task) for lease in leases}
        new = [(lease.query, k) for lease in leases for k in lease.missing if (lease.query, k) not in self.unrecorded]
        self.unrecorded.update(new)
        return [Job(query, k, tasks[query]) for query, k in new]

    def _lease(self, count: int) -> list[Lease]:
        """Lease queries. An earlier call that failed may still have leased some: give them back, or they are lost."""
        config, queries = self.config, self.config.queries_per_step
        if self.lease_in_doubt:
            self.store.queries.give_back(self.name)
        self.lease_in_doubt = True
        leases = self.store.queries.take(
            self.name,
            count,
            ahead=(config.sampling.max_staleness + 1) * queries,
            total=self._last() * queries,
            task_of=lambda query: pick(self.train, config.seed, query).id,
            lease=config.store.lease,
            loaded={agent: publication.step for agent, publication in self.loader.loaded.items()},
        )
        self.lease_in_doubt = False
        return leases

    def _end(self, rollout: Rollout) -> None:
        if not self.ended:
            self.ended_at = time.monotonic()
        self.ended.append(rollout)

    def _record(self) -> None:
        """Write the trajectories durably first, then what refers to them, in one transaction."""
        rollouts, calls = self.patiently(self._write)
        self.patiently(self.store.queries.record, rollouts, calls)
        self.metrics.add(rollout_counts(self.ended), calls)
        self.unrecorded -= {(rollout.query, rollout.rollout) for rollout in rollouts}
        self.ended = []
        if self.metrics.recorded_since >= self.config.queries_per_step * self.config.algorithm.rollouts:
            self.patiently(self.metrics_file.append, self.metrics.row())

    def _write(self) -> tuple[list[RolloutRecord], list[CallRecord]]:
        try:
            return write_rollouts(self.writers, self.ended)
        except OSError:  # the disk is full; other workers may have room, and a rollout recorded twice counts once
            self.patiently(self.store.queries.give_back, self.name)
            raise

    # ---- evaluation

    def _take_evaluation(self) -> int | None:
        """Return the step that this worker is to evaluate now, if any."""
        return self.patiently(self.store.roles.take_evaluation, self.name, self.config.store.lease)

    def _evaluate(self, step: int) -> None:
        """Play the episodes of an evaluation, and store what they got."""
        began, self.evaluating = time.monotonic(), True
        while not self.patiently(self._load_weights_of, step):
            self._wait(IDLE[1])
        jobs, rollouts, busy = iter([self.evaluation.jobs]), list[Rollout](), self.episodes.busy
        self.episodes.stream(lambda _: self._unless_stopped(next(jobs, [])), rollouts.append)
        self._check_stuck()
        self.episodes.busy = busy  # time/rollout leaves out evaluations; they have time/eval
        result = self.evaluation.row(rollouts)
        self.patiently(self._finish_evaluation, step, result)
        self.evaluating = False
        row = {"stage": "rl", "step": step, **result, "time/eval": time.monotonic() - began}
        self.patiently(self.metrics_file.append, row)

    def _finish_evaluation(self, step: int, result: dict[str, float]) -> None:
        """Store the result, and that the run is to end if its score has ceased to rise, once."""
        patience = self.config.eval.patience
        over = patience and self.store.roles.end(patience) is None
        over = over and ceased(self.store.roles.evaluations() | {step: result}, self.config)
        self.store.roles.finish_evaluation(step, self.name, result, patience if over else 0)

    def _load_weights_of(self, step: int) -> bool:
        """Load the step's weights; return whether all samplers are ready. Servers always have the newest weights."""
        self.loader.poll()
        try:
            return self.loader.load(self.store.roles.publications(step))
        except FileNotFoundError as error:  # the trainers are far ahead and have deleted the file
            log.warning("step %d is evaluated with the newest weights: %s", step, error)
            return self.loader.load(self.loader.published)

    def _unless_stopped(self, jobs: list[Job]) -> list[Job]:
        if self.stop():
            raise Stopped
        return jobs

    # ---- waiting and closing

    def _wait(self, seconds: float) -> None:
        """Sleep. Raises Stopped as soon as the worker is asked to end."""
        began = time.monotonic()
        while (left := began + seconds - time.monotonic()) > 0:
            self._unless_stopped([])
            time.sleep(min(left, 0.1))
        self.metrics.waited += seconds

    def _close(self) -> None:
        self.heartbeat.stop(self.config.store.lease)
        try:
            self.store.queries.give_back(self.name)
            self.store.roles.release(self.role, self.name)
            if self.metrics.recorded_since:
                self.metrics_file.append(self.metrics.row())
        except OSError as error:
            log.warning("leases were not given back and will lapse, or a row of metrics is missing: %s", error)
        for writer in self.writers.values():
            writer.close()
        for client in self.served.values():
            client.stop()
        self.metrics_file.close()
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
