"""`mgrpo store gc` deletes a file that a living worker of a cluster still writes to; trainers then end for good.

gc refuses while "the run is alive", judged by roles and query leases. A worker that waits for work has neither. While
the trainers are stopped (preempted, being restarted), gc deletes the file that the worker has open, the worker appends
to the unlinked file, and every trainer that comes to those groups ends with FileNotFoundError.
"""

import signal
import sqlite3
import subprocess
import time

from reproduction import cannot, fault, held
from reproduction.runs import LIMIT, check_healthy_run, mgrpo, new_folder, pause, raw, start, stop, wait_for, write

check_healthy_run()
folder = new_folder()
store = {"url": f"sqlite:///{folder}/store.db", "lease": 2.0}
config = write(folder, raw(folder, topology="cluster", queries_per_step=1, store=store, steps=3))
status, said = mgrpo("store", "init", config)
if status != 0:
    cannot(said)


def count(what: str) -> int:
    with sqlite3.connect(f"file:{folder}/store.db?mode=ro", uri=True) as db:
        return db.execute(f"select count(*) from {what}").fetchone()[0]


def train(steps: int) -> list[subprocess.Popen[bytes]]:
    more = ("--set", f"steps={steps}")
    return [start("agent", config, "--name", name, *more, out=folder / f"{name}.txt") for name in ("main", "clerk")]


def end(trainer: subprocess.Popen[bytes]) -> int | None:
    try:
        return trainer.wait(LIMIT)
    except subprocess.TimeoutExpired:
        stop(trainer)
        return None


def trajectory_files() -> list[str]:
    return sorted(path.name for path in (folder / "run/trajectories").iterdir())


first = start("rollout", config, "--name", "first", "--set", "steps=6", out=folder / "w.txt")
trainers = train(3)
wait_for(lambda: count("groups where state = 'acked'") >= 2)
pause(folder / "store.db", first)  # stands for a worker that has nothing to do, as the other takes every query
time.sleep(3)
second = start("rollout", config, "--name", "second", "--set", "steps=6", out=folder / "w2.txt")
for trainer in trainers:
    trainer.wait(LIMIT)
wait_for(lambda: count("groups where state = 'sealed'") >= 2)
stop(second)  # gone to another job
time.sleep(3)  # leases lapse
before = trajectory_files()
status, said = mgrpo("store", "gc", config)
after = trajectory_files()
print("gc:", status, said.strip(), before, "->", after)
first.send_signal(signal.SIGCONT)
if status != 0:
    stop(first)
    held(f"refused: {said}")
ended = [end(trainer) for trainer in train(6)]
stop(first)
if ended != [0, 0]:
    lost = sorted(set(before) - set(after))
    told = (folder / "main.txt").read_text().strip()[-300:]
    fault(f"gc deleted {lost} under a living worker; the trainers then ended with {ended}: {told}")
held("the run went on")
