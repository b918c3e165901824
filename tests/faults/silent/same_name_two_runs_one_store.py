"""Two runs in directories of the same last name with one store.url are one run to the store, and both train.

The store calls a run by that name alone, and topology local calls a trainer's holder by the host's name alone. So the
second run is let in beside the living first one: two trainers act for each agent, each takes some of the groups, each
publishes weights for all workers. (If the first is over, the second hangs: same_name_after_rm_hangs.py.)
"""

import json
import sqlite3
import time

from reproduction import fault, held
from reproduction.runs import ENVIRONMENT, LIMIT, new_folder, raw, start, stop, wait_for, write

SLOW = (
    ENVIRONMENT
    + """
    def prompt(self, call):
        import time
        time.sleep(0.02)
        return f"{call.agent} {call.task.id}\\n"
"""
)
folder = new_folder()
changes = {"store": {"url": f"sqlite:///{folder}/shared.db"}, "steps": 10**4, "checkpoint": {"every": 5}}
one, two = (
    write(folder, raw(folder, SLOW, run_dir=str(folder / name / "run"), **changes), f"{name}.toml") for name in "ab"
)


def steps(name: str) -> int:
    """Return how many rl steps a run's main agent has taken."""
    file = folder / name / "run/agents/main/metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return sum(row["stage"] == "rl" for row in rows)


first = start("train", one, out=folder / "first")
wait_for(lambda: steps("a"))  # a healthy run takes steps; if it does not, the script ends with status 2
second = start("train", two, out=folder / "second")
until = time.monotonic() + LIMIT
while time.monotonic() < until and second.poll() is None and steps("b") < 3:
    time.sleep(0.2)
time.sleep(5)
before = steps("a"), steps("b")
time.sleep(25)
after = steps("a"), steps("b")
ended, refused = second.poll(), (folder / "second").read_text()[-500:]
with sqlite3.connect(f"file:{folder}/shared.db?mode=ro", uri=True) as db:
    states = db.execute("select agent, state, count(*) from groups group by 1, 2").fetchall()
    holders = db.execute("select role, holder from roles").fetchall()
first_ended, told = first.poll(), (folder / "first").read_text()[-700:]
stop(first)
stop(second)
if ended not in (None, 0) and after[0] > before[0] and first_ended is None:
    held(refused)
fault(
    f"the second run was let in (exit status {ended}). rl steps of agent main in 25 seconds: "
    f"first {before[0]} -> {after[0]} (exit status {first_ended}), second {before[1]} -> {after[1]}; "
    f"holders {holders}; groups {states};\nfirst said: …{told}\nsecond said: …{refused}"
)
