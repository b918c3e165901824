"""The simulated run against cases worked out by hand, limits of queueing, a naive model, and the real gate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo.engine import events, office, parts, worker
from mgrpo.engine.config import Config, parse_config
from mgrpo.engine.sharing import Sharing
from mgrpo.engine.store import Publication, Store
from mgrpo.engine.workload import Episodes, Skewed, Trainer, Worker, Workload, read_workload

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


def workload(actions: Sequence[float], *trainers: Trainer, pause: float = 0.0, **rates: float) -> Workload:
    """Every query's episodes are drawn from `actions`; each agent trains on 100 tokens of each."""
    of = np.array(actions, np.float64)
    episodes = Episodes(of, np.full(len(of), pause), np.full((len(trainers), len(of)), 100.0), [0, len(of)])
    names = ["main", "sub"][: len(trainers)]
    return Workload(episodes, Worker(**{"step_seconds": 0.0, "row_seconds": 0.0} | rates), dict(zip(names, trainers)))


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everyone looks into the store all the time: what is left is the work."""
    monkeypatch.setattr(parts, "IDLE", (1e-9, 1e-9))
    for name in ("WORKER_LOOK", "TRAINER_LOOK", "FLUSH"):
        monkeypatch.setattr(events, name, 1e-9)


# ---- sharing a worker


def naive_ends(work: Sequence[tuple[float, float]], step: float, row: float) -> list[float]:
    """When episodes (begin, tokens) end: from event to event, each one's tokens taken off by hand."""
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
    sharing, ends = Sharing[int](step, row), [0.0] * len(work)
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
    sharing = Sharing[str](1.0, 0.0)
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
        [100], Trainer(rate=80, overhead=7, publish=3, efficiency=1), step_seconds=0.02, row_seconds=0.01, pause=2.0,
        load_seconds=5.0, record_seconds=0.5,
    )  # fmt: skip
    made = events.Run(config(), work, 1, ONE, 6).run()
    sampled, trained = 100 * (0.02 + 8 * 0.01) + 2.0 + 0.5, 7 + 8 * 100 / 80 + 3
    assert made.step_seconds == pytest.approx(5 + sampled + trained, rel=1e-6)
    assert made.workers_busy == pytest.approx(10 / (5 + sampled + trained), rel=1e-6)
    assert made.trainers_busy["main"] == pytest.approx(trained / (5 + sampled + trained), rel=1e-6)
    assert (made.staleness_worst, made.expired, made.cut) == (0, 0.0, 0.0)


def test_on_policy_the_slower_agent_is_waited_for(at_once):
    work = workload([100], Trainer(rate=1e9, overhead=2), Trainer(rate=1e9, overhead=11), step_seconds=0.1)
    made = events.Run(config(("main", "sub")), work, 1, {"main": 1, "sub": 1}, 6).run()
    assert made.step_seconds == pytest.approx(10 + 11, rel=1e-6)
    assert made.trainers_busy["main"] == pytest.approx(2 / 21, rel=1e-5)


@pytest.mark.parametrize("overhead", [3.0, 20.0])
@pytest.mark.parametrize("switch", ["episode", "turn"])
def test_running_ahead_a_step_is_the_slower_of_sampling_and_training(at_once, overhead, switch):
    """The trainer, or the worker with all that it may sample at once: twice 8 episodes, 0.2 s a token."""
    work = workload([100], Trainer(rate=1e9, overhead=overhead), step_seconds=0.1)
    ahead = config(sampling={"max_staleness": 1, "switch": switch, "timeout": 1e6})
    made = events.Run(ahead, work, 1, ONE, 40).run()
    assert made.step_seconds == pytest.approx(max(10.0, overhead), rel=1e-6)
    assert made.staleness_worst == 1


