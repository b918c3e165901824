"""Test the simulated run against cases worked out by hand, limits of queueing, a naive model, and the real gate."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo.engine.cli import main as cli
from mgrpo.engine.config.schema import Config, dump_config, parse_config
from mgrpo.engine.rollout import worker
from mgrpo.engine.run.trajectories import Position
from mgrpo.engine.simulate import events, fit, simulate
from mgrpo.engine.simulate.processor_sharing import ProcessorSharing
from mgrpo.engine.simulate.workload import EpisodeCost, Skewed, TrainerCost, WorkerCost, Workload, read_workload
from mgrpo.engine.store import CallRecord, Publication, RolloutRecord, Store
from mgrpo.engine.training import leader

ONE = {"main": 1}


def config(agents: Sequence[str] = ("main",), **changes: Any) -> Config:
    raw = {
        "run_dir": "run",
        "environment": {"use": "a:b"},
        "agents": {name: {"model": "m"} for name in agents},
        "queries_per_step": 4,
        "algorithm": {"rollouts": 2},
        "sampling": {"timeout": 1e6},
        "compute": {"max_tokens": 10**9},
    }
    return parse_config(raw | changes)


def workload(actions: Sequence[float], *trainers: TrainerCost, pause: float = 0.0, **rates: float) -> Workload:
    """Make a workload whose episodes have `actions` sampled tokens; each agent trains on 100 tokens of each."""
    of = np.array(actions, np.float64)
    episodes = EpisodeCost(of, np.full(len(of), pause), np.full((len(trainers), len(of)), 100.0), [0, len(of)])
    names = ["main", "sub"][: len(trainers)]
    return Workload(
        episodes,
        WorkerCost(**{"step_seconds": 0.0, "row_seconds": 0.0} | rates),
        dict(zip(names, trainers, strict=True)),
    )


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all processes look into the store all the time, so that only the work takes time."""
    monkeypatch.setattr(events, "IDLE", (1e-9, 1e-9))
    for name in ("WORKER_LOOK", "TRAINER_LOOK", "FLUSH"):
        monkeypatch.setattr(events, name, 1e-9)


# ---- sharing a worker


def naive_ends(work: Sequence[tuple[float, float]], step: float, row: float) -> list[float]:
    """Return when episodes (begin, tokens) end, by subtracting each one's tokens from event to event."""
    left, now, ends = [tokens for _, tokens in work], 0.0, [0.0] * len(work)
    waiting, running = set(range(len(work))), set[int]()
    while waiting or running:
        pace = step + len(running) * row
        next_end = min((now + left[i] * pace for i in running), default=np.inf)
        next_begin = min((work[i][0] for i in waiting), default=np.inf)
        time = min(next_end, next_begin)
        for i in running:
            left[i] -= (time - now) / pace
        now = time
        begun = {i for i in waiting if work[i][0] <= now}
        ended = {i for i in running if left[i] <= 1e-9}
        for i in ended:
            ends[i] = now
        waiting, running = waiting - begun, running - ended | begun
    return ends


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 100)), min_size=1, max_size=12),
    st.sampled_from([0.0, 0.5, 2.0]),
    st.sampled_from([0.25, 1.0]),
)
def test_episodes_share_a_worker_as_if_each_token_were_counted(work, step, row):
    sharing, ends = ProcessorSharing[int](step, row), [0.0] * len(work)
    order = sorted(range(len(work)), key=lambda i: work[i][0])
    now = 0.0
    while order or len(sharing):
        left = sharing.left()
        end = np.inf if left is None else now + left
        now = min(end, work[order[0]][0] if order else np.inf)
        sharing.settle(now)
        if end <= now:
            for i in sharing.pop_next():
                ends[i] = now
        while order and work[order[0]][0] <= now:
            i = order.pop(0)
            sharing.add(work[i][1], i)
    assert ends == pytest.approx(naive_ends(work, step, row), rel=1e-9)
    assert sharing.tokens == pytest.approx(sum(tokens for _, tokens in work))


def test_a_stopped_worker_decodes_nothing_and_goes_on_where_it_was():
    sharing = ProcessorSharing[str](1.0, 0.0)
    sharing.add(10, "a")
    sharing.settle(4.0)
    sharing.stopped = True
    sharing.settle(100.0)
    assert sharing.left() is None
    sharing.stopped = False
    assert sharing.left() == pytest.approx(6.0)
    sharing.remove(lambda item: item == "a")
    assert sharing.left() is None and sharing.busy == pytest.approx(4.0)


