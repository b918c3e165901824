"""A rank of an agent is killed: the others end with an error, and no partial checkpoint is left."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cases.ranked_policy import batches, make, mine
from mgrpo.engine.policy import checkpoint
from mgrpo.engine.run.directory import RunDirectory
from mgrpo.engine.system import distributed
from mgrpo.kernels import Objective
from ranks import assert_end_with_an_error, start
from toy import make_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model(tmp_path / "tied", True, hidden_size=16, intermediate_size=24)
    return tmp_path


def step_on(folder: Path) -> Iterator[None]:
    """Take optimizer steps forever."""
    policy = make(folder, True)
    while True:
        policy.step(mine(batches(0)), Objective(sampler_cap=None), 1e-3)
        yield


def die_while_saving(folder: Path) -> Iterator[None]:
    """Kill rank 1 after it has written its weights and before its moments."""
    policy, write = make(folder, True), checkpoint.write_shards
    policy.step(mine(batches(0)), Objective(sampler_cap=None), 1e-3)
    yield

    def die(aside: Path, stem: str, tensors: Any, rank: int) -> None:
        if stem == "moments":
            os.kill(os.getpid(), signal.SIGKILL)
        write(aside, stem, tensors, rank)

    if distributed.rank() == 1:
        checkpoint.write_shards = die
        policy.save_state()
    run = RunDirectory(folder / "run")
    run.save_checkpoint("rl-00001", lambda aside: policy.save_state(aside / "main") and None, keep=1)
    yield


def test_when_a_rank_is_killed_in_a_step_the_others_end(folder: Path) -> None:
    *others, killed = start(step_on, 3, folder)
    os.kill(killed.pid or 0, signal.SIGKILL)
    assert_end_with_an_error(others)


def test_a_rank_killed_while_saving_leaves_no_checkpoint(folder: Path) -> None:
    assert_end_with_an_error(start(die_while_saving, 2, folder))
    run = RunDirectory(folder / "run")
    assert run.latest_checkpoint() is None and not list(run.checkpoints.iterdir())
    run.close()
