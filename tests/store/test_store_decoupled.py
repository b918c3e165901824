"""Test the store between workers and trainers: leases, the gate, fencing, staleness, and random histories."""

from __future__ import annotations

import math
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cases.decoupled_store import AGENTS, K, Q, balanced, begin, episode, finish, publication, take
from mgrpo.bench.postgres import PASSWORD
from mgrpo.engine.store import FencedError, Store
from mgrpo.engine.store.tables import Claim, Lease
from postgres import Connect


@pytest.fixture
def store(connect: Connect) -> Store:
    return begin(connect())


def set_clock(store: Store, seconds: float) -> None:
    store.database.now = sa.literal(seconds, sa.Double)


# ---- runs and roles


def test_a_run_is_begun_once_and_not_as_another(connect):
    store = connect()
    for _ in range(2):
        store.roles.begin_run(AGENTS, K, "print")
    for other, key in (
        ((AGENTS[::-1], K, "print"), "agents"),
        ((AGENTS, 9, "print"), "rollouts"),
        ((AGENTS, K, "x"), "fingerprint"),
    ):
        with pytest.raises(ValueError, match=f"run 'run': {key}: .* given: expected .*, as when the run was created"):
            store.roles.begin_run(*other)
    connect("another").roles.begin_run(["main"], 2, "x")


def test_nothing_is_taken_of_a_run_that_was_not_begun(connect):
    with pytest.raises(ValueError, match="no run 'run': expected `mgrpo store init` before"):
        take(connect())


def test_a_role_is_held_by_one_until_it_lapses(connect):
    store = connect()
    set_clock(store, 1000)
    store.roles.hold("launcher", "a", 60)
    with pytest.raises(ValueError, match="launcher of run 'run' is held by a for another 60 s"):
        store.roles.hold("launcher", "b", 60)
    connect("other run").roles.hold("launcher", "b", 60)
    set_clock(store, 1050)
    store.roles.hold("launcher", "a", 60)  # renewed
    set_clock(store, 1100)
    with pytest.raises(ValueError, match="held by a for another 10 s"):
        store.roles.hold("launcher", "b", 60)
    set_clock(store, 1111)
    store.roles.hold("launcher", "b", 60)
    store.roles.release("launcher", "a")  # not its role any more
    with pytest.raises(ValueError, match="held by b"):
        store.roles.hold("launcher", "a", 60)
    store.roles.release("launcher", "b")
    store.roles.hold("launcher", "a", 60)


def test_a_role_is_kept_also_when_it_lapsed_but_not_once_another_had_it(connect):
    store = connect()
    set_clock(store, 1000)
    store.roles.hold("trainer:main", "a", 60)
    set_clock(store, 1100)
    store.roles.keep("trainer:main", "a", 60)
    with pytest.raises(ValueError, match="held by a for another 60 s"):
        store.roles.hold("trainer:main", "b", 60)
    set_clock(store, 1161)
    store.roles.hold("trainer:main", "b", 60)
    for leaves in (lambda: set_clock(store, 1300), lambda: store.roles.release("trainer:main", "b")):
        leaves()  # the weights of b count, those of a do not
        with pytest.raises(FencedError, match="trainer:main of run 'run' is no longer held by a"):
            store.roles.keep("trainer:main", "a", 60)


def test_what_was_taken_while_the_clock_was_ahead_is_free_when_it_has_gone_back(store):
    """The process that took it is dead: otherwise it would set its deadline anew, on the clock as it is now."""
    now = time.time()
    set_clock(store, now + 86400)
    assert [lease.query for lease in take(store, "dead", 1)] == [0]
    store.roles.hold("launcher", "dead", 60)
    assert store.roles.open_evaluation(0) and store.roles.take_evaluation("dead", 60) == 0
    set_clock(store, now)
    assert [lease.query for lease in take(store, "living", 1)] == [0]
    store.roles.hold("launcher", "living", 60)
    assert store.roles.take_evaluation("living", 60) == 0
    assert take(store, "third", 1)[0].query == 1, "the living keep what they took"
    with pytest.raises(ValueError, match=r"held by living for another (59|60) s"):
        store.roles.hold("launcher", "third", 60)


