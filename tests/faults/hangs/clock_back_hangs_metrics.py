"""A clock that was ahead and then went back makes each trainer hang at its first row of metrics, without a word.

TensorBoard's file names hold the second, so the writer waits until the clock has passed that of the newest file. After
a wrong clock on one machine, a virtual machine that resumed, or a copied run directory, that may take a day.
"""

import threading
import time

from mgrpo.engine.run.directory import RunDirectory
from reproduction import cannot, fault, held
from reproduction.runs import LIMIT, new_folder

run = RunDirectory(new_folder() / "run")


def logs_a_row(step: int, limit: float) -> bool:
    """Return whether a row of metrics was logged within `limit` seconds."""
    done = threading.Event()

    def log() -> None:
        run.log_metrics({"stage": "rl", "step": step, "loss": 1.0})
        done.set()

    threading.Thread(target=log, daemon=True).start()
    return done.wait(limit)


if not logs_a_row(0, LIMIT):
    cannot("a row could not be logged with a right clock")
run = RunDirectory(new_folder() / "run")
board = run.path / "tensorboard/rl"
board.mkdir(parents=True)
(board / f"events.out.tfevents.{int(time.time()) + 86400}.host.1.0").touch()  # written when the clock was a day ahead
if not logs_a_row(1, min(LIMIT, 60)):
    fault("log_metrics hung for a minute, and would for a day, without a word")
held("logged")
