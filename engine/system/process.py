"""Set up a process: memory, determinism, requests to stop, the link to its launcher, and the log file.

torch is imported only where it is needed, because a launcher does without it.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

LIFELINE = "MGRPO_LIFELINE"  # the read end of a pipe that only the launcher can write to
RENDEZVOUS = "MGRPO_RENDEZVOUS"  # file://…, where the ranks of one machine meet; torchrun uses other variables
LISTEN = 0.1  # seconds between two looks at whether the process was asked to stop
START_AGAIN = 75  # exit status (EX_TEMPFAIL) of a process that wants to be started again, though it did not fail
FINAL = 78  # exit status (EX_CONFIG) of a process that would fail again, however often it was started
AGAIN = 1.0  # seconds within which repeated signals count as one (a batch system signals every process)


_asked = [0]  # how often this process was asked to stop, while `asked_to_end` counts


class Interrupted(Exception):
    """Report that the process was asked to stop, and that it has finished and saved what it was doing."""


class FinalError(ValueError):
    """Report a mistake of the user's that no new process could get over."""


class StopNow(KeyboardInterrupt):
    """End the process at once: it was asked to stop a second time. Code of the user cannot raise it by accident."""


def die_with_launcher() -> None:
    """Kill this process and its process group as soon as the launcher is gone, however it ended.

    Call this first, as the leader of the group; without a launcher it does nothing. It uses a pipe instead of Linux'
    parent-death signal, which would kill this process only, before it could end the tools that it started.
    """
    if (end := os.environ.pop(LIFELINE, None)) is not None:
        os.set_inheritable(int(end), False)
        threading.Thread(target=_end_with, args=(int(end),), daemon=True).start()


def _end_with(lifeline: int) -> None:
    os.read(lifeline, 1)  # nothing is ever written, so this returns when every write end is closed
    os.killpg(0, signal.SIGKILL)


def end_now(error: str, status: int) -> NoReturn:
    """End this process from any thread, though its main thread may never come back from where it is."""
    with suppress(OSError):
        print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(status)


def keep_memory() -> None:
    """Tell glibc to keep freed memory instead of returning it and faulting every page in again."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        trim_threshold, top_pad, mmap_max = -1, -2, -4
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 64 << 20)


def make_deterministic(seed: int, deterministic: bool) -> None:
    """Seed torch, and make it use deterministic algorithms only, if asked to.

    Call this before anything is computed on a GPU: cuBLAS reads its setting when it starts.
    """
    import torch

    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch refuses matmuls on a GPU without it
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic)


def pause(seconds: float, asked: Callable[[], bool] = lambda: _asked[0] > 0, who: str = "") -> None:
    """Sleep. Raises Interrupted as soon as this process is asked to stop: what it waits for may not come back.

    asked: returns whether it was. who: begins the error's message.
    """
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if asked():
            raise Interrupted(f"{who}stopped while it waited; --resume goes on from the last checkpoint")
        time.sleep(min(left, LISTEN))


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Also write the engine's log, with tracebacks, to a file."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("mgrpo")
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


@contextmanager
def ctrl_c() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether the process was asked to stop.

    The first signal asks for an orderly end; the second raises StopNow, a KeyboardInterrupt.
    """

    def notice(times: int, number: int) -> None:
        if times > 1:
            raise StopNow
        how = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        with suppress(OSError):  # stderr is closed, or the disk with the log is full
            print(f"{how}: finishing this step and saving; press again to stop at once", file=sys.stderr)

    with asked_to_end(notice) as times:
        yield lambda: times() > 0


@contextmanager
def ended_at_once() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end this process at once, even while it waits outside of Python with nothing to save."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def asked_to_end(notice: Callable[[int, int], None] = lambda times, number: None) -> Iterator[Callable[[], int]]:
    """Yield a function that returns how often the process was asked to stop.

    Ctrl-C, SIGTERM (as from Slurm and containers) and SIGHUP ask it to. notice: called in the signal handler each time,
    with the number of requests so far and the number of the signal.
    """
    count, last = 0, -math.inf

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal count, last
        if time.monotonic() - last >= AGAIN:
            count, last = count + 1, time.monotonic()
            _asked[0] = count
            notice(count, number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield lambda: count
    finally:
        _asked[0] = 0
        for number, handler in before.items():
            signal.signal(number, handler)