# ---- steps worked out by hand


def test_on_policy_a_step_is_the_sum_of_its_parts(at_once):
    work = workload(
        [100], TrainerCost(rate=80, overhead=7, publish=3, efficiency=1, kept=0.5), step_seconds=0.02, row_seconds=0.01,
        pause=2.0, load_seconds=5.0, record_seconds=0.5,
    )  # fmt: skip
    made = events.Simulation(config(), work, 1, ONE, 6).run()
    sampled, trained = 100 * (0.02 + 8 * 0.01) + 2.0 + 0.5, 7 + 8 * 50 / 80 + 3
    assert made.step_seconds == pytest.approx(5 + sampled + trained, rel=1e-6)
    assert made.workers_busy == pytest.approx(10 / (5 + sampled + trained), rel=1e-6)
    assert made.trainers_busy["main"] == pytest.approx(trained / (5 + sampled + trained), rel=1e-6)
    assert (made.staleness_worst, made.expired, made.cut) == (0, 0.0, 0.0)


def test_on_policy_the_slower_agent_is_waited_for(at_once):
    work = workload([100], TrainerCost(rate=1e9, overhead=2), TrainerCost(rate=1e9, overhead=11), step_seconds=0.1)
    made = events.Simulation(config(("main", "sub")), work, 1, {"main": 1, "sub": 1}, 6).run()
    assert made.step_seconds == pytest.approx(10 + 11, rel=1e-6)
    assert made.trainers_busy["main"] == pytest.approx(2 / 21, rel=1e-5)


@pytest.mark.parametrize("overhead", [3.0, 20.0])
def test_running_ahead_a_step_is_the_slower_of_sampling_and_training(at_once, overhead):
    """A worker drains before it loads new weights, so that the episodes of one step run at a time."""
    work = workload([100], TrainerCost(rate=1e9, overhead=overhead), step_seconds=0.1)
    made = events.Simulation(config(sampling={"max_staleness": 1, "timeout": 1e6}), work, 1, ONE, 40).run()
    assert made.step_seconds == pytest.approx(max(10.0, overhead), rel=1e-6)
    assert made.staleness_worst == 1


@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize("overhead", [3.0, 20.0])
def test_little_s_law_holds_for_steps_in_flight(at_once, overhead, ahead):
    """New weights come between turns and nothing slows anything, so that 1 + ahead steps are in flight at once."""
    work = workload([100], TrainerCost(rate=1e9, overhead=overhead), step_seconds=0.1)
    turns = config(sampling={"max_staleness": ahead, "switch": "turn", "timeout": 1e6})
    made = events.Simulation(turns, work, 1, ONE, 60).run()
    assert made.step_seconds == pytest.approx(max(overhead, (10 + overhead) / (1 + ahead)), rel=0.02)


def test_a_saturated_worker_decodes_at_its_peak(at_once):
    """All slots are always in use: the rate is that of all slots for any lengths of episodes."""
    work = workload([50, 100, 400], TrainerCost(rate=1e9), step_seconds=0.3, row_seconds=0.1)
    full = config(
        sampling={"max_staleness": 30, "switch": "turn", "timeout": 1e6},
        compute={"concurrency": 6, "max_tokens": 10**9},
    )
    made = events.Simulation(full, work, 1, ONE, 300).run()
    assert made.workers_busy == pytest.approx(1.0, abs=1e-6)
    assert 0.9 < made.workers_full < 1.1  # K begin at a time, so that sometimes 5 and sometimes 7 run
    assert made.rollouts_per_second == pytest.approx(made.workers_full * 6 / (0.9 * 550 / 3), rel=0.03)


def test_more_workers_than_queries_do_not_help(at_once):
    work = workload([100], TrainerCost(rate=1e9, overhead=5), step_seconds=0.01, row_seconds=0.01)
    few, many = (events.Simulation(config(), work, count, ONE, 6).run() for count in (4, 64))
    assert few.step_seconds == pytest.approx(5 + 100 * 0.03, rel=1e-6)
    assert many.step_seconds == pytest.approx(few.step_seconds, rel=1e-6)
    assert many.workers_busy == pytest.approx(few.workers_busy * 4 / 64, rel=1e-5)


