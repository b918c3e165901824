"""Test that processes agree on a run's id and on the order of its tasks, whoever comes first."""

from __future__ import annotations

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mgrpo.engine.rollout.curriculum import digest_of, in_order
from mgrpo.engine.run import identity
from mgrpo.engine.run.identity import draw_identity, keep_identity, read_identity, task_order
from mgrpo.engine.types import Task


def test_an_id_is_drawn_once_and_stays_when_the_directory_moves(tmp_path: Path):
    run = tmp_path / "a"
    assert read_identity(run) is None
    drawn = draw_identity(run)
    assert len(drawn) == 16 and draw_identity(run) == read_identity(run) == drawn
    run.rename(tmp_path / "b")
    assert draw_identity(tmp_path / "b") == drawn != draw_identity(run)
    keep_identity(tmp_path / "b", "0" * 16)
    assert read_identity(tmp_path / "b") == drawn
    assert [path.name for path in run.iterdir()] == ["run.json"]


def test_many_that_draw_at_once_agree(tmp_path: Path):
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: draw_identity(tmp_path), range(32)))) == 1


def test_a_file_system_without_links_does_as_well(tmp_path: Path, monkeypatch):
    def refused(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    assert draw_identity(tmp_path) == read_identity(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_the_first_of_two_wins_also_without_links(tmp_path: Path, monkeypatch):
    seen, rename, path = list[bytes](), Path.rename, tmp_path / "run.json"

    def late(aside: Path, target: Path) -> Path:
        if not seen:
            seen.append(b"")
            identity.write_once(path, identity.Identity("0" * 16))  # by another, between a look and the rename
            seen.append(path.read_bytes())
        return rename(aside, target)

    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "Operation not permitted")))
    monkeypatch.setattr(Path, "rename", late)
    drawn = draw_identity(tmp_path)
    assert seen == [b"", b""] and read_identity(tmp_path) == drawn != "0" * 16


def test_a_claim_is_waited_for_and_given_up_if_the_disk_is_full(tmp_path: Path, monkeypatch):
    path = tmp_path / "run.json"
    path.touch()
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(draw_identity, tmp_path)
        time.sleep(0.05)
        path.with_name("aside").write_text('{"id": "ab"}')
        path.with_name("aside").rename(path)
        assert found.result() == "ab"
    path.unlink()
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "Operation not permitted")))
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        draw_identity(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_id_is_for_this_user_alone(tmp_path: Path):
    draw_identity(tmp_path)
    assert (tmp_path / "run.json").stat().st_mode & 0o777 == 0o600


def test_a_damaged_id_is_named(tmp_path: Path):
    (tmp_path / "run.json").write_bytes(b"\0\0")
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        draw_identity(tmp_path)


def test_a_killed_write_leaves_no_half_of_a_file(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(identity, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        draw_identity(tmp_path)
    assert not list(tmp_path.iterdir())


# ---- tasks

TASKS = [Task(name, {"question": name * 2}) for name in "cab"]


def test_tasks_come_in_the_order_of_the_first_process(tmp_path: Path):
    assert in_order(TASKS, tmp_path) == TASKS
    assert in_order(TASKS[::-1], tmp_path) == TASKS
    assert task_order(tmp_path, ["other"]) == ["c", "a", "b"]


def test_other_tasks_are_refused_by_an_id_that_is_not_in_both(tmp_path: Path):
    in_order(TASKS, tmp_path)
    with pytest.raises(ValueError, match=r"tasks\('train'\) has 4 ids, the run was begun with 3: 'd' is not in both"):
        in_order([*TASKS, Task("d", {})], tmp_path)


def test_tasks_that_share_an_id_stay_as_they_are(tmp_path: Path):
    twice = [*TASKS, TASKS[0]]
    assert in_order(twice, tmp_path) == twice
    assert digest_of(twice) != digest_of(twice[::-1])


def test_a_digest_tells_ids_and_data_apart_but_not_orders():
    digest = digest_of(TASKS)
    assert digest == digest_of(TASKS[::-1]) and len(digest) == 32
    assert digest != digest_of(TASKS[:2]) != digest_of([Task("c", {"question": "other"}), TASKS[1]])
    assert digest_of([Task("a", {"x": 1, "y": 2})]) == digest_of([Task("a", {"y": 2, "x": 1})])


def test_data_that_json_cannot_express_has_the_same_digest_in_every_process():
    loop: dict[str, Any] = {}
    loop["self"] = loop
    for data in ({"x": object()}, {"x": {"a", "b"}}, {1: 2, "a": 3}, loop, {"x": b"bytes"}, {"x": "\ud800"}):
        assert digest_of([Task("a", data)]) == digest_of([Task("a", dict(data))])
