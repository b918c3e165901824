"""Inject faults into the processes of whole runs: each run completes, and each agent trains on every group once.

The proof is the history of the weights, not what the store says: every trainer notes which checkpoint it restored and
which queries it trained on (`faults.lineage`).
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
import pytest
from soak import ARMS, LEASE, Soak

from faults import SECONDS, STEPS, K, Q, Run, wait_for
from faulty import Bucket
from hosts import HERE, Hosts, Server
from mgrpo.bench.postgres import PASSWORD, Cluster, why_not
from mgrpo.engine.cli.store import collect
from mgrpo.engine.config.schema import StoreConfig
from mgrpo.engine.store.open import open_store

pytestmark = pytest.mark.faults


@pytest.fixture
def make(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []
    monkeypatch.setenv("MGRPO_STORE_PASSWORD", PASSWORD)

    def tell(line: str) -> None:  # shown at the end of the whole session
        request.node.user_properties.append(("measured", f"{request.node.name}: {line}"))

    def begin(plan: dict[str, Any] | None = None, **changes: Any) -> Run:
        runs.append(Run(tmp_path, tell, plan, **changes))
        return runs[-1]

    yield begin
    for run in runs:
        run.end()


def fault(who: str, method: str, nth: int, when: str = "before") -> dict[str, Any]:
    return {"who": who, "method": method, "when": when, "nth": nth}


KILLS = [  # each kills a process once; a process reaches its kills in this order, one in each of its lives
    fault("worker-0", "InProcessSampler.step", 5),  # in the middle of episodes
    fault("worker-0", "Queries.record", 1, "after"),
    fault("worker-0", "Queries.record", 2),  # trajectories are written, but not recorded
    fault("main", "Policy.optim_step", 2),  # in the middle of a step
    fault("main", "Policy.save_state", 2, "after"),  # the checkpoint is incomplete
    fault("main", "RunDirectory.save_checkpoint", 2, "after"),  # the checkpoint is complete, and nothing is acked
    fault("clerk", "Groups.claim", 2, "after"),
    fault("clerk", "Roles.publish", 4, "after"),  # between optimizer step and checkpoint
    fault("clerk", "Groups.ack", 3, "after"),
]


def test_processes_killed_where_it_hurts_most(make):
    run = make({"faults": KILLS}, sampling={"max_staleness": 1})
    run.finish(run.start("train"))
    run.check()


def test_a_rank_killed_then_the_launcher_and_a_second_one_meanwhile(make):
    """The second of main's two ranks dies, later the launcher. Another launcher that starts too early is refused."""
    run = make({"faults": [fault("main-1", "Policy.optim_step", 2)]}, ranks=2, sampling={"workers": 2})
    launcher = run.start("train")
    run.wait_for_step(3)
    for worker in ("worker-0", "worker-1"):  # so that the run cannot end; the workers must not outlive it
        os.kill(run.pid(worker), signal.SIGSTOP)
    assert run.start("train", "--resume").wait(SECONDS) == 1
    assert "is in use by process" in run.log.read_text()
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not run.living())  # no process is orphaned
    assert min(run.steps().values()) < STEPS
    run.finish(run.start("train", "--resume"))
    run.check()
    ranks = [line for line in run.journal() if line["event"] == "trained" and line["who"] == "main-1"]
    assert {line["step"] for line in ranks} == set(range(STEPS))


LOST = [
    fault("worker-0", "Queries.take", 2, "after"),
    fault("worker-0", "Queries.record", 2, "after"),
    fault("worker-0", "Roles.take_evaluation", 1, "after"),
    fault("worker-0", "Roles.finish_evaluation", 1, "after"),
    fault("main", "Roles.hold", 1, "after"),
    fault("main", "Groups.claim", 2, "after"),
    fault("main", "Groups.ack", 3, "after"),
    fault("clerk", "Roles.publish", 3, "after"),
    fault("clerk", "Groups.claim", 5, "after"),
]


