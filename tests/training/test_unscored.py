"""Test that a step without any score is none, how a trainer waits, and what it leaves alone once it was succeeded."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mgrpo.engine.config.schema import Config
from mgrpo.engine.run.directory import RunDirectory, checkpoints_in
from mgrpo.engine.store import FencedError, Group, RolloutRecord
from mgrpo.engine.system import retry
from mgrpo.engine.system.process import FinalError, Interrupted
from mgrpo.engine.training import leader as module
from mgrpo.engine.training.leader import CheckpointInfo, Leader
from mgrpo.engine.training.unscored import FIRST_TRIES, Unscored
from toy import toy_config


def group(query: int, *statuses: str) -> Group:
    ended = [
        RolloutRecord(query, i, status, True, 0.0, 0.1, "" if status == "scored" else "ConnectionError: down")
        for i, status in enumerate(statuses)
    ]
    return Group(query, "t", 0, ended, [])


NONE, SOME = ("failed", "unscored"), ("failed", "scored")


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "PAUSES", (0.02, 0.02))
    monkeypatch.setattr(module, "LOOK", 0.001)


# ---- how long


def test_a_run_that_never_had_a_score_ends_after_few_tries():
    unscored = Unscored(False)
    assert [unscored.missed("step 0: why") for _ in range(FIRST_TRIES - 1)] == [0.02] * (FIRST_TRIES - 1)
    with pytest.raises(
        FinalError, match=f"step 0: why: given up after {FIRST_TRIES} tries: expected an environment that"
    ):
        unscored.missed("step 0: why")


def test_a_run_that_had_scores_waits_for_them_as_long_as_for_anything_else(monkeypatch):
    monkeypatch.setattr(retry, "PATIENCE", 0.05)
    unscored = Unscored(False)
    unscored.scored()
    with pytest.raises(ValueError, match="given up after") as raised:
        while True:
            time.sleep(unscored.missed("step 5: why"))
    assert unscored.tries > 2 and not isinstance(raised.value, FinalError)
    unscored.scored()
    assert unscored.missed("step 6: why") == 0.02


def test_steps_that_take_long_are_tried_as_often_as_in_a_run_that_never_had_a_score(monkeypatch):
    monkeypatch.setattr(retry, "PATIENCE", 0.0)
    unscored = Unscored(True)
    for _ in range(FIRST_TRIES - 1):
        unscored.missed("step 5: why")
        time.sleep(0.001)
    with pytest.raises(ValueError, match=f"given up after {FIRST_TRIES} tries"):
        unscored.missed("step 5: why")


# ---- a trainer


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return toy_config(tmp_path, topology="local", queries_per_step=2, store={"lease": 9.0})


@pytest.fixture
def leader(config: Config) -> Iterator[Leader]:
    with Leader(config, "main", lambda: False) as leader:
        leader.resume(CheckpointInfo())
        yield leader


def serve(leader: Leader, *claims: list[Group]) -> list[tuple[list[int], str]]:
    """Let the store hand out these groups, claim by claim; return what is discarded, with the reason."""
    left, discarded = list(claims), list[tuple[list[int], str]]()
    leader._lease = lambda *_: module.Claim(left.pop(0) if left else [], [])  # type: ignore[method-assign]
    store: Any = leader.store.groups
    store.discard = lambda _agent, queries, _holder, reason="damaged": discarded.append((list(queries), reason))
    return discarded


def until(found: Callable[[], Any]) -> Any:
    while not (result := found()):
        pass
    return result


def test_groups_without_scores_make_no_step_and_others_are_waited_for_with_the_reason(leader: Leader, caplog):
    discarded = serve(leader, [group(0, *NONE), group(1, *NONE)], [group(2, *NONE), group(3, *SOME)])
    assert not leader.next_groups(0).groups and discarded == [([0, 1], "unscored")]
    reason = "step 0: none of 4 rollouts was scored; the first error: ConnectionError: down"
    assert reason in caplog.text and leader.rundir.waiting.read_text() == f"{reason}\n"
    found = until(lambda: (groups := leader.next_groups(0)).groups and groups)
    assert [g.query for g in found.groups] == [2, 3] and found.expired == 2
    assert not leader.rundir.waiting.exists() and len(discarded) == 1


@pytest.mark.parametrize("killed", [False, True])
def test_what_a_trainer_waits_for_is_not_told_once_it_has_ended(config: Config, monkeypatch, killed: bool):
    with Leader(config, "main", lambda: False) as leader:
        waiting = leader.rundir.waiting
        leader._show_wait("no scores")
        assert waiting.exists()
    assert not waiting.exists()
    if killed:
        waiting.write_text("no scores")
        monkeypatch.setattr(module, "RunDirectory", Unready)
        with Leader(config, "main", lambda: False) as leader:
            leader.resume(CheckpointInfo())
            assert not waiting.exists()


class Unready(RunDirectory):
    """A run directory whose disk fails once when a file is deleted."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        waiting, failures = self.waiting, [OSError(errno.EIO, "Input/output error")]

        class Waiting(type(waiting)):  # type: ignore[misc]
            def unlink(self, missing_ok: bool = False) -> None:
                if failures:
                    raise failures.pop()
                super().unlink(missing_ok)

        self.waiting = Waiting(waiting)