def test_an_episode_is_cut_at_the_timeout(at_once):
    work = workload([1e12], TrainerCost(rate=1e9, overhead=5), step_seconds=0.01)
    made = events.Simulation(config(sampling={"timeout": 60.0}), work, 1, ONE, 4).run()
    assert made.step_seconds == pytest.approx(65, rel=1e-6)
    assert made.cut == 1.0


def test_an_episode_that_ended_before_the_timeout_is_not_cut(at_once, monkeypatch):
    """Half of the episodes end in time; they are recorded only when the last of their worker's has ended."""
    monkeypatch.setattr(events, "FLUSH", 1e9)
    work = workload([100, 1e12], TrainerCost(rate=1e9, overhead=5), step_seconds=0.01)
    made = events.Simulation(config(sampling={"timeout": 60.0}), work, 1, ONE, 100).run()
    assert made.cut == pytest.approx(0.5, abs=0.08)
    assert made.rollouts_per_second * made.step_seconds == pytest.approx(8)


def test_each_agent_s_weights_are_loaded(at_once):
    work = workload([100], *[TrainerCost(rate=1e9, overhead=2)] * 2, step_seconds=0.1, load_seconds=3.0)
    made = events.Simulation(config(("main", "sub")), work, 1, {"main": 1, "sub": 1}, 6).run()
    assert made.step_seconds == pytest.approx(10 + 2 + 2 * 3, rel=1e-6)


def test_a_group_that_is_too_stale_expires_and_another_is_sampled(at_once):
    """One in ten episodes takes far longer than a step: its group is too old when it is complete."""
    work = workload([10] * 9 + [2000], TrainerCost(rate=1e9, overhead=5), step_seconds=0.01)
    stale = config(sampling={"max_staleness": 1, "switch": "turn", "timeout": 1e6})
    made = events.Simulation(stale, work, 4, ONE, 100).run()
    assert made.expired > 0.05 and made.staleness_worst == 1
    patient = config(sampling={"max_staleness": 50, "switch": "turn", "timeout": 1e6})
    assert events.Simulation(patient, work, 4, ONE, 100).run().expired == 0


def test_groups_without_advantage_are_replaced_on_request(at_once):
    """Half of the groups are dropped, so that twice the queries are needed; the gate opens by one for each drop."""
    work = workload([100], TrainerCost(rate=1e9, overhead=5, zero_std=0.5), step_seconds=0.01)
    refill = config(sampling={"refill_zero_std": True, "timeout": 1e6})
    made = events.Simulation(refill, work, 1, ONE, 300).run()
    assert made.expired == pytest.approx(0.5, abs=0.05)
    assert made.step_seconds > 5 + 1


def test_processes_look_as_often_as_the_real_ones_do():
    assert (leader.LOOK, worker.LOOK, worker.FLUSH, worker.IDLE) == (
        events.TRAINER_LOOK, events.WORKER_LOOK, events.FLUSH, events.IDLE,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("now", "then"), [(0.0, 0.0), (0.01, 0.02), (0.02, 0.02), (0.05, 0.06), (0.25, 0.3), (0.31, 0.5), (9.0, 9.1)]
)
def test_an_idle_worker_looks_at_doubling_intervals(now, then):
    """After 0.02, 0.04, … seconds; from 0.3 on every 0.2 seconds."""
    assert events.next_look(0.0, now) == pytest.approx(then)
    assert events.next_look(5.0, 5.0 + now) == pytest.approx(5.0 + then)


def test_the_same_seed_gives_the_same_run_and_another_does_not():
    work = workload([10, 100, 1000], TrainerCost(rate=1e9, overhead=1), step_seconds=0.01)
    first, again, other = (events.Simulation(config(seed=seed), work, 2, ONE, 10).run() for seed in (1, 1, 2))
    assert first == again != other


# ---- the gate is the store's


class Gate:
    """The part of `Simulation` that decides how many queries may be opened."""

    def __init__(self, counts: Sequence[tuple[int, int]], ahead: int, batch: int) -> None:
        self.run = events.Simulation(
            config(("main", "sub"), queries_per_step=batch, sampling={"max_staleness": ahead}),
            workload([1], TrainerCost(rate=1), TrainerCost(rate=1), step_seconds=1.0), 1, {"main": 1, "sub": 1}, 1,
        )  # fmt: skip
        for trainer, (trained, dropped) in zip(self.run.trainers, counts, strict=True):
            trainer.trained, trainer.dropped = trained, dropped