def test_a_query_that_was_taken_while_the_clock_was_ahead_becomes_overdue_all_the_same(store):
    now = time.time()
    set_clock(store, now + 86400)
    take(store, "w", 1)
    for rollout in range(2):
        store.queries.record(*episode(0, rollout))
    set_clock(store, now)
    assert store.queries.seal_overdue(600) == []
    set_clock(store, now + 599)
    assert store.queries.seal_overdue(600) == []
    set_clock(store, now + 601)
    assert store.queries.seal_overdue(600) == [0]


def test_deadlines_are_on_the_databases_clock(connect, monkeypatch):
    store = connect()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    store.roles.hold("launcher", "a", 0.02)
    time.sleep(0.05)
    store.roles.hold("launcher", "b", 60)
    with pytest.raises(ValueError, match=r"held by b for another (59|60) s"):
        store.roles.hold("launcher", "a", 60)


def test_a_trainer_that_was_replaced_writes_nothing(store):
    take(store)
    finish(store, 0)
    finish(store, 1)
    store.groups.claim("main", 1, "me")
    store.roles.release("trainer:main", "me")
    store.roles.hold("trainer:main", "you", 1000)
    before = store.audit.balance()
    writes: list[Callable[[], object]] = [
        lambda: store.groups.claim("main", 1, "me"),
        lambda: store.groups.ack("main", [0], "me"),
        lambda: store.groups.ack("main", [0]),
        lambda: store.groups.refill("main", [0], "me"),
        lambda: store.groups.discard("main", [0], "me"),
        lambda: store.groups.undo("main", 0, "me"),
        lambda: store.roles.check("main", "me"),
        lambda: store.groups.release("main", "me"),
        lambda: store.roles.publish(publication("main", 1), "me"),
        lambda: store.roles.rewind("main", 0, "me"),
    ]
    for write in writes:
        with pytest.raises(FencedError, match="trainer:main of run 'run' is held by you, no longer by"):
            write()
    assert store.audit.balance() == before and store.roles.publications()["main"].step == 0
    store.groups.ack("main", [0], "you")
    assert [g.query for g in store.groups.claim("search", 9, "me").groups] == [
        0,
        1,
    ]  # the other agent's role is untouched


# ---- weights and evaluations


def test_publications_are_replaced_rewound_and_found_by_step(store):
    for step in (1, 2, 2):
        store.roles.publish(publication("main", step), "me")
    assert store.roles.publications() == {"main": publication("main", 2), "search": publication("search", 0)}
    store.roles.rewind("main", 1, "me")
    store.roles.publish(publication("main", 1, "again"), "me")
    assert store.roles.publications()["main"].file == "again"
    assert store.roles.publications(0) == {agent: publication(agent, 0) for agent in AGENTS}
    assert store.roles.publications(2) == {}


def test_a_step_is_evaluated_once_when_all_agents_have_published_it(store):
    store.roles.publish(publication("main", 1), "me")
    assert [store.roles.open_evaluation(step) for step in (0, 1)] == [True, False]
    store.roles.publish(publication("search", 1), "me")
    assert [store.roles.open_evaluation(1) for _ in range(2)] == [True, True]
    set_clock(store, 1000)
    assert [store.roles.take_evaluation(worker, 60) for worker in "abc"] == [0, 1, None]
    set_clock(store, 1050)
    assert store.roles.take_evaluation("a", 60) == 0  # its own lease, extended
    set_clock(store, 1070)
    assert [store.roles.take_evaluation(worker, 60) for worker in "cb"] == [1, None]
    assert not store.roles.finish_evaluation(1, "b", {"eval/held_out_accuracy": 0.0})  # c has it by now
    assert store.roles.finish_evaluation(1, "c", {"eval/held_out_accuracy": 0.5})
    assert not store.roles.finish_evaluation(1, "c", {"eval/held_out_accuracy": 0.7})
    assert store.roles.open_evaluation(1) and store.roles.take_evaluation("c", 60) is None
    assert store.roles.evaluations() == {1: {"eval/held_out_accuracy": 0.5}}
    store.roles.rewind("main", 0, "me")  # the weights that were evaluated are lost
    assert store.roles.evaluations() == {} and not store.roles.open_evaluation(1)


