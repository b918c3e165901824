"""`mgrpo bench store`: times how fast 1 to 32 worker processes write to the store and read from it, with durability on.

Each worker does what workers do in a run, as fast as it can: it takes enough queries to fill a sampler (96 episodes at
once, the default of compute.concurrency) and records their rollouts, with every call, in BATCHES batches, as episodes
end in clusters. Then as many processes claim groups with their records and ack them. Every commit is forced to the disk
(SQLite: synchronous = FULL; PostgreSQL: fsync). The PostgreSQL server is a throwaway one on the same machine. Finally
the cost of a trainer's step on such groups is measured (`trainer.py`).
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from multiprocessing.connection import Connection
from typing import Literal, NamedTuple

from mgrpo.bench.harness import Result, figure, report, show
from mgrpo.bench.postgres import PASSWORD, Cluster, why_not
from mgrpo.engine.run.trajectories import Position
from mgrpo.engine.store import CallRecord, Publication, RolloutRecord, Store

AGENTS = ("main", "search")
ROLLOUTS, SUBS = 8, 2  # K; calls of the sub-agent per rollout
QUERIES, BATCHES = 12, 3  # queries taken at once; batches in which they are recorded
TARGETS = {("sqlite", 8): 2000.0, ("postgresql", 8): 5000.0}  # rollouts/s, by workers
SCALING, SECONDS = (1, 2, 4, 8, 16, 32), 5.0
QUICK_SCALING, QUICK_SECONDS = (1, 8), 2.0
HOLDER = "bench"

Kind = Literal["rollouts", "groups"]


class Task(NamedTuple):
    """Tell a worker what to do, on which run of which store, when to begin and for how long."""

    kind: Kind
    url: str
    run: str
    begin: float
    seconds: float


class Done(NamedTuple):
    """Hold a worker's operations, the time when it ended, and the seconds spent in the first and the second call."""

    operations: int
    ended: float
    first: float
    second: float


def main(quick: bool) -> None:
    """Measure SQLite, PostgreSQL if a server can be started, and a trainer's step, and print the results."""
    from mgrpo.bench.store import trainer  # here, because every worker imports this module

    scaling, seconds = (QUICK_SCALING, QUICK_SECONDS) if quick else (SCALING, SECONDS)
    with workers(max(scaling)) as pipes:
        with tempfile.TemporaryDirectory() as folder:
            results = measure("sqlite", f"sqlite:///{folder}/store.db", pipes, scaling, seconds)
        results += postgresql(pipes, scaling, seconds)
    report("store", results + trainer.measure(quick))


def postgresql(pipes: Sequence[Connection], scaling: Sequence[int], seconds: float) -> list[Result]:
    """Measure PostgreSQL, or say why it cannot be measured."""
    if why := why_not():
        return [rollouts_per_second("postgresql", count, None, why) for count in scaling]
    cluster = Cluster()
    try:
        return measure("postgresql", cluster.create(), pipes, scaling, seconds)
    finally:
        cluster.remove()


def measure(
    backend: str, url: str, pipes: Sequence[Connection], scaling: Sequence[int], seconds: float
) -> list[Result]:
    """Make a new run for each number of workers: record rollouts, then claim its groups."""
    results, rows = [], []
    for count in scaling:
        run = begin(url)
        made = ask(pipes[:count], Task("rollouts", url, run, 0, seconds))
        used = ask(pipes[:count], Task("groups", url, run, 0, seconds / 2))
        rates = [sum(done.operations for done in each) / elapsed for each, elapsed in (made, used)]
        takes = sum(done.operations for done in made[0]) / (QUERIES * ROLLOUTS)
        taking, recording = (1e3 * sum(seconds) / takes for seconds in zip(*(d[2:] for d in made[0]), strict=True))
        rows.append((str(count), *(f"{value:.4g}" for value in (*rates, taking, recording / BATCHES)), ""))
        results.append(rollouts_per_second(backend, count, rates[0]))
        results.append(figure(f"{backend}, {count} workers: groups claimed and acked", rates[1], "groups/s"))
    columns = ("workers", "rollouts/s", "groups/s", "ms a take", "ms a record", "")
    size = f"{QUERIES} queries x {ROLLOUTS} rollouts x {1 + SUBS} calls"
    show(f"\n{backend}: {size} a take, recorded in {BATCHES} batches", columns, rows)
    return results


