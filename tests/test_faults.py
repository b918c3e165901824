"""Faults in real processes of whole runs: each run completes, and each agent trains on every group exactly once.

The weights' own history is the proof, not the store's word for it: every trainer notes which checkpoint it restored and
which queries it trained on (`faults.lineage`).
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from faults import SECONDS, STEPS, K, Q, Run, wait_for
from hosts import HERE, Hosts, Server
from mgrpo.bench.postgres import PASSWORD, Cluster, why_not
from mgrpo.engine.ledger import open_store

pytestmark = pytest.mark.faults


@pytest.fixture
def make(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []
    monkeypatch.setenv("MGRPO_STORE_PASSWORD", PASSWORD)

    def tell(line: str) -> None:  # at the end of the whole session
        request.node.user_properties.append(("measured", f"{request.node.name}: {line}"))

    def begin(plan: dict[str, Any] | None = None, **changes: Any) -> Run:
        runs.append(Run(tmp_path, tell, plan, **changes))
        return runs[-1]

    yield begin
    for run in runs:
        run.end()


def fault(who: str, method: str, nth: int, when: str = "before") -> dict[str, Any]:
    return {"who": who, "method": method, "when": when, "nth": nth}


KILLS = [  # of a process each in a life of its own, in the order in which it comes to them
    fault("worker-0", "InProcessSampler.step", 5),  # amid episodes
    fault("worker-0", "Store.record", 1, "after"),
    fault("worker-0", "Store.record", 2),  # trajectories are written, and nobody knows
    fault("main", "Policy.optim_step", 2),  # amid a step
    fault("main", "Policy.save_state", 2, "after"),  # the checkpoint is not whole
    fault("main", "RunDirectory.save_checkpoint", 2, "after"),  # it is, and nothing is acked
    fault("clerk", "Store.claim", 2, "after"),
    fault("clerk", "Store.publish", 4, "after"),  # between optimizer step and checkpoint
    fault("clerk", "Store.ack", 3, "after"),
]


def test_processes_killed_where_it_hurts_most(make):
    run = make({"faults": KILLS}, sampling={"max_staleness": 1})
    run.finish(run.start("train"))
    run.check()


def test_a_rank_killed_then_the_launcher_and_a_second_one_meanwhile(make):
    """Main has two ranks, of which the second dies; the launcher dies later. One that comes too early is refused."""
    run = make({"faults": [fault("main-1", "Policy.optim_step", 2)]}, ranks=2, sampling={"workers": 2})
    launcher = run.start("train")
    run.wait_for_step(3)
    for worker in ("worker-0", "worker-1"):  # the run must not end by itself, and they must not outlive it
        os.kill(run.pid(worker), signal.SIGSTOP)
    assert run.start("train", "--resume").wait(SECONDS) == 1
    assert "is in use by process" in run.log.read_text()
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not run.living())  # no orphan
    assert min(run.steps().values()) < STEPS
    run.finish(run.start("train", "--resume"))
    run.check()
    ranks = [line for line in run.journal() if line["event"] == "trained" and line["who"] == "main-1"]
    assert {line["step"] for line in ranks} == set(range(STEPS))


LOST = [
    fault("worker-0", "Store.take", 2, "after"),
    fault("worker-0", "Store.record", 2, "after"),
    fault("worker-0", "Store.take_evaluation", 1, "after"),
    fault("worker-0", "Store.finish_evaluation", 1, "after"),
    fault("main", "Store.hold", 1, "after"),
    fault("main", "Store.claim", 2, "after"),
    fault("main", "Store.ack", 3, "after"),
    fault("clerk", "Store.publish", 3, "after"),
    fault("clerk", "Store.claim", 5, "after"),
]


def test_replies_of_the_store_that_are_lost(make):
    """What was done and not heard of: leased to one who does not know it, published, acked, recorded. All go on."""
    run = make({"faults": [lost | {"signal": None} for lost in LOST]})
    run.finish(run.start("train"))
    run.check()
    assert len(run.begun()) == 3


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["stopped", "crashed"])
def test_postgresql_goes_and_comes_back(make, server: Cluster, how: signal.Signals):
    run = make(store={"url": server.create()}, sampling={"workers": 2, "max_staleness": 1}, steps=10)
    launcher = run.start("train")
    run.wait_for_step(2)
    server.stop(how)
    try:
        for process in ("trainer-main", "trainer-clerk", "worker-0", "worker-1"):
            wait_for(lambda process=process: "trying again in" in run.said(process), run)
    finally:
        server.start()
    run.finish(launcher)
    run.check(steps=10)
    assert len(run.begun()) == 4, "nothing was restarted: all waited"


def test_a_store_locked_for_longer_than_a_lease(make):
    """SQLite has no server to stop: somebody holds its only lock. Nobody can beat, claim or record; nobody is lost."""
    run = make(sampling={"workers": 2}, store={"lease": 1.0})
    launcher = run.start("train")
    run.wait_for_step(2)
    with closing(sqlite3.connect(run.path / "store.db", isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        clock = "SELECT julianday('now') * 86400"
        (began,) = db.execute(clock).fetchone()
        wait_for(lambda: db.execute(clock).fetchone()[0] > began + 3.0)
        held = dict(db.execute("SELECT role, deadline - (julianday('now') - 2440587.5) * 86400 FROM roles"))
        assert len(held) == 2 and max(held.values()) < 0
        db.execute("ROLLBACK")
    run.finish(launcher)
    run.check()


def test_a_worker_that_comes_back_with_old_weights_wrong_clocks_and_everything_delivered_twice(make):
    """The only worker is stopped with episodes that ended and are not recorded, until another brought the run on."""
    stop = fault("worker-0", "Worker._record", 2) | {"signal": signal.SIGSTOP}
    skew = {"worker-0": 5 * 3600.0, "worker-1": -86400.0, "main": -7200.0}
    plan = {"faults": [stop], "skew": skew, "twice": ["worker-0", "worker-1"], "alone": ["1"]}
    run = make(plan, sampling={"workers": 2}, store={"lease": 1.0}, steps=8)
    launcher = run.start("train")
    wait_for((run.folder / "fault-0").exists, run)
    stopped, behind = run.pid("worker-0"), min(run.steps().values())
    other = run.start("rollout", "--name", "worker-1")
    run.wait_for_step(behind + 2)  # its queries were sampled by the other, to the end
    os.kill(stopped, signal.SIGCONT)
    assert other.wait(SECONDS) == launcher.wait(SECONDS) == 0, run.told()
    books = run.check(steps=8)
    assert books["rollouts"] == 8 * Q * K
    assert len(run.begun()) == 4, "none failed"


TMPFS = 'mount -t tmpfs -o size="$0" tmpfs "$1" && shift && exec "$@"'


@pytest.mark.parametrize(("below", "size", "waits"), [("trajectories", "128k", "worker"), ("weights", "1m", "trainer")])
def test_a_full_disk(make, below: str, size: str, waits: str):
    """A small file system of the run's own is filled by another until somebody noticed, and then emptied."""
    own = ["unshare", "-Urm", "sh", "-c", TMPFS, size]
    if shutil.which("unshare") is None or subprocess.run([*own, "/mnt", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    run = make()
    folder = run.path / below
    folder.mkdir(parents=True)
    launcher = run.start("train", before=[*own, folder])
    run.wait_for_step(2)
    within = Path(f"/proc/{launcher.pid}/root{folder}/filler")
    with suppress(OSError), within.open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(1024))
    logs = [f"{waits}-{name}" for name in ("main", "clerk", "0")]
    wait_for(lambda: "No space left on device" in "".join(map(run.said, logs)), run)
    within.unlink()
    run.finish(launcher)
    run.check()
    assert len(run.begun()) == 3, "nothing was restarted: they waited"


def test_a_soak_of_random_kills(make):
    """KILLS_IN_SOAK random kills in one run, of any process, at any moment: also while it starts; now and then of the
    launcher. The run has no end until then."""
    kills, chance = int(os.environ.get("KILLS_IN_SOAK", "5")), random.Random()
    run = make(sampling={"workers": 2, "max_staleness": 1}, steps=10**6, store={"lease": 1.0})
    launcher, resume, died = run.start("train"), ["train", "--resume"], Counter[str]()
    run.wait_for_step(1)
    with closing(open_store(run.config)) as store:
        for number in range(1, kills + 1):
            more = store.balance()["rollouts"] + chance.randrange(3 * Q * K)
            wait_for(lambda more=more: store.balance()["rollouts"] >= more, run)
            time.sleep(chance.uniform(0.0, 0.2))
            living = wait_for(run.living, run)
            pid = launcher.pid if number % 20 == 0 else chance.choice([*living])
            died[living.get(pid, "launcher")] += 1
            with suppress(ProcessLookupError):  # it ended by itself just now
                os.kill(pid, signal.SIGKILL)
            if pid == launcher.pid:
                launcher.wait()
                launcher = run.start(*resume)
        run.wait_for_step(max(run.steps().values()) + 1)
    launcher.send_signal(signal.SIGINT)
    wait_for(lambda: launcher.poll() is not None, run)
    assert launcher.returncode == 130, run.told()
    steps = max(run.steps().values()) + 3
    run.finish(run.start(*resume, "--set", f"steps={steps}"))
    run.check(steps=steps)
    run.tell(f"{kills} kills: {dict(died)}")


def test_a_second_trainer_of_an_agent_and_one_that_was_taken_for_dead(make, tmp_path: Path):
    """On machines that see no locks of each other's files. While a trainer lives, another gives up. When it is stopped,
    another takes over, and whatever it still writes when it wakes up, the run long over, is refused."""
    stop = fault("main", "Store.publish", 4) | {"signal": signal.SIGSTOP}
    plan = {"alone": ["main"], "lone": True, "faults": [stop]}
    run = make(plan, store={"lease": 2.0, "url": f"sqlite:///{tmp_path}/shared.db"}, steps=8)
    trainer = ["agent", "--name", "main"]
    first = run.start(*trainer)
    wait_for(lambda: "main" in run.steps(), run)
    assert run.start(*trainer, "--set", f"run_dir={tmp_path}/elsewhere/run").wait(SECONDS) == 1
    assert "trainer:main of run 'run' is held by holder-" in run.log.read_text()
    launcher = run.start("train")
    wait_for((run.folder / "fault-0").exists, run)
    folder = run.path / "agents" / "main"
    folder.rename(tmp_path / "before")  # with the lock that the first has on it
    shutil.copytree(tmp_path / "before", folder)
    second = run.start(*trainer)
    assert second.wait(SECONDS) == launcher.wait(SECONDS) == 0, run.told()
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait(SECONDS) == 1
    assert "Fenced: trainer:main of run 'run' is held by None" in (run.folder / "out-0.txt").read_text()
    run.check(steps=8)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    two = Hosts()
    try:
        two.open()
    except (subprocess.CalledProcessError, OSError) as error:
        two.close()
        pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', None) or error}")
    yield two
    two.close()


@pytest.fixture
def far_server(hosts: Hosts) -> Iterator[Server]:
    if reason := why_not():
        pytest.skip(reason)
    server = Server()
    yield server
    server.remove()


def test_two_hosts_and_a_cut_cable(make, hosts: Hosts, far_server: Server):
    """Store and trainers on one host, the worker on the other; the cable is cut until the worker's leases are over."""
    name = urlsplit(far_server.create()).path.removeprefix("/")
    url, tls = far_server.url(name, HERE), "auto" if far_server.tls else "off"
    run = make({"alone": ["0"]}, store={"url": url, "tls": tls, "lease": 2.0}, steps=10)
    launcher = run.start("train")
    wait_for(lambda: len(run.steps()) == 2, run)
    worker = run.start("rollout", "--name", "worker-0", before=hosts.on_the_second())
    run.wait_for_step(2)
    with closing(open_store(run.config)) as store:
        wait_for(lambda: store.status()["leases"], run)
        with hosts.cut():
            wait_for(lambda: store.status()["leases"]["worker-0"]["seconds"] < -8.0, run)
    assert worker.wait(SECONDS) == launcher.wait(SECONDS) == 0, run.told()
    run.check(steps=10)
    assert len(run.begun()) == 3
