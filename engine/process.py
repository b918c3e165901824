"""Settings of the whole process: memory, determinism, Ctrl-C, its launcher and the log.

Imports torch where it is needed only: a launcher does without.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LIFELINE = "MGRPO_LIFELINE"  # the read end of a pipe that only the launcher can write to
RENDEZVOUS = "MGRPO_RENDEZVOUS"  # file://…, where the ranks of one machine meet; torchrun's are told its way


class Interrupted(Exception):
    """Ctrl-C: what was begun was finished and saved."""


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
    """Yields whether Ctrl-C was pressed. The first asks for an orderly end, the second raises KeyboardInterrupt."""
    pressed = False

    def press(_number: int, _frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        print("Ctrl-C: finishing this step and saving; press again to stop at once", file=sys.stderr)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
