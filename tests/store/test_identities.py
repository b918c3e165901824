"""Test that a name in the store is that of one run, told by its id, and that its tasks stay the same."""

from __future__ import annotations

import pytest

from cases.decoupled_store import AGENTS, K, balanced, finish, publication, take
from mgrpo.engine.store import Store

ONE, OTHER = "1" * 16, "2" * 16


def begun(store: Store, id: str = ONE, place: str = "/runs/a") -> Store:
    store.identities.take(id, place, 60)
    store.roles.begin_run(AGENTS, K, "print")
    return store


def test_a_name_is_taken_once_and_again_by_the_same_run_wherever_it_is(connect):
    store = begun(connect())
    assert store.identities.known() == (ONE, "/runs/a")
    begun(connect(), ONE, "/moved/a")
    assert store.identities.known() == (ONE, "/moved/a")
    begun(connect("another"), OTHER)
    assert connect("third").identities.known() is None


def test_another_run_of_the_same_name_is_refused_alive_or_not(connect):
    store = begun(connect())
    with pytest.raises(ValueError, match=rf"the name 'run' is that of run {ONE} in /runs/a, which may go on: expected"):
        store.identities.take(OTHER, "/runs/b", 60)
    store.roles.hold("trainer:main", "host", 60)
    for place in ("/runs/a", "/runs/b"):
        with pytest.raises(
            ValueError, match=rf"that of run {ONE} in /runs/a, which is at work: .* of {place} \(run {OTHER}\)"
        ):
            store.identities.take(OTHER, place, 60)
    assert store.identities.known() == (ONE, "/runs/a")


def test_a_run_begun_anew_in_its_directory_gets_the_name_and_the_old_rows_stay_beside_it(connect):
    store = begun(connect())
    for agent in AGENTS:
        store.roles.hold(f"trainer:{agent}", "host", 60)
        store.roles.publish(publication(agent, 0), "host")
    take(store, count=1)
    finish(store, 0)
    for agent in AGENTS:
        store.roles.release(f"trainer:{agent}", "host")
    begun(store, OTHER)
    assert store.identities.known() == (OTHER, "/runs/a")
    assert store.audit.balance()["queries"] == 0 and not store.roles.publications()
    old = connect(f"run-{ONE}")
    assert old.identities.known() == (ONE, "/runs/a")
    assert old.audit.balance()["rollouts"] == K and balanced(old) and set(old.roles.publications()) == set(AGENTS)


def test_a_copy_of_a_run_cannot_work_beside_it(connect):
    store = begun(connect())
    store.identities.take(ONE, "/copy/a", 60, alone=True)  # nothing is at work: it was moved
    store.roles.hold("trainer:main", "host", 60)
    store.identities.take(ONE, "/copy/a", 60, alone=True)
    with pytest.raises(
        ValueError, match=f"run_dir: /runs/a given: expected /copy/a, where the same run {ONE} is at work"
    ):
        store.identities.take(ONE, "/runs/a", 60, alone=True)
    store.roles.release("trainer:main", "host")
    store.identities.take(ONE, "/runs/a", 60, alone=True)


def test_a_run_that_died_while_the_clock_was_ahead_is_not_at_work(connect):
    store = begun(connect())
    store.roles.hold("trainer:main", "host", 1e6)
    assert store.audit.at_work(1e6) == ["trainer:main"] and store.audit.at_work(60) == []
    store.identities.take(ONE, "/copy/a", 60, alone=True)
    store.identities.take(OTHER, "/copy/a", 60)
    assert store.identities.known() == (OTHER, "/copy/a")


def test_a_run_that_must_be_there_is_not_made_anew(connect):
    with pytest.raises(ValueError, match="no run 'run' in it, but checkpoints of it are in its directory"):
        connect().identities.take(ONE, "/runs/a", 60, known=True)
    begun(connect()).identities.take(ONE, "/runs/a", 60, known=True)


def test_rows_without_an_id_are_nobodys(connect):
    store = connect()
    store.roles.begin_run(AGENTS, K, "print")
    with pytest.raises(ValueError, match="run 'run' has no id: run `mgrpo migrate RUN`"):
        store.identities.take(ONE, "/runs/a", 60)


def test_the_first_process_notes_the_tasks_and_others_are_compared(connect):
    store = begun(connect())
    for _ in range(2):
        store.identities.settle_tasks("ab")
    with pytest.raises(ValueError, match=r"environment: tasks\('train'\) of run 'run' has digest cd: expected ab"):
        store.identities.settle_tasks("cd")
    store.identities.settle_tasks("cd", anew=True)
    store.identities.settle_tasks("cd")
    connect("without").identities.settle_tasks("ef")  # a store without runs has nothing to compare