def test_replies_of_the_store_that_are_lost(make):
    """The store acts but its reply is lost: it leased, published, acked or recorded. Every process goes on."""
    run = make({"faults": [lost | {"signal": None} for lost in LOST]})
    run.finish(run.start("train"))
    run.check()
    assert len(run.begun()) == 3


OUTAGES = {  # how the server goes down, for how many seconds at least, and the lease
    "stopped": (signal.SIGINT, 60.0, StoreConfig().lease),
    "crashed": (signal.SIGQUIT, 0.0, 3.0),
}


@pytest.mark.parametrize(("how", "seconds", "lease"), OUTAGES.values(), ids=OUTAGES)
def test_postgresql_goes_and_comes_back(make, server: Cluster, how: signal.Signals, seconds: float, lease: float):
    store = {"url": server.create(), "lease": lease}
    run = make(store=store, sampling={"workers": 2, "max_staleness": 1}, steps=10)
    launcher = run.start("train")
    run.wait_for_step(2)
    server.stop(how)
    back = time.monotonic() + seconds
    try:
        wait_for(lambda: time.monotonic() > back)
        for process in ("trainer-main", "trainer-clerk", "worker-0", "worker-1"):
            wait_for(lambda process=process: "trying again in" in run.said(process), run)
    finally:
        server.start()
    run.finish(launcher)
    run.check(steps=10)
    assert len(run.begun()) == 4, "nothing was restarted: all waited"


