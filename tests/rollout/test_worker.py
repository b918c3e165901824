"""Test the rollout worker, while the test plays the trainers: how far it runs ahead, its weights, each rollout once.

Between steps the worker asks whether to stop; each time, the test does what the trainers would have done meanwhile.
"""

from __future__ import annotations

import errno
import math
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cases.worker import STEPS, Flaky, K, Q, World, logprobs
from mgrpo.engine.environment import threads
from mgrpo.engine.environment.loader import load_environment
from mgrpo.engine.environment.threads import StuckError
from mgrpo.engine.inference.in_process import InProcessSampler
from mgrpo.engine.rollout import episodes as rollout_module
from mgrpo.engine.rollout import worker as worker_module
from mgrpo.engine.rollout.curriculum import load_tasks, pick
from mgrpo.engine.rollout.episodes import Episodes, Job
from mgrpo.engine.rollout.evaluation import Evaluation
from mgrpo.engine.rollout.worker import Worker
from mgrpo.engine.run.metrics import read_metrics
from mgrpo.engine.run.trajectories import TrajectoryWriter, read
from mgrpo.engine.run.weights import DamagedWeightsError, GapError, probe_tokens, publish_weights
from mgrpo.engine.store import CallRecord, Lease, Publication, RolloutRecord, Store
from mgrpo.engine.store.queries import Queries
from mgrpo.engine.system import retry
from mgrpo.engine.system.process import START_AGAIN
from mgrpo.engine.types import INITIAL_WEIGHTS

FEW = {"dtype": "float32", "device": "cpu", "concurrency": 3}  # episodes side by side


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Shorten all waiting."""
    monkeypatch.setattr(worker_module, "IDLE", (0.001, 0.01))
    monkeypatch.setattr(retry, "PAUSES", (0.001, 0.001))
    monkeypatch.setattr(worker_module, "LOOK", 0.02)
    monkeypatch.setattr(worker_module, "FLUSH", 0.05)


class Amid:
    """Let the trainers publish step 1 when a clerk is first asked, in the middle of main's calls."""

    def __init__(self, world: World, worker: Worker, **changes: Any) -> None:
        self.world, self.clerk, self.changes, self.done = world, worker.loader.samplers["clerk"], changes, False

    def __call__(self) -> bool:
        if self.clerk.slots and min(self.world.steps.values()) == 0 and 0 in self.world.store.roles.evaluations():
            for name in self.world.config.agents:
                self.world.publish(name, 1, **self.changes)
            self.done = True
        return self.world()


# ---- weights and the gate


