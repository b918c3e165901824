"""Test that the store neither loses nor repeats a sample and seals whole groups, despite retries, kills and races."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cases.store import AGENTS, call, episode
from mgrpo.engine.run.trajectories import Position
from mgrpo.engine.store import STATES, CallRecord, RolloutRecord, Store
from postgres import Connect


def finish(store: Store, query: int, rollouts: int = 2) -> None:
    for rollout in range(rollouts):
        store.queries.record(*episode(query, rollout))


def states(store: Store, agent: str = "main") -> dict[str, int]:
    return {state: n for state, n in store.audit.status()["agents"].get(agent, {}).items() if n}


@pytest.fixture
def store(connect: Connect) -> Store:
    return connect()


def test_a_group_is_sealed_by_its_last_rollout_and_comes_back_whole(store):
    store.queries.open([(7, "task-é'\""), (8, "t")], AGENTS, rollouts=3, step=5)
    r0, c0 = episode(7, 0, subs=3)
    r2, c2 = [RolloutRecord(7, 2, "unscored", False, 0.0, 0.5, "judge timed out")], [call(7, 2)]
    failed = [RolloutRecord(7, 1, "failed", False, 0.0, 0.1, "no sampler")]
    store.queries.record(r2, c2)
    store.queries.record(r0, c0[::-1])
    assert store.audit.status()["agents"] == {
        a: {"open": 2, "sealed": 0, "leased": 0, "acked": 0, "expired": 0} for a in AGENTS
    }
    assert store.groups.claim("main", 10, "me").groups == []
    store.queries.record(failed, [])
    assert states(store) == states(store, "search") == {"open": 1, "sealed": 1}
    (group,) = store.groups.claim("search", 10, "me").groups
    assert (group.query, group.task, group.step) == (7, "task-é'\"", 5)
    assert group.rollouts == [*r0, *failed, *r2]
    assert group.calls == c0[1:]  # this agent's only, by rollout and call
    assert store.groups.claim("main", 10, "me").groups[0].calls == [c0[0], *c2]
    assert store.groups.rollouts_of(7) == [*r0, *failed, *r2]
    assert store.groups.calls_of(7) == [c0[0], *c2, *c0[1:]]
    assert store.groups.rollouts_of(8) == store.groups.calls_of(99) == []


def test_a_retried_write_is_no_second_sample(store):
    store.queries.open([(0, "t")], AGENTS, rollouts=2, step=0)
    first = episode(0, 0, subs=1)
    store.queries.record(*first)
    store.queries.record(*first)
    store.queries.record(
        *episode(0, 0, subs=4, version=9)
    )  # sampled again: nothing of it is taken, not even the calls 1, 2, 3
    assert store.groups.rollouts_of(0) == first[0] and store.groups.calls_of(0) == first[1]
    assert states(store) == {"open": 1}
    second = episode(0, 1)
    both = first[0] + second[0], first[1] + second[1]
    store.queries.record(*both)
    assert states(store) == {"sealed": 1}
    assert [g.query for g in store.groups.claim("main", 5, "me").groups] == [0]
    store.queries.record(*both)  # a late retry does not seal it again
    store.queries.open([(0, "t")], AGENTS, rollouts=2, step=0)
    assert states(store) == {"leased": 1} and store.groups.claim("main", 5, "me").groups == []
    assert len(store.groups.calls_of(0)) == 2 + 1 + 2


def test_a_failed_record_leaves_nothing(store):
    store.queries.open([(0, "t")], ["main"], rollouts=1, step=0)
    with pytest.raises(ValueError, match="query 0 was not opened for agent 'search'"):
        store.queries.record(*episode(0, 0))
    with pytest.raises(ValueError, match="query 1 of run 'run' was not opened"):
        store.queries.record([*episode(0, 0)[0], *episode(1, 0)[0]], [])
    for number in (-1, 1):
        with pytest.raises(AssertionError, match="query 0 has 1 rollouts"):
            store.queries.record([RolloutRecord(0, number, "scored", True, 1.0, 1.0)], [])
    with pytest.raises(AssertionError):
        store.queries.record([], [call(0, 0)])  # calls are taken only with their rollout
    assert store.groups.rollouts_of(0) == store.groups.calls_of(0) == [] and states(store) == {"open": 1}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="correct of query 4, rollout 2: expected a finite number"):
        RolloutRecord(4, 2, "scored", True, bad, 1.0)
    with pytest.raises(ValueError, match="expert of search, query 4, rollout 2"):
        CallRecord("search", 4, 2, 0, True, bad, 0, 1, 1, 1, False, "answer", Position("x", 0, 0))


@given(st.text(max_size=20))
@settings(max_examples=20)
def test_any_error_text_can_be_recorded(error):
    with tempfile.TemporaryDirectory() as folder:
        store = Store(f"sqlite:///{folder}/s.db", "run")
        store.queries.open([(0, "t")], ["main"], 1, 0)
        store.queries.record([RolloutRecord(0, 0, "failed", False, 0.0, 0.0, error + "\ud800\0")], [])
        assert store.groups.rollouts_of(0)[0].error == error.replace("\0", "?") + "??"
        store.close()


def test_claims_take_the_oldest_queries_first_and_each_once(store):
    queries = random.Random(0).sample(range(1000), 30)
    store.queries.open([(q, str(2000 - q)) for q in queries], AGENTS, 2, 0)
    for query in queries:
        finish(store, query)
    taken = [[g.query for g in store.groups.claim("main", limit, "me").groups] for limit in (7, 0, 20, 7, 7)]
    assert [len(queries) for queries in taken] == [7, 0, 20, 3, 0]
    assert [*taken[0], *taken[2], *taken[3]] == sorted(queries)
    assert [g.query for g in store.groups.claim("search", 30, "me").groups] == sorted(
        queries
    )  # each agent claims for itself


def test_ack_is_idempotent_and_all_or_nothing(store):
    store.queries.open([(q, "t") for q in range(4)], AGENTS, 2, 0)
    for query in range(3):
        finish(store, query)
    store.groups.claim("main", 2, "me")
    for queries, query, state in (([0, 2], 2, "sealed"), ([3, 1], 3, "open"), ([0, 1, 99], 99, "missing")):
        with pytest.raises(ValueError, match=f"query {query} of agent 'main' to be leased, it is {state}"):
            store.groups.ack("main", queries)
    assert states(store) == {"open": 1, "sealed": 1, "leased": 2}
    for _ in range(2):
        store.groups.ack("main", [0, 1, 1])
    store.groups.ack("main", [])
    assert states(store) == {"open": 1, "sealed": 1, "acked": 2}
    assert states(store, "search") == {"open": 1, "sealed": 3}


def test_reclaim_acks_what_the_checkpoint_trained_and_deletes_what_it_lacks(store):
    for step in range(4):
        store.queries.open([(10 * step + n, "t") for n in range(3)], AGENTS, 2, step)
    for query in (20, 0, 1, 2, 10, 11, 21, 30):
        finish(store, query)
        if query == 20:
            assert [len(store.groups.claim(agent, 1, "me").groups) for agent in AGENTS] == [1, 1]
    store.queries.record(*episode(12, 0))  # of step 1, half done
    for agent in AGENTS:
        store.groups.claim(agent, 4, "me")  # 0, 1, 2, 10
        store.groups.ack(agent, [0, 1])
        store.groups.ack(agent, [20])  # acked after the checkpoint that is now lost
    store.groups.claim("main", 1, "me")  # 11 by one agent only
    assert store.groups.reclaim(2) == 1 + 6  # query 12, and all of steps 2 and 3
    assert store.audit.status()["agents"] == {
        a: {"open": 0, "sealed": 0, "leased": 0, "acked": 5, "expired": 0} for a in AGENTS
    }
    for query in (12, 20, 21, 30):
        assert store.groups.rollouts_of(query) == store.groups.calls_of(query) == []
    assert [len(store.groups.calls_of(q)) for q in (0, 1, 2, 10, 11)] == [6] * 5
    with pytest.raises(ValueError, match="query 20 of run 'run' was not opened"):
        store.queries.record(*episode(20, 0))  # the write of a late worker does not bring it back
    assert store.groups.reclaim(2) == 0
    store.queries.open([(20, "t")], AGENTS, 2, 2)
    finish(store, 20)
    assert [g.query for g in store.groups.claim("main", 9, "me").groups] == [20]


def test_reclaim_keeps_groups_that_were_discarded(store):
    store.queries.open([(query, "t") for query in range(2)], AGENTS, 2, 0)
    for query in range(2):
        finish(store, query)
    for agent in AGENTS:
        store.groups.claim(agent, 2, "me")
        store.groups.discard(agent, [0], "me")
    store.groups.ack("main", [1])
    assert store.groups.reclaim(1) == 0
    expected = {"open": 0, "sealed": 0, "leased": 0, "acked": 1, "expired": 1}
    assert store.audit.status()["agents"] == dict.fromkeys(AGENTS, expected)


def test_runs_do_not_see_each_other(connect):
    one, other = connect("one"), connect("other")
    assert one.audit.runs() == []
    for store in (one, other):
        store.queries.open([(0, "t")], AGENTS, 2, 0)
    finish(one, 0)
    assert states(one) == {"sealed": 1} and states(other) == {"open": 1}
    assert other.groups.claim("main", 1, "me").groups == [] and other.groups.rollouts_of(0) == []
    assert other.groups.reclaim(0) == 1 and other.audit.status()["agents"] == {}
    assert states(one) == {"sealed": 1} and len(one.groups.calls_of(0)) == 6
    assert len(one.groups.claim("main", 1, "me").groups) == 1
    assert one.audit.runs() == ["one"]


def test_everything_survives_reopening_and_the_database_is_durable(tmp_path):
    url = f"sqlite:///{tmp_path}/a b%25?#é.db"
    store = Store(url, "run")
    store.queries.open([(0, "t")], AGENTS, 2, 0)
    finish(store, 0)
    store.close()
    again = Store(url, "run")
    assert states(again) == {"sealed": 1} and len(again.groups.calls_of(0)) == 6
    with again.database.engine.begin() as db:
        assert db.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert db.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL


@pytest.mark.parametrize(("version", "how"), [(1, "use"), (2, "migrate it .`mgrpo migrate RUN`., or use"), (99, "use")])
def test_another_schema_version_is_refused(connect, version, how):
    with connect().database.engine.begin() as db:
        db.exec_driver_sql(f"UPDATE schema_version SET version = {version}")
    with pytest.raises(
        ValueError, match=rf"store .*: expected schema version 3, found \[{version}\]: it was created by .*; {how} that"
    ):
        connect()


@pytest.mark.parametrize("url", ["", "sqlite://", "sqlite:///", "sqlite:///:memory:", "mysql://u@h/d", "/tmp/x.db"])
def test_urls_that_are_no_sqlite_file_are_refused(url):
    with pytest.raises(ValueError, match=r"store: expected (a url that begins with )?'sqlite:///'"):
        Store(url, "run")


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"does not exist: .*/nowhere"):
        Store(f"sqlite:///{tmp_path}/nowhere/store.db", "run")


class Model(RuleBasedStateMachine):
    """Compare random histories with plain dictionaries: step of a query, first record of a rollout, state per agent."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.store = Store(f"sqlite:///{self.folder.name}/s.db", "run")
        self.steps: dict[int, int] = {}
        self.ended: dict[int, dict[int, int]] = {}
        self.state: dict[tuple[str, int], str] = {}

    queries = st.integers(0, 5)

    @rule(query=queries, step=st.integers(0, 3))
    def open_query(self, query, step):
        self.store.queries.open([(query, "t")], AGENTS, 2, step)
        if query not in self.steps:
            self.steps[query], self.ended[query] = step, {}
            self.state |= {(agent, query): "open" for agent in AGENTS}

    @precondition(lambda self: self.steps)
    @rule(data=st.data(), rollout=st.integers(0, 1), subs=st.integers(0, 3))
    def record(self, data, rollout, subs):
        query = data.draw(st.sampled_from(sorted(self.steps)))
        self.store.queries.record(*episode(query, rollout, subs))
        self.ended[query].setdefault(rollout, subs)
        if len(self.ended[query]) == 2:
            self.state |= {(a, query): "sealed" for a in AGENTS if self.state[a, query] == "open"}

    @rule(agent=st.sampled_from(AGENTS), limit=st.integers(0, 3))
    def claim(self, agent, limit):
        groups = self.store.groups.claim(agent, limit, "me").groups
        sealed = sorted(q for (a, q), state in self.state.items() if a == agent and state == "sealed")
        assert [g.query for g in groups] == sealed[:limit]
        for group in groups:
            subs = [self.ended[group.query][r] for r in (0, 1)]
            assert [r.rollout for r in group.rollouts] == [0, 1] and group.step == self.steps[group.query]
            assert len(group.calls) == (2 if agent == "main" else sum(subs))
        self.state |= {(agent, q): "leased" for q in sealed[:limit]}

    @rule(agent=st.sampled_from(AGENTS), query=queries)
    def ack(self, agent, query):
        if self.state.get((agent, query)) in ("leased", "acked"):
            self.store.groups.ack(agent, [query])
            self.state[agent, query] = "acked"
        else:
            with pytest.raises(ValueError, match="acked: expected query"):
                self.store.groups.ack(agent, [query])

    @rule(step=st.integers(0, 4))
    def reclaim(self, step):
        claimed = {q for (_, q), state in self.state.items() if state in ("leased", "acked")}
        kept = {q for q in claimed if self.steps[q] < step}
        assert self.store.groups.reclaim(step) == len(self.steps) - len(kept)
        self.steps = {q: s for q, s in self.steps.items() if q in kept}
        self.ended = {q: e for q, e in self.ended.items() if q in kept}
        self.state = {(a, q): "acked" for a in AGENTS for q in kept}

    @invariant()
    def agrees(self):
        for agent, counts in self.store.audit.status()["agents"].items():
            of_agent = [state for (a, _), state in self.state.items() if a == agent]
            assert counts == {state: of_agent.count(state) for state in STATES}
        for query in range(6):
            ended = self.ended.get(query, {})
            assert {r.rollout for r in self.store.groups.rollouts_of(query)} == set(ended)
            assert len(self.store.groups.calls_of(query)) == sum(1 + subs for subs in ended.values())

    def teardown(self):
        self.store.close()
        self.folder.cleanup()


