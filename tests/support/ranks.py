"""Run real processes as the ranks of one agent, over gloo on this machine."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import get_context, spawn

from mgrpo.engine.system import distributed

Work = Callable[[Path], Iterator[None]]


def free_port() -> str:
    """Return a TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run_ranks(work: Callable[..., None], ranks: int, *args: Any, timeout: float = 60.0) -> None:
    """Call work(*args) in as many joined processes; an exception in any of them is raised here."""
    spawn(_run, (work, ranks, free_port(), timeout, args), nprocs=ranks)


def set_environment(rank: int, ranks: int, port: str) -> None:
    """Set the environment variables of a rank as torchrun does."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()})


def _run(rank: int, work: Callable[..., None], ranks: int, port: str, timeout: float, args: tuple[Any, ...]) -> None:
    set_environment(rank, ranks, port)
    torch.set_num_threads(1)
    with distributed.joined(torch.device("cpu"), timeout):
        work(*args)


def live(rank: int, ranks: int, port: str, timeout: float, work: Work, folder: Path) -> None:
    """Go through the rounds of the work, and mark the rank as ready after each, hence after the first."""
    set_environment(rank, ranks, port)
    torch.set_num_threads(1)
    with distributed.joined(torch.device("cpu"), timeout):
        for _ in work(folder):
            (folder / f"ready-{rank}").touch()


def start(work: Work, ranks: int, folder: Path, timeout: float = 60.0) -> list[BaseProcess]:
    """Start processes that iterate over `work`, and return them when all have done their first round."""
    port, context = free_port(), get_context("spawn")
    processes = [
        context.Process(target=live, args=(rank, ranks, port, timeout, work, folder), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    ready = [folder / f"ready-{rank}" for rank in range(ranks)]
    while not all(file.exists() for file in ready):
        assert all(process.exitcode is None or file.exists() for process, file in zip(processes, ready, strict=True))
        time.sleep(0.05)
    return processes


def assert_end_with_an_error(processes: list[BaseProcess]) -> None:
    """Check that each process ends with another status than 0."""
    for process in processes:
        process.join(120)  # seconds: far more than it takes
        assert process.exitcode not in (None, 0)
