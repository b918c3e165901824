"""Supervise the processes of a run on one machine: start, watch, restart after failures, and stop them in order.

A *task* is one process, or the ranks of one trainer, which live and die together: if one of them fails, the others are
killed and all are started again, after a longer pause each time, at most `restarts` times in the run. Meanwhile the
other tasks go on. The output of each process is appended to its own log file.

No process is left behind: each leads a process group, so that what it started itself ends with it, and holds the read
end of a pipe of the launcher (`process.die_with_launcher`), so that all groups end if the launcher does, even by
kill -9.

Unlike this, torchrun's elastic agent listens on every interface, kills ranks that take more than 30 s to save after
Ctrl-C, leaves them running when it is killed itself, and is one process with torch loaded per agent.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mgrpo.engine.system import secrets
from mgrpo.engine.system.files import open_private
from mgrpo.engine.system.process import AGAIN, FINAL, LIFELINE, START_AGAIN, Interrupted, asked_to_end

POLL = 0.1  # seconds between polls of the processes
GRACE = 600.0  # seconds that a process has to finish its step and save after it was asked to
LAST_GRACE = 10.0  # seconds from SIGTERM to SIGKILL
LONGEST_DELAY = 30.0  # seconds before a restart: 1, 2, 4, … up to this
LAST_LINES, LAST_BYTES = 10, 4096  # how much of the end of a log an error shows


@dataclass(frozen=True)
class ProcessSpec:
    """Describe a task: `command` is run once with each of `environments`, added to the environment of this process.

    environments: a function of the number of the attempt, from 0, so that the ranks of a new attempt can meet in a new
    place. service: runs until all other tasks have finished, then gets SIGTERM. finished: whether its work is done; a
    process that ends with status 0 before that, because other code ended it, has failed. secret_names: the
    secrets that it gets.

    A process that ends with status START_AGAIN is started again at once, and that does not count as a failure. After
    one that ends with status FINAL, none is started again.
    """

    name: str
    command: Sequence[str]
    environments: Callable[[int], Sequence[Mapping[str, str]]] = lambda attempt: ({},)
    service: bool = False
    finished: Callable[[], bool] = lambda: True
    secret_names: Sequence[str] = secrets.NAMES


@dataclass
class Member:
    """Hold one process of a task."""

    process: subprocess.Popen[bytes]
    log: Path
    begun: int  # offset in the log at which this attempt begins

    def poll(self) -> int | None:
        """Return the exit status (negative for a signal), or None; if it has ended, its process group is gone too."""
        if self.process.returncode is None and _ended(self.process.pid):
            self.signal_group(signal.SIGKILL)  # before it is reaped: until then no other group can get its number
            self.process.wait()
        return self.process.returncode

    def signal_group(self, number: int) -> None:
        """Send a signal to the process and to all that it started."""
        with suppress(ProcessLookupError, PermissionError):  # macOS raises the latter for a group of zombies
            os.killpg(self.process.pid, number)

    def last_lines(self) -> str:
        """Return the last lines that this attempt has written to its log."""
        with self.log.open("rb") as file:
            file.seek(max(self.begun, self.log.stat().st_size - LAST_BYTES))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-LAST_LINES:])


class Supervised:
    """Hold a task and its processes, if it has any at the moment."""

    def __init__(self, task: ProcessSpec, logs: Path, lifeline: int):
        self.task, self.logs, self.lifeline = task, logs, lifeline
        self.failures = self.renewals = 0
        self.due = 0.0  # when to start it, if it is not running
        self.members: list[Member] = []
        self.done = False

    @property
    def state(self) -> str:
        """Running, starts soon or done, and how often it was restarted."""
        again = f", restarts: {self.failures + self.renewals}" if self.failures + self.renewals else ""
        return ("done" if self.done else "running" if self.members else "starts soon") + again

    def start(self, attempts: int) -> None:
        """Start the processes. attempts: how many there may be, for the log."""
        environments = self.task.environments(self.failures)
        for rank, environment in enumerate(environments):
            suffix = f"-{rank}" if len(environments) > 1 else ""
            log = self.logs / f"{self.task.name}{suffix}.txt"
            head = f"{time.strftime('%Y-%m-%d %H:%M:%S')} attempt {self.failures + 1} of {attempts}\n"
            self.members.append(self._start(log, head, environment))

    def _start(self, log: Path, head: str, environment: Mapping[str, str]) -> Member:
        with open(log, "ab", buffering=0, opener=open_private) as out:
            with suppress(OSError):  # the disk is full: the process will wait for room, this line need not
                out.write(head.encode())
            inherited = {key: value for key, value in os.environ.items() if key not in secrets.NAMES}
            with secrets.passed(self.task.secret_names) as (where, pipe):
                process = subprocess.Popen(
                    self.task.command,
                    env={**inherited, **environment, **where, LIFELINE: str(self.lifeline)},
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    pass_fds=[self.lifeline, *pipe],
                    process_group=0,
                )
            return Member(process, log, out.tell())

    def failed(self) -> Member | None:
        """Return the first process that ended in an error, after killing the others; None if there is none."""
        fine = (None,) if self.task.service else (None, 0)
        failed = next((member for member in self.members if member.poll() not in fine), None)
        if failed is None and self.members and all(member.poll() == 0 for member in self.members):
            self.done = self.task.finished()
            failed = None if self.done else self.members[0]
        if failed is not None:
            self.kill()
            if failed.process.returncode == START_AGAIN:
                self.renewals += 1
            else:
                self.failures += 1
        return failed

    def kill(self) -> None:
        """Kill the processes and wait for their end."""
        for member in self.living():
            member.signal_group(signal.SIGKILL)
            member.process.wait()
        self.members = []

    def living(self) -> list[Member]:
        """Return the processes that have not ended."""
        return [member for member in self.members if member.poll() is None]


class Supervisor:
    """Run tasks until they end. say: gets messages about what happens; logs: an existing folder."""

    def __init__(self, tasks: Sequence[ProcessSpec], logs: Path, restarts: int, say: Callable[[str], None]):
        self.restarts, self.say = restarts, say
        self._pipe = os.pipe()  # only this process has its write end, which the kernel closes when it ends
        self.tasks = [Supervised(task, logs, self._pipe[0]) for task in tasks]

    def run(self, tick: Callable[[], None] = lambda: None, grace: float = GRACE) -> None:
        """Run the tasks, and return when every task that is not a service has ended with status 0. Call this once.

        tick: called about ten times a second. Raises ChildProcessError naming the process that failed too often, how it
        ended and the last lines of its log; Interrupted after SIGINT, SIGTERM or SIGHUP; and whatever `tick` raises. In
        each case all processes have ended by then: they are asked by SIGINT to finish and save, after `grace` seconds
        or a second signal by SIGTERM, and then they are killed.
        """
        with asked_to_end() as asked:
            try:
                while not all(task.done or task.task.service for task in self.tasks):
                    for task in self.tasks:
                        self._advance(task)
                    if asked():
                        self.say("finishing this step and saving; press again to stop at once")
                        raise Interrupted("stopped; --resume goes on from the last checkpoints")
                    tick()
                    time.sleep(POLL)
            finally:
                self._stop(asked, grace)
                for end in self._pipe:
                    os.close(end)

    def states(self) -> dict[str, str]:
        """Return the state of each task, by name."""
        return {task.task.name: task.state for task in self.tasks}

    def _advance(self, task: Supervised) -> None:
        if task.done:
            return
        if not task.members and time.monotonic() >= task.due:
            task.start(self.restarts + 1)
        if failed := task.failed():
            self._after_failure(task, failed)

    def _after_failure(self, task: Supervised, failed: Member) -> None:
        last = failed.last_lines().splitlines()[-1:]
        if failed.process.returncode == START_AGAIN:
            self.say(": ".join([f"{failed.log.stem} is started again, as it asked", *last]))
            return
        how = f"{failed.log.stem} {_how(failed.process.returncode)}"
        final = failed.process.returncode == FINAL
        if final or task.failures > self.restarts:
            restarts = task.failures - 1 if final else self.restarts
            raise ChildProcessError(f"{how}, restarts: {restarts}; the end of {failed.log}:\n{failed.last_lines()}")
        delay = min(2.0 ** (task.failures - 1), LONGEST_DELAY)
        task.due = time.monotonic() + delay
        self.say(": ".join([f"{how}, starts again in {delay:.0f} s ({task.failures} of {self.restarts})", *last]))

    def _stop(self, asked: Callable[[], int], grace: float) -> None:
        """Ask all processes to stop, and kill them if they do not: services last, as others may still need them."""
        for number, seconds, services in ((signal.SIGINT, grace, False), (signal.SIGTERM, LAST_GRACE, True)):
            for member in self._living(services):
                member.process.send_signal(number)  # only to itself: it ends what it started
            begun, before = time.monotonic(), asked()
            while self._living(services) and (waited := time.monotonic() - begun) < seconds:
                if asked() > before and waited >= AGAIN:  # earlier they would take the next signal for the same request
                    break
                time.sleep(POLL)
        for task in self.tasks:
            task.kill()

    def _living(self, services: bool) -> list[Member]:
        return [member for task in self.tasks if services or not task.task.service for member in task.living()]


def _ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _how(status: int) -> str:
    if status == 0:
        return "ended with exit status 0 before its work was done"
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