Model.TestCase.settings = settings(max_examples=15, stateful_step_count=20)
TestModel = Model.TestCase


# ---- many writers, and kill -9


def test_threads_and_stores_race_without_losing_or_doubling(connect):
    stores = [connect() for _ in range(3)]
    stores[0].queries.open([(q, "t") for q in range(20)], AGENTS, 2, 0)
    taken: list[int] = []

    def work(store: Store) -> None:
        for query in range(20):
            finish(store, query)  # all three write the same samples
            taken.extend(g.query for g in store.groups.claim("main", 2, "me").groups)

    threads = [threading.Thread(target=work, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(taken) == list(range(20))
    assert states(stores[0]) == {"leased": 20} and len(stores[0].groups.calls_of(7)) == 6


OPEN = """
import sys
from mgrpo.engine.store import Store
Store(sys.argv[1], "run").queries.open([(0, "t")], ["main"], 1, 0)
"""


def test_processes_may_create_the_store_at_once(tmp_path):
    url = f"sqlite:///{tmp_path}/store.db"
    children = [subprocess.Popen([sys.executable, "-c", OPEN, url]) for _ in range(3)]
    assert [child.wait(60) for child in children] == [0, 0, 0]
    assert states(Store(url, "run")) == {"open": 1}


ENDLESS = """
import sys
from cases.store import AGENTS, episode
from mgrpo.engine.store import Store
store = Store(sys.argv[1], "run")
for query in range(100000):
    store.queries.open([(query, "t")], AGENTS, 2, query)
    for rollout in range(2):
        store.queries.record(*episode(query, rollout, subs=200))
        print(query, rollout, flush=True)
    if query % 2:
        store.groups.ack("main", [group.query for group in store.groups.claim("main", 1, "child").groups])
"""
FULL = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))  # Python ignores SIGXFSZ: a write fails with EFBIG
"""


def child_command(code: str, url: str) -> list[str]:
    return [sys.executable, "-c", code, url]


def check_whole(store: Store, lines: list[str]) -> None:
    """Check that everything announced is there, and that nothing is there in part."""
    promised = [tuple(map(int, line.split())) for line in lines]
    for query, rollout in promised:
        assert rollout in [r.rollout for r in store.groups.rollouts_of(query)]
    queries = range(promised[-1][0] + 2)
    for query in queries:
        assert len(store.groups.calls_of(query)) == 201 * len(
            store.groups.rollouts_of(query)
        )  # a rollout with all of its calls, or not at all
    whole = sum(len(store.groups.rollouts_of(query)) == 2 for query in queries)
    for counts in store.audit.status()["agents"].values():
        assert counts["sealed"] + counts["leased"] + counts["acked"] == whole


@pytest.mark.parametrize("announced", [1, 12, 41])
def test_kill_9_leaves_whole_transactions(tmp_path, announced):
    url = f"sqlite:///{tmp_path}/store.db"
    child = subprocess.Popen(child_command(ENDLESS, url), stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    lines = [child.stdout.readline() for _ in range(announced)]
    child.send_signal(signal.SIGKILL)
    lines += [line for line in child.stdout if line.endswith("\n")]
    assert child.wait(30) == -signal.SIGKILL
    child.stdout.close()
    check_whole(Store(url, "run"), lines)


def test_a_full_disk_for_real(tmp_path):
    url = f"sqlite:///{tmp_path}/store.db"
    child = subprocess.run(child_command(FULL + ENDLESS, url), capture_output=True, text=True, timeout=60)
    assert child.returncode == 1 and "sqlite3.OperationalError" in child.stderr
    store = Store(url, "run")
    check_whole(store, child.stdout.splitlines())
    store.queries.open([(10**6, "t")], AGENTS, 2, 0)  # and it goes on once there is room
    finish(store, 10**6)
    assert len(store.groups.calls_of(10**6)) == 6
