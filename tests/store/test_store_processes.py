"""Test real processes on one store, some of them killed: each agent trains on every group once."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from cases.decoupled_store import AGENTS, K, Q, balanced, begin, finish, publication, take
from mgrpo.bench.postgres import PASSWORD
from mgrpo.engine.store import Store, database

STEPS = 8
PROCESS = """
import os, random, sys, time, uuid
from mgrpo.engine.store import database
from mgrpo.engine.store import Store
from cases.decoupled_store import AGENTS, K, Q, episode, publication, take
url, role, name = sys.argv[1:]
store = Store(url, "run", password=os.environ["MGRPO_STORE_PASSWORD"])
store.roles.begin_run(AGENTS, K, "print")
"""
WORKER = """
while min(p.step for p in store.roles.publications().values()) < int(role):
    for lease in take(store, name, 2, ahead=2 * Q, total=int(role) * Q, lease=1):
        for rollout in lease.missing:
            time.sleep(random.uniform(0, 0.02))
            store.queries.record(*episode(lease.query, rollout))
    time.sleep(0.01)
"""
TRAINER = """
steps, agent = int(role), name
me = uuid.uuid4().hex
store.roles.hold(f"trainer:{agent}", me, 60)
store.roles.publish(publication(agent, 0), me)
for step in range(steps):
    while not (groups := store.groups.claim(agent, Q, me, at_least=Q).groups):
        time.sleep(0.01)
    store.roles.publish(publication(agent, step + 1), me)
    store.groups.ack(agent, [group.query for group in groups], me)
    print(*[group.query for group in groups], flush=True)
"""


def start(code: str, url: str, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS + code, url, str(STEPS), name]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "MGRPO_STORE_PASSWORD": PASSWORD}
    )


def test_workers_and_trainers_of_one_run_with_workers_killed(connect):
    store = connect()
    url = str(store.database.engine.url.render_as_string()).replace("+psycopg", "")
    trainers = [start(TRAINER, url, agent) for agent in AGENTS]
    while len(store.roles.publications()) < len(AGENTS):
        time.sleep(0.05)
    workers = [start(WORKER, url, f"w{number}") for number in range(3)]
    chance = random.Random(0)
    for number in range(2):
        while store.audit.balance()["rollouts"] < 10 * (number + 1):
            time.sleep(0.01)
        victim = workers.pop(chance.randrange(len(workers)))
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
        workers.append(start(WORKER, url, f"again{number}"))
    for trainer in trainers:
        out, _ = trainer.communicate(timeout=120)
        assert trainer.returncode == 0
        assert sorted(map(int, out.split())) == list(range(STEPS * Q))
    for worker in workers:
        worker.communicate(timeout=120)
        assert worker.returncode == 0
    books = store.audit.balance()
    assert balanced(store) and books["rollouts"] == STEPS * Q * K
    assert all(counts["acked"] == counts["opened"] == STEPS * Q for counts in books["agents"].values())


def test_many_take_while_trainers_publish(connect):
    """No number is given out twice or left out; what newer weights let in is never sampled with older ones."""
    store, ahead, steps, takers = begin(connect()), 2 * Q, 30, 4
    got: list[tuple[int, int]] = []  # query numbers, each with the step of its worker's weights

    def work(mine, name: str) -> None:
        while len(got) < steps * Q:
            loaded = {agent: p.step for agent, p in mine.roles.publications().items()}
            for lease in take(mine, name, 3, ahead=ahead, total=steps * Q, loaded=loaded):
                got.append((lease.query, min(loaded.values())))
                finish(mine, lease.query, min(loaded.values()))

    def train(mine, agent: str) -> None:
        for step in range(steps):
            while not mine.groups.claim(agent, Q, "me", at_least=Q).groups:
                time.sleep(0.001)
            mine.roles.publish(publication(agent, step + 1), "me")

    threads = [threading.Thread(target=work, args=(connect(), f"w{number}"), daemon=True) for number in range(takers)]
    threads += [threading.Thread(target=train, args=(connect(), agent), daemon=True) for agent in AGENTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(query for query, _ in got) == list(range(steps * Q))
    assert [(query, step) for query, step in got if query >= step * Q + ahead] == []
    assert balanced(store)


@pytest.mark.parametrize("news", ["another takes", "trainers publish", "both"])
def test_what_happens_while_one_takes(server, news: str):
    """On PostgreSQL others may act between the gate's read and the lock; SQLite admits one transaction at a time."""
    url = server.create()
    with closing(Store(url, "run", password=PASSWORD)) as store, closing(Store(url, "run", password=PASSWORD)) as other:
        begin(store)
        numbers, theirs = store.queries._numbers, []

        def late(*args):
            if news != "trainers publish":
                theirs.extend(lease.query for lease in take(other, "other", 1, ahead=Q))
            if news != "another takes":
                for agent in AGENTS:
                    other.roles.publish(publication(agent, 1), "me")
            return numbers(*args)

        store.queries._numbers = late
        mine = [lease.query for lease in take(store, "w", ahead=Q, loaded=dict.fromkeys(AGENTS, 0))]
        assert (theirs, mine) == (([0], [1]) if theirs else ([], [0, 1])), "those of the gate that it saw, once each"
        store.queries._numbers = numbers
        assert take(store, "w", ahead=Q, loaded=dict.fromkeys(AGENTS, 0)) == []
        assert balanced(store)


STOPPED = """
with store.database.engine.connect() as db, db.begin():
    store.roles.fence(db, "main", "me")
    print("in it", flush=True)
    os.kill(os.getpid(), __import__("signal").SIGSTOP)
    db.exec_driver_sql("UPDATE publications SET version = 77")
"""


def test_a_process_stopped_in_a_transaction_is_named_and_loses_nothing(tmp_path, monkeypatch):
    """A process that waited in vain for the lock is told which process held it."""
    monkeypatch.setattr(database, "LOCKED", 0.2)
    url = f"sqlite:///{tmp_path}/store.db"
    with closing(Store(url, "run")) as store:
        begin(store)
        child = start(STOPPED, url, "main")
        assert child.stdout is not None and child.stdout.readline() == "in it\n"
        stopped = "State:\tT"
        while stopped not in Path(f"/proc/{child.pid}/status").read_text():
            time.sleep(0.01)
        for write in (lambda: store.roles.publish(publication("search", 1), "me"), lambda: take(store)):
            with pytest.raises(OSError, match=rf"database is locked: process {child.pid} writes \(stopped\)$"):
                write()
        assert store.roles.publications()["search"].step == 0, "who only reads is not held up"
        child.send_signal(signal.SIGCONT)
        assert child.wait(60) == 0
        store.roles.publish(publication("search", 1), "me")
        assert store.roles.publications()["main"].version == 77 and store.roles.publications()["search"].step == 1
        assert balanced(store)