def rollouts_per_second(backend: str, count: int, value: float | None, why: str | None = None) -> Result:
    name, target = f"{backend}, {count} workers: rollouts taken and recorded", TARGETS.get((backend, count))
    return figure(name, value, "rollouts/s", at_least=target, why=why)


def begin(url: str) -> str:
    """Begin a new run with its first weights published, and return its name."""
    run = uuid.uuid4().hex
    with closing(Store(url, run, password=PASSWORD)) as store:
        store.roles.begin_run(AGENTS, ROLLOUTS, "")
        for agent in AGENTS:
            store.roles.hold(f"trainer:{agent}", HOLDER, 3600)
            store.roles.publish(
                Publication(agent=agent, step=0, version=0, trained=0, file="", checksum="", size=0), HOLDER
            )
    return run


# ---- the workers


@contextmanager
def workers(count: int) -> Iterator[list[Connection]]:
    """Start processes that are driven through pipes; only once, as that takes longer than a measurement."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(count)]
    processes = [context.Process(target=serve, args=(theirs,), daemon=True) for _, theirs in pipes]
    for process in processes:
        process.start()
    try:
        for ours, _ in pipes:
            assert ours.recv() == "ready"
        yield [ours for ours, _ in pipes]
    finally:
        for (ours, _), process in zip(pipes, processes, strict=True):
            if process.is_alive():
                ours.send(None)
            process.join()


def ask(pipes: Sequence[Connection], task: Task) -> tuple[list[Done], float]:
    """Let all workers do a task; return what each did, and the seconds from the start until the last one ended."""
    task = task._replace(begin=time.time() + 0.5)
    for pipe in pipes:
        pipe.send(task)
    done = [pipe.recv() for pipe in pipes]
    return done, max(each.ended for each in done) - task.begin


def serve(pipe: Connection) -> None:
    """Do the tasks that come through a pipe, in a worker process."""
    pipe.send("ready")
    while (task := pipe.recv()) is not None:
        with closing(Store(task.url, task.run, password=PASSWORD)) as store:
            time.sleep(max(task.begin - time.time(), 0))
            pipe.send(work(store, task))


def work(store: Store, task: Task) -> Done:
    """Work until the time is over, or until there is no group left."""
    count, first, second, once = 0, 0.0, 0.0, sample if task.kind == "rollouts" else train
    while time.time() < task.begin + task.seconds:
        done, *seconds = once(store)
        count, first, second = count + done, first + seconds[0], second + seconds[1]
        if not done:
            break
    return Done(count, time.time(), first, second)


def sample(store: Store) -> tuple[int, float, float]:
    """Take queries and record their rollouts; return their number, and the seconds of both parts."""
    started = time.perf_counter()
    leases = store.queries.take(f"worker-{os.getpid()}", QUERIES, ahead=1 << 40, total=1 << 40, task_of=str, lease=3600)
    taken, recording = time.perf_counter() - started, 0.0
    keys = [(lease.query, rollout) for lease in leases for rollout in lease.missing]
    for batch in (episodes(keys[first::BATCHES]) for first in range(BATCHES)):
        started = time.perf_counter()
        store.queries.record(*batch)
        recording += time.perf_counter() - started
    return len(keys), taken, recording


def train(store: Store) -> tuple[int, float, float]:
    """Claim groups and ack them; return their number, and the seconds of both parts."""
    started = time.perf_counter()
    groups = store.groups.claim("main", QUERIES, HOLDER).groups
    claimed = time.perf_counter()
    store.groups.ack("main", [group.query for group in groups], HOLDER)
    return len(groups), claimed - started, time.perf_counter() - claimed


def episodes(keys: Sequence[tuple[int, int]]) -> tuple[list[RolloutRecord], list[CallRecord]]:
    """Make the records of (query, rollout), with numbers as long as real ones."""
    made = [("main", 0), *(("search", number) for number in range(SUBS))]
    return (
        [RolloutRecord(query, rollout, "scored", True, 0.5, 12.5) for query, rollout in keys],
        [call(agent, query, rollout, number) for query, rollout in keys for agent, number in made],
    )


def call(agent: str, query: int, rollout: int, number: int) -> CallRecord:
    position = Position(f"{agent}-00001.arrow", 1234567 + query, rollout)
    facts = (900, 200, 3, False, "answer", position, 7, 8, 899, "0123456789abcdef" * 2, "fedcba9876543210" * 2)
    return CallRecord(agent, query, rollout, number, True, None if agent == "main" else 0.5, 7, *facts)
