"""`tasks()` whose order differs between processes makes the rollouts of one group ask different tasks, silently.

Here it iterates over a set of names; a data file that changed before a --resume does the same. A worker asks the task
at its own place in the list and never compares it with the task id that its query lease names, so that the group's
advantages compare unlike things.
"""

import os
import signal
import sqlite3
import time
from pathlib import Path

from transformers import AutoTokenizer

from mgrpo.engine.run.trajectories import Position, read
from reproduction import cannot, fault, held
from reproduction.runs import ENVIRONMENT, LIMIT, check_healthy_run, logs, new_folder, raw, start, stop, write

SOURCE = (
    ENVIRONMENT
    + """
    def tasks(self, split):
        # A set has another order in every process.
        return [Task(name, {}) for name in {f"{split} {i}" for i in range(50)}]
    def prompt(self, call):
        import time
        time.sleep(0.3)
        return f"{call.agent} {call.task.id}\\n"
"""
)
SIZE = 12  # rollouts of the one group


def children(launcher: int) -> dict[str, int]:
    """Return the launcher's processes by name (main, clerk, worker-0)."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            mine = int(stat.read_text().rpartition(")")[2].split()[1]) == launcher
            words = (stat.parent / "cmdline").read_bytes().decode().split("\0") if mine else []
        except (FileNotFoundError, ProcessLookupError):
            continue
        if "--name" in words:
            found[words[words.index("--name") + 1]] = int(stat.parent.name)
    return found


def recorded() -> int:
    try:
        with sqlite3.connect(f"file:{store}?mode=ro", uri=True, timeout=5) as db:
            return db.execute("select count(*) from rollouts").fetchone()[0]
    except sqlite3.Error:
        return 0


check_healthy_run()
folder = new_folder()
changes = {"algorithm": {"rollouts": SIZE}, "queries_per_step": 1, "steps": 1, "compute": {"concurrency": 4}}
config = write(folder, raw(folder, SOURCE, eval={"questions": 1}, store={"lease": 2.0}, restarts=20, **changes))
store = folder / "run/store.db"
# Forked processes would share the hash seed, hence the order of a set.
launcher = start("train", config, out=folder / "out", forked=False)
killed, until = False, time.monotonic() + 2 * LIMIT
while launcher.poll() is None and time.monotonic() < until:
    if not killed and store.exists() and 0 < recorded() < SIZE:
        worker = children(launcher.pid).get("worker-0")
        if worker:
            os.kill(worker, signal.SIGKILL)  # its successor goes on with the group that it began
            killed = True
    time.sleep(0.02)
stop(launcher)
if launcher.returncode:
    said = (folder / "out").read_text()[-800:]
    if "task" in said.lower() and "expected" in said:
        held(said)
    cannot(said + logs(folder / "run"))
if not killed:
    cannot("the group was complete before its worker could be killed")
with sqlite3.connect(store) as db:
    (task,) = db.execute("select task from queries where query = 0").fetchone()
    where = db.execute("select file, offset, row from calls where query = 0 and agent = 'main'").fetchall()
tokenizer = AutoTokenizer.from_pretrained(str(folder / "model"))
trajectories = read(str(folder / "run/trajectories"), [Position(*row) for row in where])
shown = [tokenizer.decode(found.tokens[~found.sampled]) for found in trajectories]
asked = {text.split("\n")[0].removeprefix("main ") for text in shown}
if asked != {task}:
    fault(f"trained, status 0, on one group: its task in the store is {task!r}, its rollouts asked {sorted(asked)}")
held(f"all of task {task!r}")