def test_a_run_that_ends_early_ends_after_the_newest_step_that_any_agent_published(store):
    for agent, step in (("main", 1), ("main", 2), ("search", 1)):
        store.roles.publish(publication(agent, step), "me")
    assert store.roles.open_evaluation(1) and store.roles.end(3) is None
    assert store.roles.take_evaluation("w", 60) == 1
    assert store.roles.finish_evaluation(1, "w", {"eval/held_out_accuracy": math.nan}, patience=3)
    assert store.roles.end(3) == 3
    assert store.roles.end(2) is store.roles.end(0) is None  # another patience decides anew
    assert store.roles.evaluations()[1]["eval/held_out_accuracy"] is None
    store.roles.rewind("main", 0, "me")
    assert store.roles.end(3) is None


def test_a_run_of_one_process_notes_its_evaluations_and_forgets_those_of_lost_weights(store):
    for step, score in ((0, 0.1), (2, 0.3), (2, 0.4)):
        store.roles.note_evaluation(step, {"eval/held_out_accuracy": score})
    assert store.roles.evaluations() == {0: {"eval/held_out_accuracy": 0.1}, 2: {"eval/held_out_accuracy": 0.4}}
    store.roles.forget_evaluations(1)
    assert list(store.roles.evaluations()) == [0]


# ---- leases and the gate


def test_workers_get_queries_in_order_and_each_its_own(store):
    first, second = take(store, "a", 3), take(store, "b", 3)
    assert first == [Lease(q, f"task {q}", [0, 1, 2]) for q in (0, 1, 2)]
    assert second == [Lease(3, "task 3", [0, 1, 2])]
    assert take(store, "a") == take(store, "a", 0) == []
    assert [store.queries.extend(worker, 60) for worker in "abc"] == [3, 1, 0]
    assert store.audit.status()["agents"]["main"]["open"] == 2 * Q


def test_a_lapsed_lease_goes_to_another_for_what_is_missing(store):
    set_clock(store, 1000)
    take(store, "a", 2)
    store.queries.record(*episode(0, 1))
    set_clock(store, 1059)
    assert store.queries.extend("a", 30) == 2
    set_clock(store, 1088)
    assert take(store, "b", ahead=2) == []
    set_clock(store, 1090)
    assert take(store, "b", ahead=2, count=1) == [Lease(0, "task 0", [0, 2])]
    assert store.queries.extend("a", 60) == 1  # it has lost one
    store.queries.record(*episode(0, 0))  # of the worker that came back: the first record counts
    store.queries.record(*episode(0, 0, step=5))
    store.queries.record(*episode(0, 2))
    assert len(store.groups.calls_of(0)) == 2 * K and {c.step for c in store.groups.calls_of(0)} == {0}
    set_clock(store, 9000)
    assert take(store, "c", ahead=2) == [Lease(1, "task 1", [0, 1, 2])]  # nobody gets the sealed one
    assert balanced(store)


def test_what_is_given_back_can_be_taken_at_once(store):
    take(store, "a", 2)
    take(store, "b", 2)
    store.queries.give_back("a")
    assert store.queries.extend("a", 60) == 0
    assert [lease.query for lease in take(store, "c")] == [0, 1]


def test_who_has_old_weights_gets_nothing_before_it_has_the_new(store):
    """Otherwise a worker could sample with old weights the queries that newer weights have just let it take."""
    gate = {"ahead": Q, "total": 99, "task_of": str, "lease": 60}
    store.roles.publish(publication(AGENTS[0], 1), "me")
    old = dict.fromkeys(AGENTS, 0)
    assert store.queries.take("w", 99, **gate, loaded=old) == store.queries.take("w", 99, **gate, loaded={}) == []
    assert len(store.queries.take("w", 99, **gate, loaded=old | {AGENTS[0]: 1})) == Q


