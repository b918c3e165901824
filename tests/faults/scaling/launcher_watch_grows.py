"""The time that the launcher of a local run needs to see one new row of metrics grows with the steps done.

It keeps every row of every process in memory and merges all of them anew each second in which one row was added, in
the thread that watches the processes.
"""

import json
import time
from pathlib import Path

import msgspec

from mgrpo.engine.report.follow import Watch
from reproduction import fault, held
from reproduction.runs import new_folder
from toy import make_model, toy_config

ROW = {"stage": "rl", "reward_mean": 0.5, "time/step": 1.0} | {f"metric_{j}": 0.1 for j in range(40)}


class Silent:
    """A display that shows nothing."""

    def __getattr__(self, name):
        return lambda *_: None


folder = new_folder()
make_model(folder / "model")
config = msgspec.structs.replace(toy_config(folder, topology="local"), steps=10**6)
run = Path(config.run_dir)


def look_seconds(steps: int) -> float:
    """Return the least CPU seconds of three looks for one new row each, in a run of so many steps."""
    for name in ("agents/main", "agents/clerk", "workers/worker-0"):
        (run / name).mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(ROW | {"step": step}) + "\n" for step in range(steps))
        (run / name / "metrics.jsonl").write_text("".join(lines))
    watch, seconds = Watch(config, Silent()), []
    for more in range(3):
        with (run / "agents/main/metrics.jsonl").open("a") as file:
            file.write(json.dumps(ROW | {"step": steps + more}) + "\n")
        began = time.process_time()
        watch.look({})
        seconds.append(time.process_time() - began)
    return min(seconds)


few, many = look_seconds(500), look_seconds(10_000)
times = f"one look for one new row: {1000 * few:.0f} ms after 500 steps, {1000 * many:.0f} ms after 10,000"
if many > 4 * few:
    fault(times)
held(times)
