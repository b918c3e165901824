"""Test how an agent's trainer publishes: it waits for a full disk, and writes a file only if the weights moved."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from mgrpo.engine.config.schema import EvalConfig
from mgrpo.engine.run.weights import Published, load_weights
from mgrpo.engine.store import Group
from mgrpo.engine.system import retry
from mgrpo.engine.training.decoupled import AgentProcess
from mgrpo.engine.training.leader import Leader, StepGroups
from mgrpo.engine.training.trainer import DamagedGroupsError
from toy import make_model, toy_config


class NotingLeader:
    """Stand in for rank 0's leader: note in which order it is called, and with what."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.publications: list[tuple[int, int, Published]] = []

    def finish_pruning(self) -> None:
        self.events.append("pruned")

    def publish(self, step: int, version: int, file: Published, probe: list[float]) -> None:
        assert len(probe) == 31  # log-probs of all probe tokens but the first
        self.events.append("published")
        self.publications.append((step, version, file))

    def next_groups(self, step: int) -> StepGroups:
        self.events.append("asked")
        return StepGroups([Group(len(self.events), "t", step, [], [])])

    def discard(self, found: StepGroups, damaged: list[int]) -> None:
        assert [group.query for group in found.groups] == damaged
        self.events.append("discarded")


@pytest.fixture
def leader() -> NotingLeader:
    return NotingLeader()


@pytest.fixture
def process(tmp_path: Path, leader: NotingLeader, monkeypatch: pytest.MonkeyPatch) -> AgentProcess:
    monkeypatch.setattr(retry, "PAUSES", (0.001, 0.001))
    make_model(tmp_path / "model")
    return AgentProcess(toy_config(tmp_path, topology="local"), "main", leader)  # type: ignore[arg-type]


def test_a_new_file_is_written_only_if_the_weights_moved(process: AgentProcess, leader: NotingLeader, tmp_path: Path):
    process.publish(0)
    process.publish(1)  # no optimizer step was made
    process.policy.version += 1
    process.publish(2)
    assert [(step, version) for step, version, _ in leader.publications] == [(0, 0), (1, 0), (2, 1)]
    first, again, last = (file for _, _, file in leader.publications)
    assert first == again != last
    written = load_weights(f"{tmp_path}/run/weights", *last)
    assert written.keys() == dict(process.policy.full_weights()).keys()
    assert leader.events == ["pruned", "published", "published", "pruned", "published"]


def test_weights_that_a_step_left_as_they_were_are_the_last_version_again(process: AgentProcess, leader: NotingLeader):
    process.publish(0)
    process.policy.version += 1
    process.learnt = False  # an optimizer step without any gradient
    process.publish(1)
    with torch.no_grad():
        next(iter(process.policy.model.parameters())).add_(1.0)
    process.policy.version += 1
    process.publish(2)  # momentum moved them all the same
    versions = [(step, version) for step, version, _ in leader.publications]
    assert versions == [(0, 0), (1, 0), (2, 2)]
    first, again, last = (file for _, _, file in leader.publications)
    assert first == again != last and last.checksum == process.policy.checksum()


def test_a_full_disk_is_waited_for_and_the_store_hears_of_the_file_that_is_whole(
    process: AgentProcess, leader: NotingLeader, monkeypatch: pytest.MonkeyPatch
):
    publish, failures = process.policy.publish, [OSError(errno.ENOSPC, "No space left on device")] * 3

    def full_at_first(root: str) -> Any:
        if failures:
            raise failures.pop()
        return publish(root)

    monkeypatch.setattr(process.policy, "publish", full_at_first)
    process.publish(0)
    assert not failures and len(leader.publications) == 1


def test_a_disk_that_stays_full_ends_the_trainer_and_the_store_hears_nothing(
    process: AgentProcess, leader: NotingLeader, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(retry, "PATIENCE", 0.01)

    def full(root: str) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(process.policy, "publish", full)
    with pytest.raises(OSError, match="No space left"):
        process.publish(0)
    assert not leader.publications


def test_damaged_groups_are_discarded_and_others_waited_for(
    process: AgentProcess, leader: NotingLeader, monkeypatch: pytest.MonkeyPatch
):
    outcomes: list[Any] = [DamagedGroupsError("main", [1]), DamagedGroupsError("main", [3]), {"loss": 0.0}]

    def train(step: int, groups: list[Group]) -> Any:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(process.trainer, "train", train)
    found, row = process._train(0)
    assert row == {"loss": 0.0} and [group.query for group in found.groups] == [5]
    assert leader.events == ["asked", "discarded", "asked", "discarded", "asked"]


@pytest.mark.parametrize("saved, saves", [(("rl", 2), []), (("rl", 1), [2])])
def test_a_trainer_ends_where_the_store_says_with_its_state_saved(
    process: AgentProcess,
    leader: NotingLeader,
    monkeypatch: pytest.MonkeyPatch,
    saved: tuple[str, int],
    saves: list[int],
):
    ends = iter([None, 2, 2])
    leader.end, leader.saved = lambda: next(ends), saved  # type: ignore[attr-defined]
    settings = EvalConfig(every=1, patience=1)
    monkeypatch.setattr(process, "config", msgspec.structs.replace(process.config, eval=settings))
    trained, made = list[int](), list[int]()
    monkeypatch.setattr(process, "rl_step", trained.append)
    monkeypatch.setattr(process, "save", lambda stage, step: made.append(step))
    process._rl(0)
    assert trained == [0, 1] and made == saves


def test_the_best_checkpoint_and_those_that_wait_for_their_score_are_kept(tmp_path: Path):
    make_model(tmp_path / "model")
    config = toy_config(tmp_path, topology="local", steps=8, eval={"every": 2, "questions": 3}, checkpoint={"keep": 1})
    scores = {0: 0.1, 2: 0.5, 4: 0.3}

    def write(folder: Path) -> dict[str, Any]:
        folder.mkdir()
        return {}

    with Leader(config, "main", lambda: False) as leader:
        for step in range(1, 8):
            if step == 6:  # the evaluations were behind until now
                leader.store.roles.note_evaluation(0, {"eval/held_out_accuracy": 0.1})
                for scored, score in scores.items():
                    leader.store.roles.note_evaluation(scored, {"eval/held_out_accuracy": score})
            leader.save("rl", step, write)
            kept = sorted(path.name for path in leader.rundir.checkpoints.iterdir())
            if step == 5:
                assert kept == ["rl-00002", "rl-00004", "rl-00005"]
    assert kept == ["rl-00002", "rl-00006", "rl-00007"]


def test_a_trainer_whose_groups_are_all_damaged_ends_with_the_folder_named(tmp_path: Path):
    make_model(tmp_path / "model")
    config = toy_config(tmp_path, topology="local")
    groups = [Group(query, "t", 0, [], []) for query in range(config.queries_per_step)]
    with Leader(config, "main", lambda: False) as leader:
        leader.store.groups.discard = lambda *_: None  # type: ignore[method-assign]
        found = StepGroups(groups, 1, 2)
        leader.discard(found, [1])
        assert leader.leased == [groups[0], *groups[2:]] and (leader.expired, leader.refilled) == (2, 2)
        with pytest.raises(ValueError, match=r"store.files: .*/run/trajectories: \d+ groups of one step with lost"):
            while True:
                leader.discard(found, [1])
        leader.trained([])
        leader.discard(found, [1])