def test_the_gate_follows_the_slowest_agent_and_replaces_what_was_dropped(store):
    def opened(ahead: int, total: int) -> int:
        take(store, ahead=ahead, total=total)
        return store.audit.balance()["queries"]

    assert opened(Q, 3 * Q) == Q
    for query in range(Q):
        finish(store, query)
    assert [len(store.groups.claim(agent, Q, "me").groups) for agent in AGENTS] == [Q, Q]
    store.roles.publish(publication("main", 1), "me")
    assert opened(Q, 3 * Q) == Q
    store.roles.publish(publication("search", 1), "me")
    assert opened(Q, 3 * Q) == 2 * Q
    finish(store, 2)
    store.groups.claim("main", 1, "me")
    store.groups.refill("main", [2], "me")  # one agent dropped a group: the other is the slowest now
    assert opened(Q, 3 * Q) == 2 * Q
    finish(store, 3)
    assert store.groups.claim("search", 2, "me", oldest_step=1).expired == [2, 3]
    assert opened(Q, 3 * Q) == 2 * Q + 1
    assert opened(99, 3 * Q) == 3 * Q + 2  # at the end, as many more as the agent needs that dropped the most
    for step in (2, 3):
        store.roles.publish(publication("search", step), "me")
    assert opened(99, 3 * Q) == 3 * Q + 2
    store.roles.publish(publication("main", 3), "me")
    assert opened(99, 3 * Q) == 3 * Q + 2  # nobody needs more


def test_an_agent_that_is_done_does_not_hold_up_the_other(store):
    """It drops nothing any more, so its count must not limit what another agent needs to replace dropped groups."""
    take(store, ahead=9, total=Q)
    for query in range(Q):
        finish(store, query)
    store.groups.claim("main", Q, "me")
    store.roles.publish(publication("main", 1), "me")
    assert store.groups.claim("search", Q, "me", oldest_step=1).expired == [0, 1]
    assert [lease.query for lease in take(store, ahead=Q, total=Q)] == [2, 3]


def test_nothing_is_opened_before_all_agents_have_published(connect):
    store = connect()
    store.roles.begin_run(AGENTS, K, "print")
    store.roles.hold("trainer:main", "me", 100)
    store.roles.publish(publication("main", 0), "me")
    assert take(store) == []


def test_an_overdue_query_goes_on_with_what_it_has_but_not_with_one(store):
    set_clock(store, 1000)
    take(store, "a", 3)
    for query, ended in ((0, 2), (1, 1)):
        for rollout in range(ended):
            store.queries.record(*episode(query, rollout))
    assert store.queries.seal_overdue(600) == []
    set_clock(store, 1601)
    assert store.queries.seal_overdue(600) == [0] and store.queries.seal_overdue(600) == []
    store.queries.record(*episode(0, 2))  # late: it is only counted
    store.queries.record(*episode(0, 1))  # delivered twice
    store.queries.record([*episode(0, 2)[0], *episode(1, 1)[0]], [])
    books = store.audit.balance()
    assert (books["late"], books["rollouts"]) == (2, 4) and balanced(store)
    (group,) = store.groups.claim("main", 9, "me").groups
    assert [r.rollout for r in group.rollouts] == [0, 1] and len(group.calls) == 2
    take(store, "b", 9, ahead=3)  # a worker that takes over a query has the whole time for it
    assert store.queries.seal_overdue(600) == []


def test_a_task_that_no_database_could_hold_is_refused_whole(store):
    with pytest.raises(ValueError, match=r"task of query 1: .* expected an id without NUL"):
        store.queries.take("w", 2, ahead=9, total=9, task_of=lambda q: "\0" * q, lease=1)
    assert store.audit.balance()["queries"] == 0


# ---- groups


def test_groups_with_calls_of_too_old_weights_expire_for_that_agent_alone(store):
    take(store)
    finish(store, 0, step=1)
    for rollout, (step, subs) in enumerate(((1, 0), (1, 2), (0, 0))):
        store.queries.record(*episode(1, rollout, step, subs))
    finish(store, 2, step=1)
    claim = store.groups.claim("main", 9, "me", oldest_step=1)
    assert [group.query for group in claim.groups] == [0, 2] and claim.expired == [1]
    claim = store.groups.claim("search", 9, "me", oldest_step=1)
    assert [group.query for group in claim.groups] == [0, 1, 2] and claim.expired == []
    assert store.groups.claim("main", 9, "me", oldest_step=1) == Claim([], [])
    counts = store.audit.balance()["agents"]["main"]
    assert (counts["expired"], counts["refilled"], counts["leased"]) == (1, 0, 2)


