"""Start the loggers of a run, each in its own process, and end them with the run.

A logger never holds a run up: it reads the files that the run writes anyway. At the start the run waits until each has
said that its key is there; at the end each gets log.patience seconds, and is then killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType

import msgspec

from mgrpo.engine.config.schema import Config, dump_config
from mgrpo.engine.report.loggers.choose import NEEDS_NOTHING, check_installed, label
from mgrpo.engine.report.loggers.feed import BEGIN, Note, Order
from mgrpo.engine.run.directory import RunPaths
from mgrpo.engine.system import secrets
from mgrpo.engine.system.files import make_private, open_private
from mgrpo.engine.system.process import Interrupted

COMMAND = (sys.executable, "-P", "-m", "mgrpo.engine.report.loggers.feed")  # -P: as for the processes of a run
READY = 60.0  # seconds in which a logger has to find its library and its key
QUIET = 2.0  # seconds to wait for loggers at the end without a word
LAST = 300  # characters of its output that are shown of a logger that died


class LoggerProcess:
    """Hold the process of one logger. say: shows a line; it is called from another thread."""

    def __init__(self, to: str, config: Config, folder: Path, say: Callable[[str], None]) -> None:
        self.to, self.say = to, say
        self.begun = self.ending = self.ended = False  # whether the run has, and whether all is said of the logger
        self.log = RunPaths(folder).loggers / f"{label(to)}.txt"
        self.first: SimpleQueue[Note] = SimpleQueue()  # its answer to the order
        order = Order(to, str(folder), dump_config(config), config.log.patience)
        inherited = {key: value for key, value in os.environ.items() if key not in secrets.NAMES}
        names = secrets.NAMES[:1] if config.log.rollouts else ()  # the store's, to read episodes
        with open(self.log, "ab", opener=open_private) as log, secrets.passed(names) as (where, pipe):
            self.before = log.tell()
            self.process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=inherited | where,
                pass_fds=pipe,
                process_group=0,  # Ctrl-C is for the run, whose last rows are to be logged
            )
        self.tell(msgspec.json.encode(order))
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def tell(self, line: bytes) -> None:
        """Send a line to the process, if it is still there."""
        assert self.process.stdin
        with suppress(BrokenPipeError):
            self.process.stdin.write(line + b"\n")
            self.process.stdin.flush()

    def refused(self) -> str:
        """Wait for the check, and return why the logger cannot log; "" if it can."""
        try:
            return self.first.get(timeout=READY).refused
        except Empty:
            self.say(f"logger {label(self.to)}: not ready after {READY:.0f} s; the run goes on")
            return ""

    def begin(self) -> None:
        """Tell the process that the run begins."""
        self.begun = True
        self.tell(BEGIN.encode())

    def end(self, status: str) -> None:
        """Tell the process how the run ended, and that it is to end."""
        self.ending = True
        self.tell(status.encode())

    def join(self, seconds: float) -> bool:
        """Wait for the end of the process; return whether it has ended."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(max(seconds, 0.0))
        return self.process.returncode is not None

    def close(self) -> None:
        """Kill the process and what it has started."""
        self.ended = True
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.listener.join(1.0)  # what it has started and kept its output open with may live on
        for pipe in (self.process.stdin, self.process.stdout) if not self.listener.is_alive() else ():
            assert pipe
            with suppress(BrokenPipeError):
                pipe.close()

    def last_words(self) -> str:
        """Return the end of what the process printed."""
        with self.log.open("rb") as file:
            file.seek(max(self.before, self.log.stat().st_size - LAST))
            return " ".join(file.read().decode(errors="replace").split("\n")).strip()

    def _listen(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            note = msgspec.json.decode(line, type=Note)
            if note.say:
                self.say(note.say)
            else:
                self.ended = bool(note.refused)
                self.first.put(note)
        status = self.process.wait()
        if not self.ended:
            self.first.put(Note(refused=f"its process ended with status {status}: {self.last_words()}"))
            if self.begun and (status or not self.ending):
                self.say(f"logger {label(self.to)} ended with status {status}, the run goes on: see {self.log}")


class Loggers:
    """Log a run while it lasts: a context manager.

    Entering raises ValueError naming log.to if a logger is not installed, has no key, or is no class of the user.
    folder: the run's directory; anew: the run begins, so that nothing was logged of it.
    """

    def __init__(self, config: Config, folder: Path, say: Callable[[str], None], anew: bool = False) -> None:
        self.config, self.folder, self.say, self.anew = config, folder, say, anew
        self.processes: list[LoggerProcess] = []

    def __enter__(self) -> Loggers:
        check_installed(self.config.log.to)
        if self.config.log.to:
            make_private(RunPaths(self.folder).loggers)
        for to in self.config.log.to:
            if self.anew:
                (RunPaths(self.folder).loggers / f"{label(to)}.json").unlink(missing_ok=True)
            self.processes.append(LoggerProcess(to, self.config, self.folder, self.say))
        try:
            _check_ready(self.processes)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        stopped = kind is not None and issubclass(kind, Interrupted | KeyboardInterrupt)
        try:
            self.end("finished" if kind is None else "stopped" if stopped else "failed")
        finally:
            self._close()

    def begin(self) -> None:
        """Begin to log: the run has passed its checks. Without this call, a run that ends is not logged at all."""
        for process in self.processes:
            process.begin()

    def end(self, status: str) -> None:
        """Give the loggers their time to log what is left."""
        for process in self.processes:
            process.end(status)
        patience, began, told = self.config.log.patience, time.monotonic(), False
        while slow := [each for each in self.processes if not each.join(0.05)]:
            waited = time.monotonic() - began
            if waited > patience:
                break
            if waited > QUIET and not told:
                told = True
                self.say(f"waiting up to {patience:.0f} s for {_names(slow)}; press Ctrl-C not to wait")
        for process in slow:
            more = f"`mgrpo log {self.folder}` logs what is missing"
            self.say(f"logger {label(process.to)} did not end in {patience:.0f} s and is ended; {more}")

    def _close(self) -> None:
        for process in self.processes:
            process.close()


def check_loggers(config: Config) -> None:
    """Check that the loggers of a config are installed and have their keys. Raises ValueError as `Loggers` does."""
    check_installed(config.log.to)
    with tempfile.TemporaryDirectory() as folder:
        make_private(RunPaths(folder).loggers)
        to_ask = [to for to in config.log.to if to not in NEEDS_NOTHING]
        asked = [LoggerProcess(to, config, Path(folder), print) for to in to_ask]
        try:
            _check_ready(asked)
        finally:
            for process in asked:
                process.close()


def _check_ready(processes: list[LoggerProcess]) -> None:
    for process in processes:
        if process.to not in NEEDS_NOTHING and (why := process.refused()):
            raise ValueError(f"log.to: {process.to!r} given: {why}")


def _names(processes: list[LoggerProcess]) -> str:
    return "logger " + ", ".join(label(process.to) for process in processes)
