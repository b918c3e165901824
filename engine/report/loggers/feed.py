"""Feed one logger with the rows of a run: the program of a logger's process.

Nothing of the run waits for it. The metrics files are its queue, so that it may lag behind, and what it has sent stands
in the run directory, so that it can go on later. It is told on its standard input what to do (an `Order`), then
that the run begins, and then how it ended; the end of the input alone says that the run's process is gone. It answers
in `Note`s on its standard output; what the logger prints goes to the standard error, a file in the run directory.
"""

from __future__ import annotations

import fcntl
import os
import secrets as random
import shutil
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from mgrpo.engine.config.schema import read_dump
from mgrpo.engine.report.loggers.base import STATUSES, LoggedRun, Logger, public_config
from mgrpo.engine.report.loggers.choose import label, make_logger
from mgrpo.engine.report.loggers.episodes import StepEpisodes
from mgrpo.engine.report.loggers.rows import NewRows
from mgrpo.engine.report.metrics import place_of
from mgrpo.engine.run.directory import RunPaths
from mgrpo.engine.run.metrics import Row, is_evaluation
from mgrpo.engine.system import secrets
from mgrpo.engine.system.files import replacing

BEGIN = "begin"  # what says that the run begins
LOOK = 0.5  # seconds between looks for new rows
LONGEST_PAUSE = 30.0  # seconds before a call that raised is made again: 1, 2, 4, … up to this
PATIENCE = 600.0  # seconds after which a row that always raises is given up; a service may be away for that long
LAST_TRIES = 3  # how often a call is made again once the run has ended
GRACE = 15.0  # seconds that the run's process, if it lives, has to end this one before it ends itself
SCARCE = 64 << 20  # bytes; with less free space nothing is logged, because the run itself needs them
PIECE = 50  # rows after which it is written down that they were sent


class Order(msgspec.Struct):
    """Say what to do. config: as `dump_config` writes it; patience: seconds in which to end."""

    to: str
    folder: str
    config: str
    patience: float


class Note(msgspec.Struct, omit_defaults=True):
    """Tell the run's process something. refused: why the run cannot begin with this logger; say: to be shown."""

    ready: bool = False
    refused: str = ""
    say: str = ""


class Sent(msgspec.Struct):
    """Say what a logger was sent: rows in all, the last step, and the steps of evaluations. skipped: rows given up."""

    id: str
    rows: int = 0
    skipped: int = 0
    stage: int = 0
    step: int = -1
    evaluations: list[int] = []

    def has(self, row: Row) -> bool:
        """Return whether a row of this step, or of this step's evaluation, was sent."""
        if is_evaluation(row):
            return row["step"] in self.evaluations
        return place_of(row)[:2] <= (self.stage, self.step)

    def add(self, row: Row) -> None:
        """Count a row as sent."""
        self.rows += 1
        if is_evaluation(row):
            self.evaluations.append(row["step"])
        else:
            self.stage, self.step = place_of(row)[:2]


class End:
    """Wait for the end of the run, and end this process some time after it, whatever it does then."""

    def __init__(self, patience: float) -> None:
        self.status, self.patience, self._come = "", patience, threading.Event()
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        word = sys.stdin.readline().strip()
        self.status = word if word in STATUSES else "failed"
        self._come.set()
        time.sleep(self.patience + GRACE)
        os._exit(1)

    def has_come(self) -> bool:
        """Return whether the run has ended."""
        return self._come.is_set()

    def wait(self, seconds: float) -> None:
        """Wait, but only a second if the run has ended, or until it does."""
        if self._come.is_set():
            time.sleep(min(seconds, 1.0))
        else:
            self._come.wait(seconds)


