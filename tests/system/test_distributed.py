"""Test ranks in real processes: messages, agreement, listening ports, and what happens if one rank stands still."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import torch

from mgrpo.engine.system import distributed
from ranks import assert_end_with_an_error, run_ranks, start

MESSAGES = [None, 0, "", b"", [], {"a": [1.5, None, "ä"]}, "x" * 1_000_003, list(range(10_000)), float("inf")]


@pytest.mark.parametrize("message", MESSAGES, ids=range(len(MESSAGES)))
def test_alone_a_message_comes_back_as_ranks_would_read_it(message: Any) -> None:
    assert distributed.broadcast(message) == message and distributed.gather(message) == [message]
    assert (distributed.rank(), distributed.ranks()) == (0, 1)


def test_alone_a_tuple_comes_back_as_the_list_that_others_read() -> None:
    assert distributed.broadcast((1, 2)) == [1, 2]


def test_without_torchruns_environment_nothing_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with distributed.joined(torch.device("cpu")):
        assert distributed.ranks() == 1 and not torch.distributed.is_initialized()


def test_an_incomplete_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="RANK is not set"), distributed.joined(torch.device("cpu")):
        pass


def messages_arrive() -> None:
    rank, ranks = distributed.rank(), distributed.ranks()
    for message in MESSAGES:
        assert distributed.broadcast(message if rank == 0 else "ignored") == message
        got = distributed.gather([rank, message] if rank else None)
        assert got == [None, *([r, message] for r in range(1, ranks))]
    assert distributed.gather("x" * 1000 * rank) == ["x" * 1000 * r for r in range(ranks)]
    assert distributed.broadcast([1, 2], tuple[int, int]) == (1, 2)
    with pytest.raises(msgspec.ValidationError, match="Expected `int`"):
        distributed.broadcast({"version": "1"}, dict[str, int])


def nothing_is_unpickled() -> None:
    """Pickle to bytes that would run something if they were loaded."""

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os._exit, (77,)

    hostile = pickle.dumps(Hostile())
    assert distributed.broadcast(hostile, bytes) == hostile and set(distributed.gather(hostile)) == {hostile}


def ranks_agree_or_all_fail() -> None:
    rank, ranks = distributed.rank(), distributed.ranks()
    distributed.require_alike("lengths", [1, 2])
    with pytest.raises(ValueError, match=r"lengths: \[\[0\], \[1\], \[2\]\] given by the ranks: expected the same"):
        distributed.require_alike("lengths", [rank])
    distributed.require_success("save", None)
    error = KeyError("mine") if rank == 1 else None
    with pytest.raises(KeyError if rank == 1 else OSError, match="mine" if rank == 1 else rf"save: rank 1 of {ranks}"):
        distributed.require_success("save", error)


def only_loopback_listens() -> None:
    """Ignore the rendezvous of rank 0, which torch opens."""
    if distributed.rank():
        listening = [c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == "LISTEN"]
        assert set(listening) == {"127.0.0.1"}


def everything() -> None:
    messages_arrive()
    nothing_is_unpickled()
    ranks_agree_or_all_fail()
    only_loopback_listens()


def test_ranks_hear_each_other() -> None:
    run_ranks(everything, 3)


def talk_on(folder: Path) -> Iterator[None]:
    while True:
        distributed.gather(distributed.rank())
        yield


def test_when_a_rank_stands_still_the_others_end_after_the_timeout(tmp_path: Path) -> None:
    other, stopped = start(talk_on, 2, tmp_path, timeout=3.0)
    os.kill(stopped.pid or 0, signal.SIGSTOP)
    assert_end_with_an_error([other])
    stopped.kill()