def test_a_saturated_worker_decodes_at_its_peak(at_once):
    """Slots are always taken: the rate is that of all slots, whatever the episodes' lengths."""
    work = workload([50, 100, 400], Trainer(rate=1e9), step_seconds=0.3, row_seconds=0.1)
    full = config(
        sampling={"max_staleness": 30, "switch": "turn", "timeout": 1e6},
        compute={"concurrency": 6, "max_tokens": 10**9},
    )
    made = events.Run(full, work, 1, ONE, 300).run()
    assert made.workers_busy == pytest.approx(1.0, abs=1e-6)
    assert 0.9 < made.workers_full < 1.1  # K at a time come: now 5, now 7
    assert made.rollouts_per_second == pytest.approx(made.workers_full * 6 / (0.9 * 550 / 3), rel=0.03)


def test_more_workers_than_queries_are_of_no_use(at_once):
    work = workload([100], Trainer(rate=1e9, overhead=5), step_seconds=0.01, row_seconds=0.01)
    few, many = (events.Run(config(), work, count, ONE, 6).run() for count in (4, 64))
    assert few.step_seconds == pytest.approx(5 + 100 * 0.03, rel=1e-6)
    assert many.step_seconds == pytest.approx(few.step_seconds, rel=1e-6)
    assert many.workers_busy == pytest.approx(few.workers_busy * 4 / 64, rel=1e-5)


def test_an_episode_is_cut_at_the_timeout(at_once):
    work = workload([1e12], Trainer(rate=1e9, overhead=5), step_seconds=0.01)
    made = events.Run(config(sampling={"timeout": 60.0}), work, 1, ONE, 4).run()
    assert made.step_seconds == pytest.approx(65, rel=1e-6)
    assert made.cut == 1.0


def test_what_is_too_stale_expires_and_is_sampled_anew(at_once):
    """One in ten episodes takes far longer than a step: its group is too old when it is whole."""
    work = workload([10] * 9 + [2000], Trainer(rate=1e9, overhead=5), step_seconds=0.01)
    stale = config(sampling={"max_staleness": 1, "switch": "turn", "timeout": 1e6})
    made = events.Run(stale, work, 4, ONE, 100).run()
    assert made.expired > 0.05 and made.staleness_worst == 1
    patient = config(sampling={"max_staleness": 50, "switch": "turn", "timeout": 1e6})
    assert events.Run(patient, work, 4, ONE, 100).run().expired == 0


def test_groups_without_advantage_are_replaced_on_request(at_once):
    """Half of them: twice the queries. They come in turns, as the gate opens by one for each that is dropped."""
    work = workload([100], Trainer(rate=1e9, overhead=5, zero_std=0.5), step_seconds=0.01)
    refill = config(sampling={"refill_zero_std": True, "timeout": 1e6})
    made = events.Run(refill, work, 1, ONE, 300).run()
    assert made.expired == pytest.approx(0.5, abs=0.05)
    assert made.step_seconds > 5 + 1


def test_processes_look_as_often_as_the_real_ones_do():
    assert (office.LOOK, worker.LOOK, worker.FLUSH, worker.IDLE) == (
        parts.TRAINER_LOOK, parts.WORKER_LOOK, parts.FLUSH, parts.IDLE,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("now", "then"), [(0.0, 0.0), (0.01, 0.02), (0.02, 0.02), (0.05, 0.06), (1.2, 1.26), (1.3, 2.26), (9.0, 9.26)]
)
def test_an_idle_worker_looks_at_doubling_intervals(now, then):
    """After 0.02, 0.04, … seconds; from 1.26 on every second."""
    assert parts.next_look(0.0, now) == pytest.approx(then)
    assert parts.next_look(5.0, 5.0 + now) == pytest.approx(5.0 + then)


def test_the_same_seed_gives_the_same_run_and_another_does_not():
    work = workload([10, 100, 1000], Trainer(rate=1e9, overhead=1), step_seconds=0.01)
    first, again, other = (events.Run(config(seed=seed), work, 2, ONE, 10).run() for seed in (1, 1, 2))
    assert first == again != other


# ---- the gate is the store's


