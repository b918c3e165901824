"""Processes of one run on one machine: started, watched, started again when they fail, ended in order. No orphans.

A *task* is one process, or the ranks of one trainer, which live and die together: when one fails the others are killed
and all start again, later each time, at most `restarts` times in the run; meanwhile the other tasks go on. What each
process says is appended to a log file of its own.

Every process leads a process group, so that what it started itself is ended with it, and holds the read end of a pipe
of the launcher's (`process.die_with_launcher`): when the launcher is gone, even by kill -9, so are all groups.

Departs from torchrun's elastic agent: that listens on every interface, kills ranks that take more than 30 s to save
after Ctrl-C, leaves them running when it is itself killed, and is a process with torch in it per agent.
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

from mgrpo.engine.system.process import AGAIN, LIFELINE, Interrupted, asked_to_end

POLL = 0.1  # seconds between two looks at the processes
GRACE = 600.0  # seconds for a process to finish its step and save, once it was asked to
LAST_GRACE = 10.0  # seconds from SIGTERM to SIGKILL
LONGEST_DELAY = 30.0  # seconds before a restart: 1, 2, 4, … up to this
LAST_LINES, LAST_BYTES = 10, 4096  # of a log, that an error shows


@dataclass(frozen=True)
class ProcessSpec:
    """What to run: `command` once with each of `environments`, which are added to this process' own.

    environments takes the number of the attempt, from 0, so that ranks of a new attempt can meet elsewhere. service: it
    has no end of its own, and is ended, by SIGTERM, when those that have are at theirs.
    """

    name: str
    command: Sequence[str]
    environments: Callable[[int], Sequence[Mapping[str, str]]] = lambda attempt: ({},)
    service: bool = False


@dataclass
class Member:
    """One process of a task."""

    process: subprocess.Popen[bytes]
    log: Path
    begun: int  # of this attempt, the first byte in the log

    def poll(self) -> int | None:
        """The exit status, negative for a signal; once there is one, the group that it led is gone too."""
        if self.process.returncode is None and _ended(self.process.pid):
            self.signal_group(signal.SIGKILL)  # before it is waited for: until then no other group can have its number
            self.process.wait()
        return self.process.returncode

    def signal_group(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):  # the latter is macOS' word for a group of zombies
            os.killpg(self.process.pid, number)

    def last_lines(self) -> str:
        with self.log.open("rb") as file:
            file.seek(max(self.begun, self.log.stat().st_size - LAST_BYTES))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-LAST_LINES:])


class Supervised:
    """A task and its processes, if it has any at the moment."""

    def __init__(self, task: ProcessSpec, logs: Path, lifeline: int):
        self.task, self.logs, self.lifeline = task, logs, lifeline
        self.failures = 0
        self.due = 0.0  # when to start, if it is not running
        self.members: list[Member] = []
        self.done = False

    @property
    def state(self) -> str:
        again = f", restarts: {self.failures}" if self.failures else ""
        return ("done" if self.done else "running" if self.members else "starts soon") + again

    def start(self, attempts: int) -> None:
        environments = self.task.environments(self.failures)
        for rank, environment in enumerate(environments):
            suffix = f"-{rank}" if len(environments) > 1 else ""
            log = self.logs / f"{self.task.name}{suffix}.txt"
            head = f"{time.strftime('%Y-%m-%d %H:%M:%S')} attempt {self.failures + 1} of {attempts}\n"
            self.members.append(self._start(log, head, environment))

    def _start(self, log: Path, head: str, environment: Mapping[str, str]) -> Member:
        with log.open("ab", buffering=0) as out:
            with suppress(OSError):  # the disk is full: what runs there waits, so must this
                out.write(head.encode())
            process = subprocess.Popen(
                self.task.command,
                env={**os.environ, **environment, LIFELINE: str(self.lifeline)},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                pass_fds=[self.lifeline],
                process_group=0,
            )
            return Member(process, log, out.tell())

    def failed(self) -> Member | None:
        """The first process that ended in an error; then the others are killed. None if none did."""
        fine = (None,) if self.task.service else (None, 0)
        failed = next((member for member in self.members if member.poll() not in fine), None)
        if failed is not None:
            self.kill()
            self.failures += 1
        elif self.members and all(member.poll() == 0 for member in self.members):
            self.done = True
        return failed

    def kill(self) -> None:
        for member in self.living():
            member.signal_group(signal.SIGKILL)
            member.process.wait()
        self.members = []

    def living(self) -> list[Member]:
        return [member for member in self.members if member.poll() is None]


class Supervisor:
    """Runs tasks to their end. `say` is told what happens to them; logs: a folder, that is there."""

    def __init__(self, tasks: Sequence[ProcessSpec], logs: Path, restarts: int, say: Callable[[str], None]):
        self.restarts, self.say = restarts, say
        self._pipe = os.pipe()  # its write end is this process' alone: closed, by the kernel if need be, when it ends
        self.tasks = [Supervised(task, logs, self._pipe[0]) for task in tasks]

    def run(self, tick: Callable[[], None] = lambda: None, grace: float = GRACE) -> None:
        """To be called once. Returns when every task that is no service ended with status 0. `tick` is called about ten
        times a second.

        Raises ChildProcessError naming the process that failed once too often, how it ended and the last lines of its
        log, and Interrupted after SIGINT, SIGTERM or SIGHUP; either way, and for whatever `tick` raises, all processes
        have ended by then: asked by SIGINT to finish and save, after `grace` seconds or a second signal told by
        SIGTERM, and then killed.
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
        """Of each task by name: running, starts soon or done, and how often it was restarted."""
        return {task.task.name: task.state for task in self.tasks}

    def _advance(self, task: Supervised) -> None:
        if task.done:
            return
        if not task.members and time.monotonic() >= task.due:
            task.start(self.restarts + 1)
        if failed := task.failed():
            self._after_failure(task, failed)

    def _after_failure(self, task: Supervised, failed: Member) -> None:
        how = f"{failed.log.stem} {_how(failed.process.returncode)}"
        if task.failures > self.restarts:
            raise ChildProcessError(
                f"{how}, restarts: {self.restarts}; the end of {failed.log}:\n{failed.last_lines()}"
            )
        delay = min(2.0 ** (task.failures - 1), LONGEST_DELAY)
        task.due = time.monotonic() + delay
        last = failed.last_lines().splitlines()[-1:]
        self.say(": ".join([f"{how}, starts again in {delay:.0f} s ({task.failures} of {self.restarts})", *last]))

    def _stop(self, asked: Callable[[], int], grace: float) -> None:
        """From asking to killing. Services are there until the others, which may still need them, are gone."""
        for number, seconds, services in ((signal.SIGINT, grace, False), (signal.SIGTERM, LAST_GRACE, True)):
            for member in self._living(services):
                member.process.send_signal(number)  # to it alone: what it started is its own to end
            begun, before = time.monotonic(), asked()
            while self._living(services) and (waited := time.monotonic() - begun) < seconds:
                if asked() > before and waited >= AGAIN:  # sooner they would take the next one for the same request
                    break
                time.sleep(POLL)
        for task in self.tasks:
            task.kill()

    def _living(self, services: bool) -> list[Member]:
        return [member for task in self.tasks if services or not task.task.service for member in task.living()]


def _ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _how(status: int) -> str:
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
