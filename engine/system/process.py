"""Settings of the whole process: memory, determinism, being asked to end, its launcher and the log.

Imports torch where it is needed only: a launcher does without.
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
from functools import cache
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LIFELINE = "MGRPO_LIFELINE"  # the read end of a pipe that only the launcher can write to
RENDEZVOUS = "MGRPO_RENDEZVOUS"  # file://…, where the ranks of one machine meet; torchrun's are told its way


AGAIN = 1.0  # seconds: sooner it is the same request, as where a batch system signals launcher and trainers alike


class Interrupted(Exception):
    """Asked to end: what was begun was finished and saved."""


def die_with_launcher() -> None:
    """From now on this process and all of its process group are killed when the launcher is gone, however it went.

    Call it first, and as the leader of the group. A pipe rather than Linux' parent-death signal, because that would
    kill this process only, before it could end the tools that it had started. Without a launcher nothing happens.
    """
    if (end := os.environ.pop(LIFELINE, None)) is not None:
        os.set_inheritable(int(end), False)
        threading.Thread(target=_end_with, args=(int(end),), daemon=True).start()


def _end_with(lifeline: int) -> None:
    os.read(lifeline, 1)  # nothing is ever written: returns when every write end is closed
    os.killpg(0, signal.SIGKILL)


def keep_memory() -> None:
    """Tell glibc to keep freed memory instead of returning it and faulting every page in again."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        trim_threshold, top_pad, mmap_max = -1, -2, -4
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 64 << 20)


def make_deterministic(seed: int, deterministic: bool) -> None:
    import torch

    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic)


@cache
def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Flop/s of the largest matmuls, the best of five: what the model's flop/s are a share of (MFU)."""
    import torch

    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return max(_rate(a, b) for _ in range(5))


def _rate(a: torch.Tensor, b: torch.Tensor) -> float:
    started = time.perf_counter()
    product = a @ b
    product[0, 0].item()  # waits for the device
    return float(2 * len(a) ** 3 / (time.perf_counter() - started))


def doubling(first: float, last: float) -> Iterator[float]:
    """first, twice that, and so on up to `last`, which is repeated for ever."""
    while True:
        yield first
        first = min(2 * first, last)


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """The engine's log, with tracebacks, goes to a file too."""
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
    """Yields whether an end was asked for. The first time it is to be an orderly one, the second raises
    KeyboardInterrupt."""

    def told(times: int, number: int) -> None:
        if times > 1:
            raise KeyboardInterrupt
        how = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        with suppress(OSError):  # nobody listens, or the disk with the log is full
            print(f"{how}: finishing this step and saving; press again to stop at once", file=sys.stderr)

    with asked_to_end(told) as times:
        yield lambda: times() > 0


@contextmanager
def asked_to_end(told: Callable[[int, int], None] = lambda times, number: None) -> Iterator[Callable[[], int]]:
    """Yields how often an end was asked for: by Ctrl-C, by SIGTERM as from Slurm and containers, or by SIGHUP.

    told: hears of each time, and of the signal's number, within its handler.
    """
    count, last = 0, -math.inf

    def note(number: int, _frame: FrameType | None) -> None:
        nonlocal count, last
        if time.monotonic() - last >= AGAIN:
            count, last = count + 1, time.monotonic()
            told(count, number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup leaves it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: count
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
