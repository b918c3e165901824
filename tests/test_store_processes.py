"""Real processes on one store: workers and trainers at once, some killed; every group is trained once by each agent."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from mgrpo.bench.postgres import PASSWORD
from test_store_decoupled import AGENTS, K, Q, balanced

STEPS = 8
PROCESS = f"""
import os, random, sys, time, uuid
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_store_decoupled import AGENTS, K, Q, Store, episode, publication, take
url, role, name = sys.argv[1:]
store = Store(url, "run", password=os.environ["MGRPO_STORE_PASSWORD"])
store.begin_run(AGENTS, K, "print")
"""
WORKER = """
while min(p.step for p in store.publications().values()) < int(role):
    for lease in take(store, name, 2, ahead=2 * Q, total=int(role) * Q, lease=1):
        for rollout in lease.missing:
            time.sleep(random.uniform(0, 0.02))
            store.record(*episode(lease.query, rollout))
    time.sleep(0.01)
"""
TRAINER = """
steps, agent = int(role), name
me = uuid.uuid4().hex
store.hold(f"trainer:{agent}", me, 60)
store.publish(publication(agent, 0), me)
for step in range(steps):
    while not (groups := store.claim(agent, Q, me, at_least=Q).groups):
        time.sleep(0.01)
    store.publish(publication(agent, step + 1), me)
    store.ack(agent, [group.query for group in groups], me)
    print(*[group.query for group in groups], flush=True)
"""


def start(code: str, url: str, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS + code, url, str(STEPS), name]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "MGRPO_STORE_PASSWORD": PASSWORD}
    )


def test_workers_and_trainers_of_one_run_with_workers_killed(connect):
    store = connect()
    url = str(store._engine.url.render_as_string()).replace("+psycopg", "")
    trainers = [start(TRAINER, url, agent) for agent in AGENTS]
    while len(store.publications()) < len(AGENTS):
        time.sleep(0.05)
    workers = [start(WORKER, url, f"w{number}") for number in range(3)]
    chance = random.Random(0)
    for number in range(2):
        while store.balance()["rollouts"] < 10 * (number + 1):
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
    books = store.balance()
    assert balanced(store) and books["rollouts"] == STEPS * Q * K
    assert all(counts["acked"] == counts["opened"] == STEPS * Q for counts in books["agents"].values())