def test_a_store_locked_for_longer_than_a_lease(make):
    """SQLite has no server to stop, so another process holds its only lock: no heartbeat, claim or record succeeds."""
    run = make(sampling={"workers": 2}, store={"lease": 1.0})
    launcher = run.start("train")
    run.wait_for_step(2)
    with closing(sqlite3.connect(run.path / "store.db", isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        clock = "SELECT julianday('now') * 86400"
        (began,) = db.execute(clock).fetchone()
        wait_for(lambda: db.execute(clock).fetchone()[0] > began + 3.0)
        held = dict(db.execute("SELECT role, deadline - (julianday('now') - 2440587.5) * 86400 FROM roles"))
        assert held.keys() == {"trainer:main", "trainer:clerk", "worker:worker-0", "worker:worker-1"}
        assert max(held.values()) < 0
        db.execute("ROLLBACK")
    run.finish(launcher)
    run.check()


def test_a_worker_that_comes_back_with_old_weights_wrong_clocks_and_everything_delivered_twice(make):
    """Stop the only worker with episodes that ended but are not recorded, until another has continued the run."""
    stop = fault("worker-0", "Worker._record", 2) | {"signal": signal.SIGSTOP}
    skew = {"worker-0": 5 * 3600.0, "worker-1": -86400.0, "main": -7200.0}
    plan = {"faults": [stop], "skew": skew, "twice": ["worker-0", "worker-1"], "alone": ["1"]}
    run = make(plan, sampling={"workers": 2}, store={"lease": 1.0}, steps=8)
    launcher = run.start("train")
    wait_for((run.folder / "fault-0").exists, run)
    stopped, behind = run.pid("worker-0"), min(run.steps().values())
    other = run.start("rollout", "--name", "worker-1")
    run.wait_for_step(behind + 2)  # the other worker sampled its queries to the end
    os.kill(stopped, signal.SIGCONT)
    assert other.wait(SECONDS) == launcher.wait(SECONDS) == 0, run.told()
    books = run.check(steps=8)
    assert books["rollouts"] == 8 * Q * K
    assert len(run.begun()) == 4, "none failed"


TMPFS = 'mount -t tmpfs -o size="$0" tmpfs "$1" && echo ready && exec sleep 10000'


class SmallDisk:
    """Mount a small file system at a folder, for processes that `within` starts; all others see it at `seen`."""

    def __init__(self, folder: Path, size: str) -> None:
        folder.mkdir(parents=True)
        own = ["unshare", "-Urm", "sh", "-c", TMPFS, size, folder]
        self.holder = subprocess.Popen(own, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self.holder.stdout is not None
        if self.holder.stdout.readline() != b"ready\n":
            pytest.skip("no mount namespaces here")
        self.within = ["nsenter", f"--target={self.holder.pid}", "--user", "--mount", "--preserve-credentials"]
        self.folder, self.seen = folder, Path(f"/proc/{self.holder.pid}/root{folder}")

    @contextmanager
    def filled(self, room: int = 0) -> Iterator[None]:
        """Fill all but `room` bytes, and also what is freed meanwhile, because a trainer deletes old checkpoints."""
        emptied = threading.Event()
        with (self.seen / "filler").open("wb", buffering=0) as filler, ThreadPoolExecutor(1) as another:
            taking = another.submit(self._take_all, filler, room, emptied)
            try:
                yield
            finally:
                emptied.set()
            taking.result()
        (self.seen / "filler").unlink()

    def _take_all(self, filler: FileIO, room: int, emptied: threading.Event) -> None:
        while not emptied.wait(0.01):
            disk = os.statvfs(self.seen)
            with suppress(OSError):
                filler.write(bytes(max(0, disk.f_bavail * disk.f_frsize - room)))

    def keep(self) -> None:
        """Copy its files into the folder itself, where they stay."""
        shutil.copytree(self.seen, self.folder, dirs_exist_ok=True)


@pytest.fixture
def small_disk() -> Iterator[Callable[[Path, str], SmallDisk]]:
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        pytest.skip("no unshare, or no nsenter")
    disks: list[SmallDisk] = []

    def begin(folder: Path, size: str) -> SmallDisk:
        disks.append(SmallDisk(folder, size))
        return disks[-1]

    yield begin
    for disk in disks:
        disk.holder.kill()
        disk.holder.communicate()


TRAINERS = ["trainer-main-0", "trainer-clerk"]


@pytest.mark.parametrize(
    ("below", "size", "waits"), [("trajectories", "128k", ["worker-0"]), ("weights", "1m", TRAINERS)]
)
def test_a_full_disk(make, small_disk, below: str, size: str, waits: list[str]):
    """Another process fills the disk until one of ours noticed, and then empties it. Two ranks wait together."""
    run = make(ranks=2)
    disk = small_disk(run.path / below, size)
    launcher = run.start("train", before=disk.within)
    run.wait_for_step(2)
    with disk.filled():
        wait_for(lambda: "No space left on device" in "".join(map(run.said, waits)), run)
    run.finish(launcher)
    run.check()
    assert len(run.begun()) == 4, "nothing was restarted: they waited"


@pytest.mark.parametrize(("agent", "waits"), [("main", "trainer-main-0"), ("clerk", "trainer-clerk")])
def test_a_full_disk_below_checkpoints_and_metrics(make, small_disk, agent: str, waits: str):
    """All ranks of a trainer wait: first for whatever has no room, then for a checkpoint, while a row still has room.

    Each trainer has its own disk here: if both shared one, a waiting trainer would hold the other up.
    """
    run = make(ranks=2, steps=16, checkpoint={"every": 1})
    disk = small_disk(run.path / "agents" / agent, "8m")
    launcher = run.start("train", before=disk.within)
    for room, told in ((0, "No space left on device"), (64 << 10, "could not be written")):
        run.wait_for_step(min(run.steps().values(), default=0) + 2)
        already = len(run.said(waits))
        with disk.filled(room):
            wait_for(lambda told=told, already=already: told in run.said(waits)[already:], run)
    run.finish(launcher)
    disk.keep()
    run.check(steps=16)
    assert len(run.begun()) == 4, "nothing was restarted: they waited"
    assert "trying again in" not in run.said("trainer-main-1"), "rank 0 says it for all"


def test_a_full_disk_below_sqlite(make, small_disk, tmp_path: Path):
    """SQLite resolves links, so this process cannot open the file before the run is over."""
    disk = small_disk(tmp_path / "small", "2m")
    run = make(store={"url": f"sqlite:///{disk.folder}/store.db"})
    launcher = run.start("train", before=disk.within)
    wait_for(lambda: any(line.get("step", 0) >= 2 for line in run.journal()), run)
    with disk.filled():
        everybody = ("trainer-main", "trainer-clerk", "worker-0")
        wait_for(lambda: "database or disk is full; trying again in" in "".join(map(run.said, everybody)), run)
    run.finish(launcher)
    disk.keep()
    run.check()
    assert len(run.begun()) == 3, "nothing was restarted: they waited"


def test_weights_and_trajectories_in_an_object_store(make, tmp_path: Path):
    """Kill processes while they write there, finish the run, and delete what is left."""
    kills = [
        fault("worker-0", "Queries.record", 2),  # trajectories are written, but not recorded
        fault("main", "Roles.publish", 3),  # weights are written, but not published
        fault("clerk", "Groups.ack", 2, "after"),
    ]
    run = make({"faults": kills}, store={"files": f"bucket://{tmp_path}/bucket"})
    run.finish(run.start("train"))
    run.check()
    assert not [*run.path.glob("weights/*"), *run.path.glob("trajectories/*")]
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    written = {kind: len([*(tmp_path / "bucket" / kind).rglob("*-*")]) for kind in ("weights", "trajectories")}
    assert written["weights"] <= 2 * 3, "old ones were deleted as it ran"
    assert collect(str(run.file)).startswith(f"run local: {written['trajectories'] - 2} files")
    assert len([*(tmp_path / "bucket" / "trajectories").iterdir()]) == 2, "of the two that nobody knows"


def test_a_process_stopped_while_it_writes(make):
    """A stopped process keeps SQLite's only lock. The others wait for it; afterwards nothing is lost or done twice."""
    stop = fault("main", "Roles.fence", 6, "after") | {"signal": signal.SIGSTOP, "within": True}
    run = make({"faults": [stop], "locked": 0.3}, store={"lease": 1.0})
    launcher = run.start("train")
    wait_for((run.folder / "fault-0").exists, run)
    stopped = run.pid("main")
    for process in ("trainer-clerk", "worker-0"):
        told = f"database is locked: process {stopped} writes (stopped); trying again in"
        wait_for(lambda process=process, told=told: told in run.said(process), run)
    os.kill(stopped, signal.SIGCONT)
    run.finish(launcher)
    run.check()
    assert len(run.begun()) == 3, "nothing was restarted: they waited"


def test_sigterm_to_every_process_at_once(make):
    """Slurm sends a signal some time before it kills, also to processes that their launcher asks to stop. Main and the
    worker have no launcher here, as on a cluster. All finish their step and save, and nothing is trained again."""
    run = make({"alone": ["main", "0"]}, checkpoint={"every": 1000})
    launcher = run.start("train")
    wait_for((run.path / "config.json").exists, run)  # the launcher has begun the run
    parts = [run.start("agent", "--name", "main"), run.start("rollout", "--name", "worker-0")]
    run.wait_for_step(2)
    clerk = run.pid("clerk")
    for pid in (clerk, launcher.pid, *(part.pid for part in parts)):
        os.kill(pid, signal.SIGTERM)
    for process in (launcher, *parts):
        wait_for(lambda process=process: process.poll() is not None, run)
    assert [process.returncode for process in (launcher, *parts)] == [130] * 3, run.told()
    assert "SIGTERM: finishing this step and saving" in run.said("trainer-clerk")
    again = [run.start("train", "--resume"), run.start("agent", "--name", "main")]
    again.append(run.start("rollout", "--name", "worker-0"))
    for process in again:
        wait_for(lambda process=process: process.poll() is not None, run)
    assert [process.returncode for process in again] == [0] * 3, run.told()
    run.check()
    steps = Counter((line["who"], line["step"]) for line in run.journal() if line["event"] == "trained")
    assert steps == {(name, step): 1 for name in ("main", "clerk") for step in range(STEPS)}


@pytest.mark.parametrize(
    "arm", [pytest.param(arm, marks=[pytest.mark.nightly] if arm != ARMS[0] else []) for arm in ARMS]
)
def test_a_soak_of_random_kills_and_stops(make, request, arm: str):
    """Kill KILLS_IN_SOAK times and stop STOPS_IN_SOAK times in one run, which cannot end before that."""
    kills, stops = int(os.environ.get("KILLS_IN_SOAK", 5)), int(os.environ.get("STOPS_IN_SOAK", 3))
    kind, _, more = arm.partition("-")
    store = {"lease": LEASE}
    if kind == "postgresql":
        store["url"] = request.getfixturevalue("server").create()
    where = {"topology": "colocated"} if kind == "colocated" else {"sampling": {"workers": 2, "max_staleness": 1}}
    soak = Soak(make(ranks=2 if more else 1, steps=10**6, store=store, **where))
    soak.run.wait_for_step(1)
    soak.disturb(kills, stops)
    soak.finish()
    soak.run.tell(f"{kills} kills and {stops} stops: {dict(soak.done)}")


def test_a_second_trainer_of_an_agent_and_one_that_was_taken_for_dead(make, tmp_path: Path):
    """Two trainers on machines that do not see each other's file locks. While one lives, the other gives up. When the
    first is stopped, the other takes over, and what the first writes when it wakes up after the run is refused."""
    stop = fault("main", "Roles.publish", 4) | {"signal": signal.SIGSTOP}
    plan = {"alone": ["main"], "lone": True, "faults": [stop]}
    run = make(plan, store={"lease": 2.0, "url": f"sqlite:///{tmp_path}/shared.db"}, steps=8)
    trainer = ["agent", "--name", "main"]
    first = run.start(*trainer)
    wait_for(lambda: "main" in run.steps(), run)
    elsewhere = tmp_path / "elsewhere" / "run"
    elsewhere.mkdir(parents=True)
    shutil.copy(run.path / "run.json", elsewhere)  # the same run, as the other machine sees it
    assert run.start(*trainer, "--set", f"run_dir={elsewhere}").wait(SECONDS) == 1
    assert re.search(r"where the same run \w+ is at work", run.log.read_text())
    launcher = run.start("train")
    wait_for((run.folder / "fault-0").exists, run)
    folder = run.path / "agents" / "main"
    folder.rename(tmp_path / "before")  # the first keeps its lock on it
    shutil.copytree(tmp_path / "before", folder)
    second = run.start(*trainer)
    assert second.wait(SECONDS) == launcher.wait(SECONDS) == 0, run.told()
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait(SECONDS) == 1
    assert "FencedError: trainer:main of run 'run' is held by None" in (run.folder / "out-0.txt").read_text()
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
    """Cut the network between the worker's host and that of store and trainers until the worker's leases lapse."""
    name = urlsplit(far_server.create()).path.removeprefix("/")
    url, tls = far_server.url(name, HERE), "auto" if far_server.tls else "off"
    run = make({"alone": ["0"]}, store={"url": url, "tls": tls, "lease": 2.0}, steps=10)
    launcher = run.start("train")
    wait_for(lambda: len(run.steps()) == 2, run)
    worker = run.start("rollout", "--name", "worker-0", before=hosts.on_the_second())
    run.wait_for_step(2)
    with closing(open_store(run.config)) as store:

        def end_of_the_lease() -> str | None:
            lease = store.audit.status()["leases"].get("worker-0")
            return "given back" if lease is None else "lapsed" if lease["seconds"] < -8.0 else None

        end = ""
        while end != "lapsed":  # again if the worker gave its lease back just before the cut
            wait_for(lambda: store.audit.status()["leases"], run)
            with hosts.cut():
                end = wait_for(end_of_the_lease, run)
    assert worker.wait(SECONDS) == launcher.wait(SECONDS) == 0, run.told()
    run.check(steps=10)
    assert len(run.begun()) == 3