def test_nothing_is_claimed_below_the_least_number_asked_for(store):
    take(store)
    finish(store, 0)
    finish(store, 1, step=1)
    assert store.groups.claim("main", 2, "me", at_least=3) == Claim([], [])
    assert store.groups.claim("main", 2, "me", oldest_step=1, at_least=2) == Claim(
        [], [0]
    )  # the stale ones have expired all the same
    assert [g.query for g in store.groups.claim("main", 2, "me", at_least=1).groups] == [1]


def test_a_trainers_successor_acks_what_the_checkpoint_has_and_releases_the_rest(store):
    take(store)
    for query in range(4):
        finish(store, query)
    store.groups.claim("main", 4, "me")
    store.roles.release("trainer:main", "me")
    store.roles.hold("trainer:main", "you", 100)
    store.roles.publish(publication("main", 1), "you")
    for _ in range(2):
        store.groups.ack("main", [0, 2], "you")
    assert [store.groups.release("main", "you") for _ in range(2)] == [2, 0]
    assert [g.query for g in store.groups.claim("main", 9, "you").groups] == [1, 3]
    assert balanced(store)


def test_refill_is_idempotent_and_all_or_nothing(store):
    take(store)
    for query in range(3):
        finish(store, query)
    store.groups.claim("main", 2, "me")
    with pytest.raises(ValueError, match="expired: expected query 2 of agent 'main' to be leased, it is sealed"):
        store.groups.refill("main", [0, 2], "me")
    for _ in range(2):
        store.groups.refill("main", [0], "me")
    with pytest.raises(ValueError, match="acked: expected query 0 of agent 'main' to be leased, it is expired"):
        store.groups.ack("main", [0], "me")
    counts = store.audit.balance()["agents"]["main"]
    assert (counts["refilled"], counts["expired"], counts["leased"], counts["opened"]) == (1, 1, 1, 4)


def test_discarded_groups_are_expired_but_not_counted_as_refilled(store):
    take(store)
    for query in range(3):
        finish(store, query)
    store.groups.claim("main", 2, "me")
    with pytest.raises(ValueError, match="expired: expected query 2 of agent 'main' to be leased, it is sealed"):
        store.groups.discard("main", [0, 2], "me")
    for _ in range(2):
        store.groups.discard("main", [0], "me")
    counts = store.audit.balance()["agents"]["main"]
    assert (counts["refilled"], counts["expired"], counts["leased"]) == (0, 1, 1)
    assert store.groups.release("main", "me") == 1  # a successor does not get it either
    assert [g.query for g in store.groups.claim("main", 9, "me").groups] == [1, 2]


# ---- the audit


def test_an_agent_that_goes_back_gets_the_groups_since_again_and_no_other_does(store):
    take(store)
    for query in range(4):
        finish(store, query)
    for agent in AGENTS:
        for step, pair in ((1, [0, 1]), (2, [2, 3])):
            assert [g.query for g in store.groups.claim(agent, 2, "me").groups] == pair
            store.groups.ack(agent, pair, "me", step)
            store.roles.publish(publication(agent, step), "me")
    assert (store.groups.undo("main", 2, "me"), store.groups.acked("main")) == (0, 4)
    store.roles.rewind("main", 1, "me")
    assert (store.groups.undo("main", 1, "me"), store.groups.acked("main"), store.groups.acked("search")) == (2, 2, 4)
    assert store.groups.undo("main", 1, "me") == 0 and balanced(store)
    assert [g.query for g in store.groups.claim("main", 9, "me").groups] == [2, 3]
    store.groups.ack("main", [2, 3], "me", 2)
    store.roles.publish(publication("main", 2), "me")
    assert store.groups.acked("main") == 4 and balanced(store)


def test_groups_whose_calls_were_deleted_are_replaced_when_an_agent_goes_back(store):
    take(store)
    finish(store, 0)
    for agent in AGENTS:
        store.groups.claim(agent, 1, "me")
        store.groups.ack(agent, [0], "me", 1)
    store.audit.forget([call.position.file for call in store.groups.calls_of(0)])
    assert store.groups.undo("main", 0, "me") == 1
    assert store.audit.status()["agents"]["main"]["expired"] == 1 and not store.groups.claim("main", 9, "me").groups