def test_on_policy_every_call_is_sampled_by_the_weights_of_its_step(tmp_path):
    world = World(tmp_path)
    world.worker().run(world)
    world.check()
    assert all(c.step == c.query // Q and c.version == c.version_last == 10 * c.step for c in world.calls)


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_as_many_queries_are_opened_as_the_gate_lets_and_more_when_it_opens(tmp_path, max_staleness):
    world = World(tmp_path, {"max_staleness": max_staleness})
    seen: list[int] = []

    def stop() -> bool:
        """Let no trainer go on until the worker has been idle for a while."""
        if min(world.steps.values()) < 0:
            world.train()
        if seen[-60:] == [(max_staleness + 1) * Q] * 60:
            return world()
        seen.append(world.store.audit.balance()["agents"].get("main", {}).get("sealed", 0))
        assert len(seen) < 5000, seen[-1]
        return False

    world.worker().run(stop)
    world.check()


def test_episodes_that_come_and_go_are_those_of_a_batch(tmp_path, monkeypatch):
    world = World(tmp_path, compute=FEW)
    beside = []
    real = Worker._take

    def take(self: Worker, running: int) -> list[Job]:
        jobs = real(self, running)
        beside.append((running, len(jobs)))
        return jobs

    monkeypatch.setattr(Worker, "_take", take)
    world.worker().run(world)
    world.check()
    assert any(running and new for running, new in beside), "some began while others ran"
    environment = load_environment(world.config.environment)
    tasks = load_tasks(environment, "train")
    for step in range(STEPS):
        queries = range(step * Q, (step + 1) * Q)
        jobs = [Job(q, k, pick(tasks, world.config.seed, q)) for q in queries for k in range(K)]
        for rollout in Episodes(world.config, environment, dict(world.samplers(step))).run(jobs):
            calls = [c for c in world.store.groups.calls_of(rollout.job.query) if c.rollout == rollout.job.rollout]
            recorded = read(f"{world.run_dir}/trajectories", [c.position for c in sorted(calls, key=order)])
            for mine, other in zip(recorded, rollout.trajectories, strict=True):
                assert other is not None and np.array_equal(mine.tokens, other.tokens)
                np.testing.assert_allclose(mine.logprobs, other.logprobs, atol=2e-5)


def order(call: CallRecord) -> tuple[bool, int]:
    return call.agent != "main", call.call


def test_new_weights_wait_for_the_end_of_episodes(tmp_path):
    world = World(tmp_path, {"max_staleness": 1}, compute=FEW)
    worker = world.worker()
    amid = Amid(world, worker)
    worker.run(amid)
    world.check(Q)  # nothing was sampled with the weights of step 1
    assert amid.done and {call.step for call in world.calls} == {0, 1}
    assert all(call.version == call.version_last for call in world.calls)
    for query in range(world.opened):
        for rollout in range(K):
            assert len({c.step for c in world.store.groups.calls_of(query) if c.rollout == rollout}) == 1


def test_new_weights_between_turns_sample_what_follows_and_nothing_before(tmp_path):
    world = World(tmp_path, {"max_staleness": 1, "switch": "turn"})
    worker = world.worker()
    worker.run(Amid(world, worker))
    world.check(Q)
    switched = [call for call in world.calls if call.version < call.version_last]
    assert switched and all(call.step == 0 and call.version == 0 for call in switched)
    for call, trajectory in zip(
        switched, read(f"{world.run_dir}/trajectories", [c.position for c in switched]), strict=True
    ):
        steps = [
            [
                n
                for n in range(STEPS + 1)
                if np.abs(truth(world, call.agent, n, trajectory)[turn] - trajectory.logprobs[turn]).max() < 1e-4
            ]
            for turn in turns(trajectory.sampled)
        ]
        assert all(len(found) == 1 for found in steps), "each turn is of one version"
        flat = [found[0] for found in steps]
        assert flat == sorted(flat) and (10 * flat[0], 10 * flat[-1]) == (call.version, call.version_last)


def turns(sampled: np.ndarray) -> list[np.ndarray]:
    """Return the indices of each stretch of sampled tokens."""
    at = np.flatnonzero(sampled)
    return np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)


def truth(world: World, agent: str, step: int, trajectory: Any) -> np.ndarray:
    return np.array([0.0, *logprobs(world.model(agent, step), trajectory.tokens.tolist())])