class Gate:
    """The part of `Run` that decides how many queries may be opened."""

    def __init__(self, counts: Sequence[tuple[int, int]], ahead: int, batch: int) -> None:
        self.run = events.Run(
            config(("main", "sub"), queries_per_step=batch, sampling={"max_staleness": ahead}),
            workload([1], Trainer(rate=1), Trainer(rate=1), step_seconds=1.0), 1, {"main": 1, "sub": 1}, 1,
        )  # fmt: skip
        for trainer, (trained, dropped) in zip(self.run.trainers, counts, strict=True):
            trainer.trained, trainer.dropped = trained, dropped


@settings(max_examples=25, deadline=None)
@given(steps=st.tuples(st.integers(0, 3), st.integers(0, 3)), ahead=st.integers(0, 3), batch=st.integers(1, 4))
def test_the_gate_lets_in_as_many_queries_as_the_store(tmp_path_factory, steps, ahead, batch):
    store = Store(f"sqlite:///{tmp_path_factory.mktemp('gate')}/store.db", "run")
    store.begin_run(["main", "sub"], 2, "print")
    for name, last in zip(("main", "sub"), steps, strict=True):
        store.hold(f"trainer:{name}", "me", 1000)
        for step in range(last + 1):
            file = {"file": "w", "checksum": "c", "size": 1}
            store.publish(Publication(agent=name, step=step, version=step, trained=step * batch, **file), "me")
    leases = store.take("w", 1000, ahead=(ahead + 1) * batch, total=10**6, task_of=str, lease=1000)
    gate = Gate([(last * batch, 0) for last in steps], ahead, batch)
    assert gate.run._room() == len(leases)
    store.close()


# ---- what a trainer takes


def test_micro_batches_are_dealt_out_whole():
    trainer = Trainer(rate=10, overhead=1, publish=99, efficiency=1)
    assert trainer.seconds(1000, 1, 100) == pytest.approx(1 + 100)
    assert trainer.seconds(1000, 5, 100) == pytest.approx(1 + 20)
    assert trainer.seconds(1000, 6, 100) == pytest.approx(1 + 20)  # two rounds, as with five
    assert trainer.seconds(1000, 10, 100) == trainer.seconds(1000, 1000, 100) == pytest.approx(1 + 10)
    assert trainer.seconds(0, 4, 100) == pytest.approx(1)


def test_each_doubling_costs_its_share():
    trainer = Trainer(rate=10, efficiency=0.9)
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
    assert made.trainers == {"main": Trainer(rate=5000, overhead=2.0), "sub": Trainer(rate=5000, publish=1.0)}
    assert made.worker == Worker(step_seconds=0.01, row_seconds=0.001, load_seconds=2.0)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rate = 5000\noverhead", "rate = 0\noverhead", "agents"),
        ("[agents.sub]", "[agents.other]", r"agents: \['main', 'other'\] given: expected \['main', 'sub'\]"),
        ("context", "contxt", "contxt"),
        ("step_seconds = 0.01\nrow_seconds = 0.001", "step_seconds = 0\nrow_seconds = 0", "both 0"),
        ("[worker]", "[worker", "workload.toml"),
    ],
)
def test_a_wrong_workload_is_refused_by_name(toml, old, new, message):
    toml.write_text(TOML.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_workload(toml, config(("main", "sub")))


def test_episodes_of_a_query_are_drawn_from_one_query():
    edges = [0, 3, 4, 9]
    table = Episodes(np.repeat([10.0, 20.0, 30.0], [3, 1, 5]), np.zeros(9), np.arange(9.0)[None], edges)
    random, seen = np.random.default_rng(0), set()
    for _ in range(60):
        actions, _, rows = table.draw(random, 8)
        assert len(set(actions)) == 1 and {np.searchsorted(edges, row, "right") for row in rows[0]} == {actions[0] / 10}
        seen.add(actions[0])
    assert seen == {10.0, 20.0, 30.0}
