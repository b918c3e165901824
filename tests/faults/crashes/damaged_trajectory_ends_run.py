"""One trajectory file of a sealed group that is gone or torn ends every trainer that claims the group, at each restart.

There is no way on but to edit the store: a group can neither be given up (expired) nor be sampled anew.
"""

import signal
import sqlite3

from reproduction import cannot, fault, held
from reproduction.runs import LIMIT, check_healthy_run, mgrpo, new_folder, pause, raw, start, stop, wait_for, write

check_healthy_run()
folder = new_folder()
store = {"url": f"sqlite:///{folder}/store.db", "lease": 2.0}
config = write(folder, raw(folder, topology="cluster", store=store, steps=2))
status, said = mgrpo("store", "init", config)
if status != 0:
    cannot(said)


def count(what: str) -> int:
    with sqlite3.connect(f"file:{folder}/store.db?mode=ro", uri=True) as db:
        return db.execute(f"select count(*) from {what}").fetchone()[0]


trainers = [start("agent", config, "--name", name, out=folder / f"{name}.txt") for name in ("main", "clerk")]
worker = start("rollout", config, "--name", "w", out=folder / "w.txt")
wait_for(lambda: count("publications") >= 2)
pause(folder / "store.db", *trainers)  # the groups are sealed before any trainer reads them
wait_for(lambda: count("groups where state in ('sealed', 'leased', 'acked')") >= 4)
lost = min((folder / "run/trajectories").glob("main-*"))
lost.unlink()
for trainer in trainers:
    trainer.send_signal(signal.SIGCONT)
first = trainers[0].wait(LIMIT)
second, _ = mgrpo("agent", config, "--name", "main")
third, said = mgrpo("agent", config, "--name", "main")
print("the first start said:", (folder / "main.txt").read_text()[-300:])
for process in (*trainers, worker):
    stop(process)
if second == 0:
    held("the run went on")
fault(f"exit statuses of three starts of the trainer of main: {first}, {second}, {third}: {said.strip()[-250:]}")
