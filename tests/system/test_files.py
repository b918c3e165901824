"""Test that files are written as a whole or not at all."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo.engine.system import files
from mgrpo.engine.system.files import append, fsync, make_private, replace, replacing, write_all


class Narrow:
    """Take at most `width` bytes of each write."""

    def __init__(self, width: int) -> None:
        self.width, self.data = width, b""

    def write(self, data: bytes) -> int:
        part = bytes(data[: self.width])
        self.data += part
        return len(part)


@settings(max_examples=50)
@given(st.binary(max_size=100), st.integers(1, 120))
def test_write_all_writes_all_of_it_in_order(data, width):
    for given_as in (data, memoryview(data)):
        file = Narrow(width)
        write_all(file, given_as)
        assert file.data == data


def test_append_adds_to_what_is_there(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b"old\n")
    with io.FileIO(path, "a+") as file:
        append(file, b"new\n")
        append(file, b"newer\n")
    assert path.read_bytes() == b"old\nnew\nnewer\n"


def test_append_takes_back_a_part_when_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "lines"
    with io.FileIO(path, "a+") as file:
        append(file, b"old\n")

        def half(out, data) -> None:
            out.write(data[:2])
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(files, "write_all", half)
            append(file, b"new\n")
        assert path.read_bytes() == b"old\n"
        append(file, b"new\n")
    assert path.read_bytes() == b"old\nnew\n"


def test_append_takes_all_back_when_the_disk_refuses_it_at_last(tmp_path, monkeypatch):
    path = tmp_path / "lines"

    def full(_: object) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with io.FileIO(path, "a+") as file, monkeypatch.context() as patch, pytest.raises(OSError, match="quota"):
        patch.setattr(os, "fsync", full)
        append(file, b"new\n")
    assert path.read_bytes() == b""


def test_replace_makes_and_replaces_a_file(tmp_path):
    path = tmp_path / "config.json"
    for text in (b"old", b"new and longer", b""):
        replace(path, text)
        assert path.read_bytes() == text
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("fails", ["write_bytes", "rename"])
def test_a_failed_replace_leaves_the_old_file_and_names_it(tmp_path, monkeypatch, fails):
    path = tmp_path / "config.json"
    replace(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"cannot write: No space left.*config\.json"):
        patch.setattr(Path, fails, full)
        replace(path, b"new")
    assert path.read_bytes() == b"old" and [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_an_error_within_leaves_the_old_file_and_nothing_aside(tmp_path):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="cannot draw"), replacing(path, durable=False) as aside:
        aside.write_bytes(b"half of it")
        assert path.read_bytes() == b"old" and aside.parent == path.parent
        raise RuntimeError("cannot draw")
    assert path.read_bytes() == b"old" and [file.name for file in tmp_path.iterdir()] == ["curves.png"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "curves.png"
    with replacing(path, writer="1-") as one, replacing(path, writer="2-") as two:
        one.write_bytes(b"one")
        two.write_bytes(b"two")
        assert one.suffix == ".png"  # from which matplotlib takes the format
    assert path.read_bytes() == b"one"  # the last to end
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]


@pytest.mark.parametrize(("durable", "expected"), [(True, ["bytes", "rename", "name"]), (False, ["rename"])])
def test_bytes_are_on_the_disk_before_the_name(tmp_path, monkeypatch, durable, expected):
    events: list[str] = []
    rename = Path.rename

    def spy_rename(path: Path, target: Path) -> Path:
        events.append("rename")
        return rename(path, target)

    monkeypatch.setattr(files, "fsync", lambda path: events.append("name" if path == tmp_path else "bytes"))
    monkeypatch.setattr(Path, "rename", spy_rename)
    with replacing(tmp_path / "file", durable=durable) as aside:
        aside.write_bytes(b"x")
    assert events == expected


KILLED = """
import os, signal, sys
from pathlib import Path
from mgrpo.engine.system.files import replacing
with replacing(Path(sys.argv[1])) as aside:
    aside.write_bytes(b"half of it")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_9_within_leaves_the_old_file(tmp_path):
    path = tmp_path / "config.json"
    replace(path, b"old")
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)]).returncode == -9
    assert path.read_bytes() == b"old"
    replace(path, b"new")  # what the killed process left aside does not disturb
    assert path.read_bytes() == b"new" and [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_fsync_takes_files_and_directories_and_closes_what_it_opens(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    before = len(os.listdir("/proc/self/fd"))
    for path in (tmp_path, tmp_path / "file", str(tmp_path)):
        fsync(path)
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(FileNotFoundError):
        fsync(tmp_path / "missing")


def test_what_is_made_is_private_and_what_is_there_stays_as_it_is(tmp_path):
    before = os.umask(0)
    try:
        shared = tmp_path / "shared"
        shared.mkdir(mode=0o755)
        make_private(shared / "run" / "agents")
        make_private(shared / "run")
        replace(shared / "run" / "config.json", b"{}")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (shared, *shared.rglob("*"))}
    assert modes == {"shared": 0o755, "run": 0o700, "agents": 0o700, "config.json": 0o600}