def test_garbage_is_what_every_agent_has_finished_with(store):
    take(store)
    for query in range(3):
        finish(store, query)
    store.roles.publish(publication("main", 1), "me")
    store.groups.claim("main", 2, "me")
    store.groups.ack("main", [0], "me")
    store.groups.refill("main", [1], "me")
    assert store.audit.garbage() == ["main-00000.arrow", "main-00001.arrow"]
    assert (
        store.audit.forget(["main-00000.arrow", "main-00002.arrow", "nowhere"]) == K
    )  # calls that are not finished stay
    assert store.audit.garbage() == ["main-00001.arrow"]
    assert {c.agent for c in store.groups.calls_of(0)} == {"search"} and len(store.groups.calls_of(2)) == 2 * K
    assert balanced(store)


DAMAGE = {
    "rollouts without a query": "DELETE FROM queries WHERE query = 3",
    "rollouts beyond K": "UPDATE rollouts SET rollout = 7 WHERE query = 0 AND rollout = 0",
    "calls without a rollout": "DELETE FROM rollouts WHERE query = 0 AND rollout = 0",
    "groups without a query": "DELETE FROM queries WHERE query = 3",
    "queries without a group of each agent": "DELETE FROM groups WHERE query = 0 AND agent = 'main'",
    "open groups of sealed queries": "UPDATE groups SET state = 'open' WHERE query = 1",
    "closed groups of open queries": "UPDATE groups SET state = 'sealed' WHERE query = 3",
    "open queries that are whole": "UPDATE queries SET sealed = (1 = 0) WHERE query = 1",
    "queries sealed too early": "UPDATE queries SET sealed = (1 = 1) WHERE query = 3",
    "numbers left out": "UPDATE queries SET query = 9 WHERE query = 3",
    "acked, but not once": "UPDATE groups SET acks = 2 WHERE query = 0 AND agent = 'main'",
    "agents with more acked than published": "UPDATE publications SET trained = 0",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_balance_sees_every_kind_of_damage(store, kind):
    take(store)
    for query in range(3):
        finish(store, query)
    store.queries.record(*episode(3, 0))
    store.roles.publish(publication("main", 1), "me")
    store.groups.claim("main", 1, "me")
    store.groups.ack("main", [0], "me")
    assert set(store.audit.balance()["violations"]) == set(DAMAGE) and balanced(store)
    with store.database.engine.begin() as db:
        db.exec_driver_sql(DAMAGE[kind])
    assert store.audit.balance()["violations"][kind] > 0


# ---- random histories


class Model(RuleBasedStateMachine):
    """Compare workers, trainers, deaths and a clock with dictionaries, written from the rules, not from the code."""

    url = ""

    @initialize()
    def start(self) -> None:
        self.store = Store(self.url, uuid.uuid4().hex, password=PASSWORD)
        self.clock, self.total, self.ahead = 1000.0, 4 * Q, 2 * Q
        set_clock(self.store, self.clock)
        begin(self.store, "t0")
        self.holder = dict.fromkeys(AGENTS, "t0")
        self.step = dict.fromkeys(AGENTS, 0)  # published
        self.claimed: dict[str, list[int]] = {agent: [] for agent in AGENTS}  # since the last publication
        self.unacked: dict[str, list[int]] = {agent: [] for agent in AGENTS}  # trained since the last checkpoint
        self.saved = dict.fromkeys(AGENTS, 0)
        self.trained: dict[str, list[int]] = {agent: [] for agent in AGENTS}  # in weights that were kept
        self.queries: dict[int, dict] = {}
        self.state: dict[tuple[str, int], str] = {}
        self.late = 0

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()

    # -- workers

    workers = st.sampled_from("ab")

    @rule(seconds=st.sampled_from([0, 1, 30, 100]))
    def time_passes(self, seconds):
        self.clock += seconds
        set_clock(self.store, self.clock)

    @rule(worker=workers, count=st.integers(0, 4))
    def take(self, worker, count):
        got = take(self.store, worker, count, self.ahead, self.total, lease=40)
        open_ones = [q for q, about in self.queries.items() if not self.sealed(q) and about["until"] < self.clock]
        wanted = sorted(open_ones)[:count]
        dropped = {agent: self.count(agent, "expired", "refilled") for agent in AGENTS}
        live = [agent for agent in AGENTS if Q * self.step[agent] < self.total]
        while live and len(wanted) < count:
            number = len(self.queries)
            if number >= min(Q * self.step[agent] + dropped[agent] for agent in live) + self.ahead:
                break
            if number >= self.total + max(dropped[agent] for agent in live):
                break
            self.queries[number] = {"ended": {}}
            self.state |= {(agent, number): "open" for agent in AGENTS}
            wanted.append(number)
        assert [lease.query for lease in got] == wanted
        for lease in got:
            assert set(lease.missing) == set(range(K)) - set(self.queries[lease.query]["ended"])
            self.queries[lease.query] |= {"worker": worker, "taken": self.clock, "until": self.clock + 40}

    @precondition(lambda self: self.queries)
    @rule(data=st.data(), rollout=st.integers(0, K - 1), subs=st.integers(0, 2))
    def record(self, data, rollout, subs):
        """Record by any worker, even one that lost its lease, or a second time."""
        query = data.draw(st.sampled_from(sorted(self.queries)))
        self.record_one(query, rollout, data.draw(st.integers(0, min(self.step.values()))), subs)

    @precondition(lambda self: self.queries)
    @rule(data=st.data())
    def record_a_whole_query(self, data):
        query = data.draw(st.sampled_from(sorted(self.queries)))
        for rollout in range(K):
            self.record_one(query, rollout, min(self.step.values()), 1)

    def record_one(self, query: int, rollout: int, step: int, subs: int) -> None:
        self.store.queries.record(*episode(query, rollout, step, subs))
        ended = self.queries[query]["ended"]
        if self.sealed(query):
            self.late += rollout not in ended
        else:
            ended.setdefault(rollout, (step, subs))
            if len(ended) == K:
                self.seal(query)

    @rule(worker=workers)
    def extend(self, worker):
        mine = self.leased_by(worker)
        assert self.store.queries.extend(worker, 40) == len(mine)
        for query in mine:
            self.queries[query]["until"] = self.clock + 40

    @rule(worker=workers)
    def give_back(self, worker):
        self.store.queries.give_back(worker)
        for query in self.leased_by(worker):
            self.queries[query] |= {"worker": "", "until": 0}

    @rule()
    def seal_overdue(self):
        overdue = [
            query
            for query, about in sorted(self.queries.items())
            if not self.sealed(query) and about["taken"] < self.clock - 60 and len(about["ended"]) >= 2
        ]
        assert self.store.queries.seal_overdue(60) == overdue
        for query in overdue:
            self.seal(query)

    # -- trainers

    agents = st.sampled_from(AGENTS)

    @rule(agent=agents, age=st.integers(0, 2), refill=st.booleans())
    def train(self, agent, age, refill):
        """Claim what is missing of the Q groups of a step; publish when all are there."""
        missing = Q - len(self.claimed[agent])
        oldest = max(self.step[agent] - age, 0)
        got = self.store.groups.claim(agent, missing, self.holder[agent], oldest_step=oldest)
        sealed = sorted(q for q in self.queries if self.state[agent, q] == "sealed")
        stale = [q for q in sealed if any(self.sampled(agent, q, step) < oldest for step in self.queries[q]["ended"])]
        self.mark(agent, stale, "expired")
        live = [q for q in sealed if q not in stale][:missing]
        assert ([group.query for group in got.groups], got.expired) == (live, stale)
        for group in got.groups:
            assert [r.rollout for r in group.rollouts] == sorted(self.queries[group.query]["ended"])
        self.mark(agent, live, "leased")
        self.claimed[agent] += live
        if refill and self.claimed[agent]:
            useless = [self.claimed[agent].pop()]
            self.store.groups.refill(agent, useless, self.holder[agent])
            self.mark(agent, useless, "refilled")
        if len(self.claimed[agent]) == Q and Q * self.step[agent] < self.total:
            self.step[agent] += 1
            self.store.roles.publish(publication(agent, self.step[agent]), self.holder[agent])
            self.unacked[agent] += self.claimed[agent]
            self.claimed[agent] = []

    @rule(agent=agents)
    def checkpoint(self, agent):
        self.store.groups.ack(agent, self.unacked[agent], self.holder[agent])
        self.saved[agent] = self.step[agent]
        self.keep(agent)

    @rule(agent=agents, wrote=st.booleans())
    def trainer_dies(self, agent, wrote):
        """Restart a trainer. wrote: it died between the checkpoint and its ack."""
        before, now = self.holder[agent], uuid.uuid4().hex
        with pytest.raises(ValueError, match="is held by"):
            self.store.roles.hold(f"trainer:{agent}", now, 1000)
        self.clock += 1001
        set_clock(self.store, self.clock)
        self.store.roles.hold(f"trainer:{agent}", now, 1000)
        other = next(name for name in AGENTS if name != agent)
        self.store.roles.hold(f"trainer:{other}", self.holder[other], 1000)
        self.holder[agent] = now
        if wrote:
            self.saved[agent] = self.step[agent]
            self.store.groups.ack(agent, self.unacked[agent], now)
            self.keep(agent)
        lost = [q for q in self.queries if self.state[agent, q] == "leased"]
        assert self.store.groups.release(agent, now) == len(lost)
        self.mark(agent, lost, "sealed")
        self.claimed[agent], self.unacked[agent] = [], []
        self.store.roles.rewind(agent, self.saved[agent], now)
        self.step[agent] = self.saved[agent]
        self.store.roles.publish(publication(agent, self.step[agent], "anew"), now)
        with pytest.raises(FencedError):
            self.store.groups.ack(agent, lost, before)

    # -- what must hold

    @invariant()
    def agrees(self):
        if not hasattr(self, "store"):
            return
        books = self.store.audit.balance()
        assert not any(books["violations"].values()), books
        assert (books["late"], books["queries"]) == (self.late, len(self.queries))
        assert books["rollouts"] == sum(len(about["ended"]) for about in self.queries.values())
        for agent, counts in books["agents"].items():
            for state in ("open", "sealed", "leased", "acked", "refilled"):
                assert counts[state] == self.count(agent, state), (agent, state)
            assert counts["expired"] == self.count(agent, "expired", "refilled")
            assert len(self.trained[agent]) == len(set(self.trained[agent])) == counts["acked"]
        assert {agent: p.step for agent, p in self.store.roles.publications().items()} == self.step

    # -- parts of the model

    def sealed(self, query: int) -> bool:
        return self.state["main", query] != "open"

    def seal(self, query: int) -> None:
        self.state |= {(agent, query): "sealed" for agent in AGENTS}

    def sampled(self, agent: str, query: int, rollout: int) -> float:
        """Return the step of the weights that sampled the agent's calls; without calls it is never stale."""
        step, subs = self.queries[query]["ended"][rollout]
        return step if agent == "main" or subs else float("inf")

    def leased_by(self, worker: str) -> list[int]:
        return [q for q, about in self.queries.items() if not self.sealed(q) and about["worker"] == worker]

    def mark(self, agent: str, queries: Sequence[int], state: str) -> None:
        self.state |= {(agent, query): state for query in queries}

    def keep(self, agent: str) -> None:
        self.mark(agent, self.unacked[agent], "acked")
        self.trained[agent] += self.unacked[agent]
        self.unacked[agent] = []

    def count(self, agent: str, *states: str) -> int:
        return sum(state in states for (a, _), state in self.state.items() if a == agent)


HISTORIES = settings(max_examples=12, stateful_step_count=40, suppress_health_check=list(HealthCheck))


def test_random_histories_on_sqlite():
    with tempfile.TemporaryDirectory() as folder:
        machine = type("OnSqlite", (Model,), {"url": f"sqlite:///{folder}/store.db"})
        run_state_machine_as_test(machine, settings=HISTORIES)


def test_random_histories_on_postgresql(server):
    machine = type("OnPostgresql", (Model,), {"url": server.create()})
    run_state_machine_as_test(machine, settings=HISTORIES)