@settings(max_examples=25)
@given(steps=st.tuples(st.integers(0, 3), st.integers(0, 3)), ahead=st.integers(0, 3), batch=st.integers(1, 4))
def test_the_gate_lets_in_as_many_queries_as_the_store(tmp_path_factory, steps, ahead, batch):
    store = Store(f"sqlite:///{tmp_path_factory.mktemp('gate')}/store.db", "run")
    store.roles.begin_run(["main", "sub"], 2, "print")
    for name, last in zip(("main", "sub"), steps, strict=True):
        store.roles.hold(f"trainer:{name}", "me", 1000)
        for step in range(last + 1):
            file = {"file": "w", "checksum": "c", "size": 1}
            store.roles.publish(Publication(agent=name, step=step, version=step, trained=step * batch, **file), "me")
    leases = store.queries.take("w", 1000, ahead=(ahead + 1) * batch, total=10**6, task_of=str, lease=1000)
    gate = Gate([(last * batch, 0) for last in steps], ahead, batch)
    assert gate.run._room() == len(leases)
    store.close()


# ---- what a trainer takes


def test_micro_batches_are_dealt_out_whole():
    trainer = TrainerCost(rate=10, overhead=1, publish=99, efficiency=1)
    assert trainer.seconds(1000, 1, 100) == pytest.approx(1 + 100)
    assert trainer.seconds(1000, 5, 100) == pytest.approx(1 + 20)
    assert trainer.seconds(1000, 6, 100) == pytest.approx(1 + 20)  # two rounds, as with five
    assert trainer.seconds(1000, 10, 100) == trainer.seconds(1000, 1000, 100) == pytest.approx(1 + 10)
    assert trainer.seconds(0, 4, 100) == pytest.approx(1)


def test_each_doubling_costs_its_share():
    trainer = TrainerCost(rate=10, efficiency=0.9)
    assert trainer.seconds(800, 8, 100) == pytest.approx(800 / 10 / 8 / 0.9**3)


# ---- workloads


@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_a_given_distribution_keeps_its_mean(sigma):
    drawn = Skewed(mean=40, sigma=sigma).draw(np.random.default_rng(0), 400_000)
    assert drawn.mean() == pytest.approx(40, rel=0.02)
    assert np.log(drawn).std() == pytest.approx(sigma, abs=0.01)


TOML = """
[worker]
step_seconds = 0.01
row_seconds = 0.001
load_seconds = 2.0
[pause]
mean = 1.0
[agents.main]
actions = { mean = 100, sigma = 0.5 }
context = 50
rate = 5000
overhead = 2.0
[agents.sub]
calls = { mean = 2.5, sigma = 1.0 }
actions = { mean = 40 }
rate = 5000
publish = 1.0
"""


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    (tmp_path / "workload.toml").write_text(TOML)
    return tmp_path / "workload.toml"