def damage(world: World, publication: Publication, how: str) -> None:
    file = Path(world.weights) / publication.file
    data = file.read_bytes()
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(data[:-1] if how == "torn" else data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize(
    ("how", "error"), [("torn", DamagedWeightsError), ("altered", DamagedWeightsError), ("gone", OSError)]
)
def test_a_damaged_file_is_refused_and_the_old_weights_stay(tmp_path, monkeypatch, how, error):
    world = World(tmp_path)
    monkeypatch.setattr(retry, "PATIENCE", 0.0)
    real = world.publish
    monkeypatch.setattr(
        world, "publish", lambda name, step: damage(world, real(name, step), how) if step else real(name, 0)
    )
    worker = world.worker()
    with pytest.raises(error, match=r"(main|clerk)/v10"):
        worker.run(world)
    for name, sampler in worker.loader.samplers.items():
        assert sampler.version == INITIAL_WEIGHTS
        assert all(torch.equal(p, world.tensors(name, 0)[key]) for key, p in sampler.model.named_parameters())


def test_a_file_that_is_whole_a_moment_later_is_waited_for(tmp_path, monkeypatch):
    world = World(tmp_path)
    real = world.publish
    hidden: list[tuple[Path, bytes]] = []

    def publish(name: str, step: int) -> None:
        file = Path(world.weights) / real(name, step).file
        hidden.append((file, file.read_bytes()))
        file.write_bytes(b"half of it")

    def stop() -> bool:
        while hidden:
            file, data = hidden.pop()
            file.write_bytes(data)
        return world()

    monkeypatch.setattr(world, "publish", publish)
    world.worker().run(stop)
    world.check()


def test_weights_of_another_model_are_refused_by_the_name_of_what_does_not_fit(tmp_path, monkeypatch):
    world = World(tmp_path)
    real = world.publish

    def publish(name: str, step: int) -> None:
        tensors = world.tensors(name, step) | ({"model.norm.weight": torch.ones(7)} if step else {})
        file, checksum, size = publish_weights(world.weights, name, 10 * step, tensors)
        real(name, step, file=file, checksum=checksum, size=size)

    monkeypatch.setattr(world, "publish", publish)
    message = r"weight 'model\.norm\.weight' is float32 \[7\]: expected float32 \[32\]"
    with pytest.raises(ValueError, match=message):
        world.worker().run(world)


def test_a_probe_that_differs_ends_the_run_and_says_by_how_much(tmp_path):
    world = World(tmp_path)
    probe = tuple(value + 0.5 for value in logprobs(world.model("clerk", 0), probe_tokens(0, 257, 128)))
    world.publish("main", 0)
    world.publish("clerk", 0, probe=probe)
    with pytest.raises(GapError, match=r"agents\.clerk: with version 0 .* differ .* by 0\.5 nats .* at most .* 0\.1"):
        world.worker().run(world)


def test_a_probe_is_made_of_every_nth_version_only(tmp_path):
    world = World(tmp_path, {"probe_every": 2})
    worker = world.worker()
    amid = Amid(world, worker, probe=(9.0,) * 31)
    worker.run(amid)
    world.check(Q)
    assert amid.done and set(worker.loader.loads.values()) == {STEPS + 1}


def test_a_frozen_agents_weights_are_loaded_once_and_their_step_goes_on(tmp_path, monkeypatch):
    world = World(tmp_path)
    real = world.tensors
    monkeypatch.setattr(world, "tensors", lambda name, step: real(name, 0 if name == "clerk" else step))
    worker = world.worker()
    worker.run(world)
    world.check()
    assert worker.loader.loads == {"main": STEPS + 1, "clerk": 1}
    assert all(call.step == call.query // Q for call in world.calls)


# ---- evaluations


def test_the_rows_say_how_long_the_samplers_took_for_rollouts(tmp_path, monkeypatch):
    """Only a sampler's step moves the clock here; the steps of an evaluation are not counted."""
    world = World(tmp_path)
    worker, seconds, clock = world.worker(), Counter[bool](), SimpleNamespace(monotonic=lambda: seconds.total())
    monkeypatch.setattr(rollout_module, "time", clock)
    step = InProcessSampler.step

    def counted(self):
        seconds[worker.evaluating] += 1
        return step(self)

    monkeypatch.setattr(InProcessSampler, "step", counted)
    worker.run(world)
    rows = read_metrics(world.run_dir / "workers" / "w" / "metrics.jsonl")
    assert min(seconds.values()) > 0 and len(seconds) == 2
    assert sum(row.get("time/rollout", 0.0) for row in rows) == seconds[False]


def test_evaluations_are_greedy_and_of_the_weights_of_their_step(tmp_path):
    world = World(tmp_path)
    world.worker().run(world)
    results = world.store.roles.evaluations()
    assert list(results) == [0, STEPS] and all(result["eval/questions"] == 3 for result in results.values())
    rows = read_metrics(world.run_dir / "workers" / "w" / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval/held_out_accuracy" in row] == [0, STEPS]
    assert [row["rollouts/scored"] for row in rows if "rollouts/scored" in row] == [Q * K] * STEPS


def test_an_evaluation_whose_weights_are_gone_is_made_with_the_newest(tmp_path):
    world = World(tmp_path)
    first = [world.publish(name, 0) for name in world.config.agents]
    for name in world.config.agents:
        world.publish(name, 1)
    for publication in first:
        damage(world, publication, "gone")
    world.worker().run(world)
    assert list(world.store.roles.evaluations()) == [0, STEPS]


def test_an_evaluation_that_no_trainer_lived_to_open_is_made(tmp_path, monkeypatch):
    world = World(tmp_path)
    monkeypatch.setattr(world.store.roles, "open_evaluation", lambda step: None)
    world.worker().run(world)
    assert list(world.store.roles.evaluations()) == [0, STEPS]


def test_a_worker_ends_a_run_whose_score_has_not_risen_for_so_many_evaluations(tmp_path, monkeypatch):
    world = World(tmp_path, steps=STEPS + 3, eval={"every": 1, "patience": 2})
    scores = iter([0.5, 0.4, 0.5, 0.9, 0.9])  # at 0, 1 and 2: no rise since 0; then the last one
    monkeypatch.setattr(Evaluation, "row", lambda *_: {"eval/held_out_accuracy": next(scores), "eval/questions": 3})
    train = world.train

    def until_the_end():
        end = world.store.roles.end(2)
        if end is None or min(world.steps.values()) < end:
            train()

    monkeypatch.setattr(world, "train", until_the_end)
    world.worker().run(world)
    end = world.store.roles.end(2)
    assert end == max(world.steps.values()) and 3 <= end < STEPS + 3
    assert list(world.store.roles.evaluations()) == list(range(end + 1))


def test_an_evaluation_of_several_samples_says_pass_at_k(tmp_path):
    world = World(tmp_path, eval={"samples": 3, "temperature": 1.5, "sets": ("held_out", "train")})
    world.worker().run(world)
    rows = read_metrics(world.run_dir / "workers" / "w" / "metrics.jsonl")
    row = next(row for row in rows if "eval/held_out_accuracy" in row)
    assert row["eval/samples"] == 3 and row["eval/temperature"] == 1.5 and row["eval/questions"] == 3
    for name in ("held_out", "train"):
        assert row[f"eval/{name}/questions"] == 3 and row[f"eval/{name}/failed"] == 0
        assert row[f"eval/{name}/avg@3"] <= row[f"eval/{name}/pass@2"] <= row[f"eval/{name}/pass@3"]
    assert row["eval/held_out_accuracy"] == row["eval/held_out/avg@3"]


# ---- what goes wrong


@pytest.mark.parametrize("switch", ["episode", "turn"])
def test_a_store_that_fails_now_and_then_gets_everything_once(tmp_path, switch):
    world = World(tmp_path, {"switch": switch, "max_staleness": 1})
    store = Flaky(world.url)
    world.worker(store=store).run(world)
    world.check()
    assert store.failures > 20 and list(world.store.roles.evaluations()) == [0, STEPS]


def test_a_store_that_stays_away_ends_the_worker_with_its_error(tmp_path, monkeypatch):
    world = World(tmp_path)
    monkeypatch.setattr(retry, "PATIENCE", 0.05)
    store, tries = Store(world.url, "run"), []

    def record(*_: Any) -> None:
        tries.append(1)
        raise OSError(errno.EIO, "store: connection refused")

    monkeypatch.setattr(store.queries, "record", record)
    with pytest.raises(OSError, match="connection refused"):
        world.worker(store=store).run(world)
    assert len(tries) > 3 and [lease.query for lease in world.take("another", 9)] == list(range(Q))


def test_a_worker_waits_for_a_store_that_is_out_of_reach_when_it_begins(tmp_path, monkeypatch):
    world = World(tmp_path)
    worker, failures = world.worker(), [OSError(errno.EIO, "store: connection refused")]
    extend = worker.store.queries.extend

    def fails_once(*arguments: Any) -> None:
        if failures:
            raise failures.pop()
        extend(*arguments)

    monkeypatch.setattr(worker.store.queries, "extend", fails_once)
    worker.run(world)
    world.check()
    assert not failures


def test_a_full_disk_gives_the_queries_back_and_is_waited_for(tmp_path, monkeypatch):
    world = World(tmp_path)
    real, full, lent = TrajectoryWriter.append, [True] * 4, []

    def append(self: TrajectoryWriter, trajectories: Any) -> Any:
        if trajectories and full and full.pop():
            raise OSError(errno.ENOSPC, "cannot append trajectories: No space left on device", "x.arrow")
        return real(self, trajectories)

    def stop() -> bool:
        if 0 < len(full) < 4 and not lent:  # while it waits, another worker may take its queries
            lent.extend(world.take("another", 1, lease=0.0))
        return world()

    monkeypatch.setattr(TrajectoryWriter, "append", append)
    world.worker().run(stop)
    world.check()
    assert [lease.query for lease in lent] == [0]


def test_stopped_it_drops_what_runs_and_gives_its_queries_back(tmp_path):
    world = World(tmp_path)
    worker = world.worker()
    running: list[int] = []
    real = worker.episodes.stream

    def stream(more: Any, ended: Any) -> None:
        def watched(count: int) -> Any:
            running.append(count)
            return more(count)

        real(watched, ended)

    worker.episodes.stream = stream  # type: ignore[method-assign]
    worker.run(lambda: world() or running[-3:] == [Q * K] * 3)
    assert running[-1] == Q * K and not any(sampler.slots for sampler in worker.loader.samplers.values())
    assert [(lease.query, lease.missing) for lease in world.take("another", 9)] == [(q, [0, 1]) for q in range(Q)]
    world.store.queries.give_back("another")
    world.worker().run(world)
    world.check()


def test_what_a_killed_worker_had_is_sampled_anew_and_what_it_recorded_stands(tmp_path):
    world = World(tmp_path)
    world.train()
    world.take("w", 1)  # killed while its lease was valid; a new worker of the same name starts
    world.take("other", 1, lease=0.0)
    world.store.queries.record([RolloutRecord(1, 0, "failed", False, 0.0, 1.0, "as it was")], [])
    world.worker().run(world)
    statuses = [[r.status for r in world.store.groups.rollouts_of(query)] for query in range(STEPS * Q)]
    assert statuses == [
        ["failed" if (query, k) == (1, 0) else "scored" for k in range(K)] for query in range(STEPS * Q)
    ]
    assert {call.rollout for call in world.store.groups.calls_of(1)} == {1}


def test_two_workers_take_no_more_than_their_share_of_a_step_at_a_time(tmp_path, monkeypatch):
    world = World(tmp_path, {"workers": 2})
    take, asked = Queries.take, set[int]()

    def noted(queries: Queries, worker: str, count: int, **named: Any) -> list[Lease]:
        asked.add(count)
        return take(queries, worker, count, **named)

    monkeypatch.setattr(Queries, "take", noted)
    workers = [world.worker(name) for name in ("a", "b")]
    lock = threading.Lock()

    def stop() -> bool:
        with lock:
            return world()

    threads = [threading.Thread(target=worker.run, args=(stop,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    world.check()
    assert asked == {math.ceil(Q / 2)}


def test_a_name_is_held_by_one_process_at_a_time(tmp_path):
    world = World(tmp_path)
    running = [world.worker("a"), world.worker("b")]
    with pytest.raises(ValueError, match="workers/a is in use by process"):
        world.worker("a")
    running[0].run(lambda: True)  # and ends
    world.worker("a")


def test_leases_are_extended_and_while_it_evaluates_that_of_the_evaluation_too(tmp_path, monkeypatch):
    world = World(tmp_path)
    worker, extended = world.worker(), []
    monkeypatch.setattr(worker.store.queries, "extend", lambda *args: extended.append(("queries", *args)))
    monkeypatch.setattr(worker.store.roles, "take_evaluation", lambda *args: extended.append(("evaluation", *args)))
    assert worker.heartbeat.seconds == world.config.store.lease / 3
    worker.heartbeat.beat()
    worker.evaluating = True
    worker.heartbeat.beat()
    assert extended == [("queries", "w", 30.0), ("queries", "w", 30.0), ("evaluation", "w", 30.0)]


def test_a_worker_whose_event_loop_is_held_up_lets_its_leases_lapse_and_then_ends(tmp_path, monkeypatch):
    world = World(tmp_path)
    worker, extended, ended = world.worker(), [], []
    monkeypatch.setattr(worker.store.queries, "extend", lambda *args: extended.append(args))
    monkeypatch.setattr(worker_module, "end_now", lambda error, status: ended.append((error, status)))
    held_up = 0.0
    monkeypatch.setattr(worker.episodes, "blocked", lambda seconds: "tool has held up" if held_up > seconds else "")
    worker.heartbeat.beat()
    assert len(extended) == 1
    held_up = world.config.store.lease + 1
    with pytest.raises(TimeoutError, match="tool has held up"):
        worker.heartbeat.beat()
    assert len(extended) == 1 and not ended
    held_up += world.config.sampling.timeout
    with pytest.raises(TimeoutError):
        worker.heartbeat.beat()
    assert ended == [("tool has held up", 1)] and len(extended) == 1
    worker.metrics.recorded = 1  # only then is it of use to start it again, without counting how often
    with pytest.raises(TimeoutError):
        worker.heartbeat.beat()
    assert ended[1:] == [("tool has held up", START_AGAIN)]
    worker._close()


def test_a_worker_with_too_many_stuck_calls_gives_its_queries_back_and_ends(tmp_path, monkeypatch):
    world = World(tmp_path, {"timeout": 1.5}, deterministic=False)
    environment = tmp_path / "chatty.py"
    blocks = "    def tool(self, call, use):\n        import threading\n        threading.Event().wait(20)\n"
    parse = "        if call.agent == 'clerk': return (ToolCall('t', ''),)\n        return (Delegate"
    environment.write_text(
        environment.read_text().replace("        return (Delegate", parse).replace("Task\n", "Task, ToolCall\n")
        + blocks
    )
    monkeypatch.setattr(threads, "STUCK", 3)
    worker = world.worker()
    with pytest.raises(StuckError, match=r"environment: \d+ calls of Chatty\.tool were given up"):
        worker.run(world)
    assert {r.status for query in range(Q) for r in world.store.groups.rollouts_of(query)} <= {"failed"}
    assert worker.status_if_stuck == (START_AGAIN if worker.metrics.recorded else 1)
    assert world.take("another", 9) is not None and worker.lock.closed


def test_a_worker_whose_tasks_have_another_order_asks_what_its_lease_says(tmp_path):
    world = World(tmp_path)
    world.train()  # publishes the first weights
    (begun,) = world.take("another", 1)
    world.store.queries.give_back("another")
    worker = world.worker()
    worker.train = list(reversed(worker.train))
    worker._refresh(0)
    jobs = worker._take(0)
    assert {job.task.id for job in jobs if job.query == begun.query} == {begun.task}
    assert sorted(job.rollout for job in jobs if job.query == begun.query) == begun.missing
    worker.run(lambda: True)


def test_a_worker_that_waits_for_work_shows_that_it_is_there_until_it_ends(tmp_path):
    world = World(tmp_path)
    seen: list[Any] = []

    def stop() -> bool:
        seen.append(world.store.audit.status()["roles"].get("worker:w"))
        return len(seen) > 3

    world.worker().run(stop)  # no weights are published: there is nothing to do
    assert all(role and role["holder"] == "w" and role["seconds"] > 0 for role in seen)
    assert "worker:w" not in world.store.audit.status()["roles"]


def test_a_worker_with_other_tasks_than_the_run_was_begun_with_is_refused(tmp_path):
    world = World(tmp_path)
    with world.store.database.engine.begin() as db:
        db.exec_driver_sql("insert into identities values ('run', '1', '', 'another digest')")
    with pytest.raises(ValueError, match=r"tasks\('train'\) of run 'run' has digest \w{32}: expected another digest"):
        world.worker()