def test_a_trainer_that_never_sees_a_score_ends_in_an_error(leader: Leader):
    serve(leader, *([group(2 * i, *NONE), group(2 * i + 1, *NONE)] for i in range(9)))
    with pytest.raises(FinalError, match=r"step 0: none of 4 rollouts was scored; .*: given up after 3 tries"):
        until(lambda: leader.next_groups(0).groups)


def test_so_does_one_that_replaces_groups_without_advantage(tmp_path: Path):
    sampling = {"refill_zero_std": True}
    config = toy_config(tmp_path, topology="local", queries_per_step=2, sampling=sampling)
    with Leader(config, "main", lambda: False) as leader:
        leader.resume(CheckpointInfo())
        serve(leader, *([group(i, *NONE)] for i in range(99)))
        leader.store.groups.refill = lambda *_: None  # type: ignore[method-assign]
        with pytest.raises(ValueError, match="given up after 3 tries"):
            until(lambda: leader.next_groups(0).groups)


# ---- waiting for the store


def test_ctrl_c_is_heard_while_the_store_is_out_of_reach_also_at_the_start(config: Config, monkeypatch):
    monkeypatch.setattr(retry, "PAUSES", (100.0, 100.0))
    asked = time.monotonic() + 0.3

    def unreachable(*_: Any) -> Any:
        raise OSError(errno.EIO, "store: connection refused")

    monkeypatch.setattr(module, "open_store", unreachable)
    with pytest.raises(Interrupted, match="agent main: stopped while it waited"):
        Leader(config, "main", lambda: time.monotonic() > asked)
    assert time.monotonic() - asked < 60


def test_ctrl_c_is_heard_while_another_process_holds_the_role(config: Config):
    with Leader(config, "main", lambda: False) as first:
        first.store.roles.release(first.role, first.holder)
        first.store.roles.hold(first.role, "another", 9.0)
        asked = time.monotonic() + 0.3
        first.rundir.close()
        with pytest.raises(Interrupted), Leader(config, "main", lambda: time.monotonic() > asked):
            pass


# ---- a trainer that another one has succeeded


def test_a_trainer_that_was_succeeded_deletes_no_weights_and_replaces_no_checkpoint(leader: Leader, monkeypatch):
    removed: list[Any] = []
    monkeypatch.setattr(module, "remove_old", lambda *arguments: removed.append(arguments))
    leader._prune([])
    leader.save("rl", 1, write)
    before = [path.name for path in checkpoints_in(leader.rundir.checkpoints)]
    leader.store.roles.release(leader.role, leader.holder)
    leader.store.roles.hold(leader.role, "another", 9.0)
    for acts in (lambda: leader._prune([]), lambda: leader.save("rl", 1, write), lambda: leader.save("rl", 2, write)):
        with pytest.raises(FencedError, match="is held by another, no longer by"):
            acts()
    assert len(removed) == 1 and before == ["rl-00001"]
    assert [path.name for path in leader.rundir.checkpoints.iterdir()] == before


def test_weights_are_deleted_before_the_role_is_given_back(config: Config, monkeypatch):
    held: list[str] = []
    with Leader(config, "main", lambda: False) as leader:

        def slow(*_: Any) -> None:
            time.sleep(0.3)
            held.extend(leader.store.audit.at_work(9.0))

        monkeypatch.setattr(module, "remove_old", slow)
        for _ in range(2):  # one that goes on at the end, and one that has yet to begin
            leader.executor.submit(leader._prune, [])
    assert held == ["trainer:main"] * 2


def write(folder: Path) -> dict[str, Any]:
    folder.mkdir()
    (folder / "policy.json").write_text("{}")
    return {"version": 0}