def test_a_workload_file_is_what_it_says(toml):
    made = read_workload(toml, config(("main", "sub")))
    assert made.episodes.actions_N.mean() == pytest.approx(100 + 2.5 * 40, rel=0.02)
    assert made.episodes.rows_AN.mean(1) == pytest.approx([150, 100], rel=0.02)
    assert made.trainers == {"main": TrainerCost(rate=5000, overhead=2.0), "sub": TrainerCost(rate=5000, publish=1.0)}
    assert made.worker == WorkerCost(step_seconds=0.01, row_seconds=0.001, load_seconds=2.0)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rate = 5000\noverhead", "rate = 0\noverhead", "agents"),
        ("[agents.sub]", "[agents.other]", r"agents: \['main', 'other'\] given: expected \['main', 'sub'\]"),
        ("context", "contxt", "contxt"),
        ("step_seconds = 0.01\nrow_seconds = 0.001", "step_seconds = 0\nrow_seconds = 0", "0 given for both"),
        ("[worker]", "[worker", "workload.toml"),
    ],
)
def test_a_wrong_workload_is_refused_by_name(toml, old, new, message):
    toml.write_text(TOML.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_workload(toml, config(("main", "sub")))


def test_episodes_of_a_query_are_drawn_from_one_query():
    edges = [0, 3, 4, 9]
    table = EpisodeCost(np.repeat([10.0, 20.0, 30.0], [3, 1, 5]), np.zeros(9), np.arange(9.0)[None], edges)
    random, seen = np.random.default_rng(0), set()
    for _ in range(60):
        actions, _, rows = table.draw(random, 8)
        assert len(set(actions)) == 1 and {np.searchsorted(edges, row, "right") for row in rows[0]} == {actions[0] / 10}
        seen.add(actions[0])
    assert seen == {10.0, 20.0, 30.0}


# ---- measured from a run


def columns(groups: Sequence[tuple[int, float, float]], worker: str = "w") -> fit.Columns:
    """Make columns of lots of (episodes, tokens, seconds) that ran one after the other; each lot is one query."""
    begins = np.cumsum([0.0, *(seconds + 1 for _, _, seconds in groups)])
    sizes = [count for count, _, _ in groups]
    return {
        "query": np.repeat(np.arange(len(groups)), sizes),
        "worker": np.repeat(worker, sum(sizes)),
        "begin": np.repeat(begins[:-1], sizes),
        "actions": np.repeat([tokens for _, tokens, _ in groups], sizes).astype(float),
        "seconds": np.repeat([seconds for _, _, seconds in groups], sizes).astype(float),
    }


def test_a_worker_s_rates_and_the_pauses_are_recovered():
    lots = [(n, k, 3.0 + k * (0.2 + n * 0.05)) for n, k in [(1, 100), (2, 300), (8, 50), (8, 400), (5, 10), (3, 0)]]
    (step, row), pause_N = fit._rates(columns(lots), np.zeros(27, int))
    assert (step, row) == pytest.approx((0.2, 0.05))
    assert pause_N == pytest.approx(3.0)


def test_a_slower_hour_of_the_machine_is_no_straggler():
    """The same episodes run at half the speed in every other step."""
    lots = [(n, k, (1 + i % 2) * (k * (0.2 + n * 0.05))) for i in range(8) for n, k in [(1, 100), (4, 300), (8, 50)]]
    ended = columns(lots)
    (step, row), pause_N = fit._rates(ended, ended["query"] // 3)
    fitted_N = ended["actions"] * (step + fit._beside(ended) * row)
    assert fitted_N[:13] == pytest.approx(1.5 * ended["seconds"][:13], rel=1e-6)
    assert pause_N.max() == pytest.approx(0, abs=1e-6)


def test_if_the_same_number_of_episodes_always_ran_the_rows_get_all_the_time():
    (step, row), _ = fit._rates(columns([(4, 100, 40.0), (4, 300, 120.0)]), np.zeros(8, int))
    assert (step, row) == pytest.approx((0.0, 0.1))


@settings(max_examples=50)
@given(st.integers(0, 10**6))
def test_least_squares_is_the_best_without_negative_parts(seed):
    """No point of a fine grid around it is better."""
    random = np.random.default_rng(seed)
    given_NC, wanted_N = random.normal(size=(12, 3)), random.normal(size=12)
    best = np.array(fit.least_squares(given_NC, wanted_N))
    assert (best >= 0).all()
    error = ((given_NC @ best - wanted_N) ** 2).sum()
    for other in np.maximum(best + random.normal(size=(200, 3)) * 10.0 ** -random.integers(0, 5, (200, 1)), 0):
        assert ((given_NC @ other - wanted_N) ** 2).sum() >= error - 1e-9


STEPS, Q, K = 4, 2, 2


@pytest.fixture
def finished(tmp_path: Path) -> Config:
    """Write the directory of a run of 4 steps of 2 x 2 episodes with one call of a sub-agent each."""
    made = config(("main", "sub"), run_dir=str(tmp_path), topology="local", steps=STEPS, queries_per_step=Q)
    store = Store(f"sqlite:///{tmp_path}/store.db", "local")
    store.roles.begin_run(["main", "sub"], K, "print")
    for name in made.agents:
        store.roles.hold(f"trainer:{name}", "me", 1000)
        store.roles.publish(Publication(agent=name, step=0, version=0, trained=0, file="w", checksum="c", size=1), "me")
    leases = store.queries.take("w", 100, ahead=100, total=STEPS * Q, task_of=str, lease=1000)
    for lease in leases:
        for k in range(K):
            store.queries.record(
                [RolloutRecord(lease.query, k, "scored", True, 1.0, 6.0)],
                [call(name, lease.query, k, actions) for name, actions in (("main", 40), ("sub", 20))],
            )
    store.close()
    for name in made.agents:
        rows = [trainer_row(step, 100.0 * (step + 1)) for step in range(STEPS)]
        write_rows(tmp_path / "agents" / name, rows)
    write_rows(tmp_path / "workers" / "w", [worker_row(step) for step in range(STEPS)])
    (tmp_path / "config.json").write_text(dump_config(made))
    return made


def call(agent: str, query: int, rollout: int, actions: int) -> CallRecord:
    place, expert = Position(f"{agent}.arrow", 0, 0), None if agent == "main" else 0.5
    facts = (0, 3 * actions, actions, 1, False, "answer", place, 0, 0, 2 * actions, "ab", "cd")
    return CallRecord(agent, query, rollout, 0, True, expert, *facts)


def trainer_row(step: int, tokens: float) -> dict[str, Any]:
    """Make a row of 0.5 s and 0.01 s per token in the passes, 0.25 s around them and 2 s to publish."""
    passes = 0.5 + 0.01 * tokens
    times = {"time/forward_backward": passes, "time/publish": 2.0, "time/waiting": 7.0, "time/step": passes + 9.25}
    return {"stage": "rl", "step": step, "tokens_trained": tokens, "zero_std": 0.25} | times


def worker_row(step: int) -> dict[str, Any]:
    """Make a row of 10 s."""
    counts = {"rollouts/scored": Q * K, "rollouts/unscored": 0, "rollouts/failed": 0}
    times = {"perf/rollouts_per_second": Q * K / 10, "time/waiting": 3.0, "time/weights": 0.8}
    return {"stage": "rl", "step": step, "main/version": step, "sub/version": step} | counts | times


def write_rows(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_is_measured_from_its_store_and_metrics(finished):
    """Its first step is left out."""
    made = fit.measure(finished)
    assert made.episodes.actions_N.tolist() == [60.0] * 12
    assert made.episodes.rows_AN.tolist() == [[80.0] * 12, [40.0] * 12]
    assert made.episodes.edges == [0, 2, 4, 6, 8, 10, 12]
    assert made.worker.row_seconds == pytest.approx(6.0 / 60 / 12) and made.worker.step_seconds == 0
    assert made.worker.load_seconds == pytest.approx(0.4)
    assert made.worker.record_seconds == pytest.approx(3 * 6.2 - 6.0)  # all episodes ran at once: one lot
    for name, rows in (("main", 80), ("sub", 40)):
        trainer = made.trainers[name]
        assert trainer.rate == pytest.approx(100) and trainer.overhead == pytest.approx(0.75)
        assert (trainer.publish, trainer.zero_std) == (2.0, 0.25)
        assert trainer.kept == pytest.approx((200 + 300 + 400) / (3 * Q * K * rows))


def test_the_rate_is_that_of_one_of_the_ranks(finished):
    agents = {name: msgspec.structs.replace(agent, ranks=4) for name, agent in finished.agents.items()}
    made = fit.measure(msgspec.structs.replace(finished, agents=agents))
    assert made.trainers["main"].rate == pytest.approx(25)


def test_a_measured_workload_can_be_simulated(finished):
    made = fit.measure(finished)
    step = events.Simulation(finished, made, 1, {"main": 1, "sub": 1}, 6).run().step_seconds
    trained = 0.75 + 2.0 + 3.0  # main's 300 tokens on average
    sampled = 60 * 4 * made.worker.row_seconds + made.worker.record_seconds + 2 * 0.4
    assert sampled + trained < step < sampled + trained + 1.2  # the rest is looking into the store


def test_a_directory_without_a_finished_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a decoupled run that has taken two rl steps"):
        fit.measure(config(run_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="expected a TOML file, or the directory of a run"):
        simulate.load(config(), tmp_path)


# ---- the best split, the bottleneck, the command


@pytest.mark.parametrize(
    ("changes", "bottleneck"),
    [
        ({"step_seconds": 1.0}, "sampling"),
        ({"pause": 500.0}, "pauses"),
        ({"load_seconds": 500.0}, "weights"),
        ({"slow": 500.0}, "training sub"),
    ],
)
def test_the_largest_part_of_a_step_is_the_bottleneck(changes, bottleneck):
    slow = changes.pop("slow", 1.0)
    work = workload(
        [100], TrainerCost(rate=1e6), TrainerCost(rate=1e6, overhead=slow), **{"step_seconds": 0.01} | changes
    )
    plan = simulate.best_plan(config(("main", "sub")), work, 8, 4)
    assert plan.bottleneck == bottleneck
    assert max(plan.saved.values()) == pytest.approx(0.5, abs=0.05)


def test_stragglers_are_named_when_a_step_waits_for_them():
    work = workload([10] * 15 + [5000], TrainerCost(rate=1e6), step_seconds=0.01)
    plan = simulate.best_plan(config(queries_per_step=16), work, 8, 10)
    assert plan.bottleneck == "stragglers"


def test_gpus_go_where_the_work_is():
    """First all the time is sampling, then all is training.

    There are few slots, because otherwise the first worker to look takes more than its share.
    """
    light, heavy = TrainerCost(rate=1e9, efficiency=1), TrainerCost(rate=10, efficiency=1)
    batch = config(queries_per_step=56, compute={"max_tokens": 100, "concurrency": 8})
    sampling = simulate.best_plan(batch, workload([100], light, row_seconds=0.04), 16, 4)
    training = simulate.best_plan(batch, workload([100], heavy, row_seconds=1e-6), 16, 4)
    assert sampling.split.workers >= 12 and training.split.workers <= 4
    for plan in (sampling, training):
        assert plan.split.workers + sum(plan.split.trainers.values()) == 16


@settings(max_examples=100)
@given(st.integers(3, 300), st.floats(0.05, 0.95), st.integers(1, 4), st.floats(1, 1e6))
def test_a_split_deals_out_every_gpu(gpus, share, size, rate):
    work = workload([100], TrainerCost(rate=rate), TrainerCost(rate=1000), step_seconds=1.0)
    work = replace(work, worker=msgspec.structs.replace(work.worker, gpus=size))
    for split in simulate.splits_of(config(("main", "sub")), work, gpus, share):
        assert split.workers * size + sum(split.trainers.values()) == gpus
        assert split.workers >= 1 and min(split.trainers.values()) >= 1


@pytest.mark.parametrize(
    ("text", "counts"), [("64..512", [64, 128, 256, 512]), ("3..20", [3, 6, 12]), ("8,12", [8, 12]), ("7..7", [7])]
)
def test_numbers_of_gpus_are_read(text, counts):
    assert simulate.read_counts(text) == counts


@pytest.mark.parametrize("text", ["", "x", "1..", "64..2", "0..8", "1,4", "-4..8", "4..x"])
def test_other_numbers_are_refused(text):
    with pytest.raises(ValueError, match="--gpus"):
        simulate.read_counts(text)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    lines = ['run_dir = "run"', "queries_per_step = 4", '[environment]\nuse = "a:b"']
    lines += [f'[agents.{name}]\nmodel = "m"' for name in ("main", "sub")]
    (tmp_path / "run.toml").write_text("\n".join(lines))
    return tmp_path / "run.toml"


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["mgrpo", "simulate", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_the_command_prints_a_table_and_json_and_draws(monkeypatch, capsys, file, toml, tmp_path):
    figure = tmp_path / "out.png"
    given = ["--gpus", "4..8", "--workload", toml, "--steps", 5, "--figure", figure]
    assert command(monkeypatch, file, *given, "--set", "sampling.max_staleness=1") == 0
    head, *lines, drawn, last = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["GPUs", "workers", "main", "sub"] and len(lines) == 2
    assert drawn == f"figure: {figure}" and figure.read_bytes()[:4] == b"\x89PNG"
    plans = json.loads(last)
    assert [plan["gpus"] for plan in plans] == [4, 8]
    for plan, line in zip(plans, lines, strict=True):
        assert line.split()[4] == f"{plan['step_seconds']:.4g}" and plan["bottleneck"] in line
        assert plan["staleness_worst"] <= 1 and 0 < plan["busy"] <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "2"], "--gpus: 2 given: expected 3 or more"),
        (["--gpus", "8", "--steps", "0"], "--steps: 0 given"),
        (["--gpus", "8", "--workload", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_reported_in_one_line(monkeypatch, capsys, file, toml, arguments, message):
    given = arguments if "--workload" in arguments else [*arguments, "--workload", toml]
    assert command(monkeypatch, file, *given) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
