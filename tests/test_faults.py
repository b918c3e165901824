"""Faults in real processes of whole runs: each run completes, and each agent trains on every group exactly once.

The weights' own history is the proof, not the store's word for it: every trainer notes which checkpoint it restored and
which queries it trained on (`faults.lineage`).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from faults import SECONDS, STEPS, Run, wait_for

pytestmark = pytest.mark.faults


@pytest.fixture
def make(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def tell(line: str) -> None:  # at the end of the whole session
        request.node.user_properties.append(("measured", f"{request.node.name}: {line}"))

    def begin(plan: dict[str, Any] | None = None, **changes: Any) -> Run:
        runs.append(Run(tmp_path, tell, plan, **changes))
        return runs[-1]

    yield begin
    for run in runs:
        run.end()


def fault(who: str, method: str, nth: int, when: str = "before") -> dict[str, Any]:
    return {"who": who, "method": method, "when": when, "nth": nth}


KILLS = [
    fault("worker-0", "InProcessSampler.step", 5),  # amid episodes
    fault("worker-0", "Store.record", 2),  # trajectories are written, and nobody knows
    fault("worker-0", "Store.record", 1, "after"),
    fault("main", "Policy.optim_step", 2),  # amid a step
    fault("main", "Policy.save", 2, "after"),  # the checkpoint is not whole
    fault("main", "RunDirectory.save_checkpoint", 2, "after"),  # it is, and nothing is acked
    fault("clerk", "Store.claim", 5, "after"),
    fault("clerk", "Store.publish", 4, "after"),  # between optimizer step and checkpoint
    fault("clerk", "Store.ack", 3, "after"),
]


def test_processes_killed_where_it_hurts_most(make):
    run = make({"faults": KILLS}, sampling={"max_staleness": 1})
    run.finish(run.start("train"))
    run.check()


def test_a_rank_killed_then_the_launcher_and_a_second_one_meanwhile(make):
    """Main has two ranks, of which the second dies; the launcher dies later. One that comes too early is refused."""
    run = make({"faults": [fault("main-1", "Policy.optim_step", 2)]}, ranks=2, sampling={"workers": 2})
    launcher = run.start("train")
    run.wait_for_step(3)
    for worker in ("worker-0", "worker-1"):  # the run must not end by itself, and they must not outlive it
        os.kill(run.pid(worker), signal.SIGSTOP)
    assert run.start("train", "--resume").wait(SECONDS) == 1
    assert "is in use by process" in run.log.read_text()
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not run.living())  # no orphan
    assert min(run.steps().values()) < STEPS
    run.finish(run.start("train", "--resume"))
    run.check()
    ranks = [line for line in run.journal() if line["event"] == "trained" and line["who"] == "main-1"]
    assert {line["step"] for line in ranks} == set(range(STEPS))