class Feed:
    """Send the rows of one run to one logger, until the run has ended."""

    def __init__(self, order: Order, logger: Logger, end: End, tell: Callable[[Note], None]) -> None:
        self.config, self.folder = read_dump(order.config), Path(order.folder)
        self.logger, self.end, self.tell, self.name = logger, end, tell, label(order.to)
        self.state = RunPaths(self.folder).loggers / f"{self.name}.json"
        self.sent = self._read_state()
        self.rows = NewRows(self.folder, self.config)
        self.complained: set[str] = set()
        self.waiting: list[Row] = []  # rows that were read and not sent
        self.episodes: StepEpisodes | None = None  # made when they are needed: tokenizers take seconds to load

    def run(self) -> None:
        """Send rows as they come, and the rest when the run has ended."""
        if self._patiently(self._begin, float("inf")):
            while not (over := self.end.has_come()):
                self._look(over)
                self.end.wait(LOOK)
            self._look(over)
            self._patiently(lambda: self.logger.finish(self.end.status), 0.0)
        else:
            self.waiting = self.rows.read(over=True)
        self.rows.close()
        self._save()
        if self.sent.skipped:
            self._say("rows", f"{self.sent.skipped} rows are missing, because they could not be logged")
        if self.waiting:
            self._say("left", f"{len(self.waiting)} rows are not logged yet; `mgrpo log {self.folder}` logs them")

    def _begin(self) -> None:
        if self.logger.replays:
            self.sent = Sent(self.sent.id)
        log = self.config.log
        where = self.logger.begin(
            LoggedRun(
                id=self.sent.id,
                project=log.project,
                name=log.name or self.folder.name,
                tags=log.tags,
                folder=self.folder,
                config=public_config(self.config),
                rows=self.sent.rows,
            )
        )
        if where:
            self._say("where", where)

    def _look(self, over: bool) -> None:
        if shutil.disk_usage(self.folder).free < SCARCE:
            self._say("room", "nothing is logged while the disk is nearly full; the run's own files come first")
            return
        rows = self.rows.read(over)
        if self.logger.replays and any(self.sent.has(row) for row in rows if not is_evaluation(row)):
            self.waiting, rows = [], self._again(over)  # the run went back to a checkpoint
        self.waiting += [row for row in rows if not self.sent.has(row)]
        while self.waiting and (self.sent.has(self.waiting[0]) or self._send(self.waiting[0])):
            del self.waiting[0]
            if self.sent.rows % PIECE == 0:
                self._save()
        if rows:
            self._save()

    def _again(self, over: bool) -> list[Row]:
        self.rows.close()
        self.rows = NewRows(self.folder, self.config)
        self._patiently(self._begin, PATIENCE)
        return self.rows.read(over)

    def _send(self, row: Row) -> bool:
        """Send a row, or count it as skipped; return False if the run is over and the row could not be sent."""
        if self.config.log.rollouts and row["stage"] == "rl" and not is_evaluation(row):
            self._send_rollouts(row["step"])
        done = self._patiently(lambda: self.logger.numbers(row["step"], numbers_of(row)), PATIENCE)
        if not done and self.end.has_come():
            return False
        self.sent.add(row)
        self.sent.skipped += not done
        return True

    def _send_rollouts(self, step: int) -> None:
        """Send some episodes of a step, or none if they cannot be read, as when their files are deleted already."""
        try:
            self.episodes = self.episodes or StepEpisodes(self.folder, self.config)
            some = self.episodes.of(step)
        except (OSError, ValueError) as error:
            return self._say("episodes", f"no episodes of step {step}: {error}")
        if some and not self._patiently(lambda: self.logger.rollouts(step, some), PATIENCE):
            self._say("unsent", f"the episodes of step {step} could not be logged")

    def _patiently(self, call: Callable[[], Any], patience: float) -> bool:
        """Call until nothing is raised, and return True; False after a while, and soon if the run has ended."""
        due, pause, tries = time.monotonic() + patience, 1.0, 0
        while True:
            try:
                call()
                return True
            except (Exception, SystemExit) as error:  # code of a library or of the user, which may raise anything
                self._say("error", f"{type(error).__name__}: {error}; the run goes on, and this is tried again")
            tries += self.end.has_come()
            if tries > LAST_TRIES or (time.monotonic() > due and not self.end.has_come()):
                return False
            self.end.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _say(self, kind: str, text: str) -> None:
        """Have something shown, once of each kind."""
        if kind not in self.complained:
            self.complained.add(kind)
            self.tell(Note(say=f"logger {self.name}: {text}"))
        elif kind == "error":
            print(text, file=sys.stderr, flush=True)

    def _read_state(self) -> Sent:
        """Return what was sent before. A file that is damaged counts as none, so that the run is logged anew."""
        with suppress(FileNotFoundError, msgspec.DecodeError):
            return msgspec.json.decode(self.state.read_bytes(), type=Sent)
        return Sent(random.token_hex(4))

    def _save(self) -> None:
        try:
            with replacing(self.state, durable=False) as aside:
                aside.write_bytes(msgspec.json.encode(self.sent))
        except OSError as error:
            self._say("state", f"{error}; rows may be logged again when the run goes on")


def numbers_of(row: Row) -> dict[str, float]:
    """Return the numbers of a row by their keys, with "warmup/" before those of the warm-up."""
    prefix = "warmup/" if row["stage"] == "warmup" else ""
    numbers = {key: value for key, value in row.items() if key != "step" and isinstance(value, int | float)}
    return {prefix + key: value for key, value in numbers.items()}


def main() -> None:
    """Check the logger; then feed it, if the run begins."""
    secrets.take()
    notes = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    order = msgspec.json.decode(sys.stdin.readline(), type=Order)

    def tell(note: Note) -> None:
        with suppress(BrokenPipeError):  # nobody is there any more
            notes.write(msgspec.json.encode(note) + b"\n")

    try:
        logger = make_logger(order.to)
        logger.check()
    except (Exception, SystemExit) as error:  # code of a library or of the user, which may raise anything
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        return tell(Note(refused=text))
    tell(Note(ready=True))
    if sys.stdin.readline().strip() == BEGIN:
        end = End(order.patience)
        with (RunPaths(order.folder).loggers / f"{label(order.to)}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the process of an earlier attempt may still send what is left
            Feed(order, logger, end, tell).run()
        sys.stderr.flush()
        os._exit(0)  # threads that a library left behind must not keep the run waiting


if __name__ == "__main__":
    main()
