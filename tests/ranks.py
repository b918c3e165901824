"""Real processes as the ranks of one agent, over gloo on this machine."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing import spawn

from mgrpo.engine import distributed


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run_ranks(work: Callable[..., None], ranks: int, *args: Any, timeout: float = 60.0) -> None:
    """work(*args) in as many joined processes; what fails in any of them fails here."""
    spawn(_run, (work, ranks, free_port(), timeout, args), nprocs=ranks)


def set_environment(rank: int, ranks: int, port: str) -> None:
    """As torchrun does."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()})


def _run(rank: int, work: Callable[..., None], ranks: int, port: str, timeout: float, args: tuple[Any, ...]) -> None:
    set_environment(rank, ranks, port)
    torch.set_num_threads(1)
    with distributed.joined(torch.device("cpu"), timeout):
        work(*args)
