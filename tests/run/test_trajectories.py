"""Test that trajectories are read back bit for bit despite kills, torn files, full disks and hostile names."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo.engine.run import trajectories
from mgrpo.engine.run.trajectories import Position, TrajectoryWriter, read
from mgrpo.engine.types import Trajectory


def trajectory(length: int, seed: int = 0, version: int = 0) -> Trajectory:
    rng = np.random.default_rng(seed)
    tokens_L = rng.integers(-(2**31), 2**31, length, dtype=np.int32)
    logprobs_L = rng.integers(0, 2**32, length, dtype=np.uint32).view(np.float32)  # any bits, NaN included
    return Trajectory(tokens_L, rng.random(length) < 0.5, logprobs_L, version, 2**62 - seed, seed)


def same(left: Trajectory, right: Trajectory) -> bool:
    pairs = [(left.tokens, right.tokens), (left.sampled, right.sampled), (left.logprobs, right.logprobs)]
    equal = all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in pairs)
    names = ("version", "version_last", "step")
    return equal and all(getattr(left, name) == getattr(right, name) for name in names)


def file_of(root: Path, position: Position) -> Path:
    return root / position.file


batches = st.lists(st.lists(st.integers(0, 40), max_size=5), max_size=6)
shuffles = st.randoms(use_true_random=False)


@settings(max_examples=40)
@given(batches, shuffles, st.integers(0, 2000), st.integers(-(2**63), 2**63 - 1), st.booleans())
def test_everything_comes_back_in_the_order_asked(lengths, shuffle, roll_bytes, version, local):
    with tempfile.TemporaryDirectory() as folder:
        root = folder if local else f"memory://{uuid.uuid4()}"
        writer = TrajectoryWriter(root, "main", roll_bytes)
        written: list[tuple[Position, Trajectory]] = []
        for n, batch in enumerate(lengths):
            rows = [trajectory(length, seed=100 * n + i, version=version) for i, length in enumerate(batch)]
            positions = writer.append(rows)
            assert [p.row for p in positions] == list(range(len(rows)))
            written += zip(positions, rows, strict=True)
            back = read(root, [position for position, _ in written])  # readable while the writer is still open
            assert all(same(a, b) for a, (_, b) in zip(back, written, strict=True))
        writer.close()
        asked = written * 2
        shuffle.shuffle(asked)
        assert all(same(a, b) for a, (_, b) in zip(read(root, [p for p, _ in asked]), asked, strict=True))


def test_files_are_arrow_streams_named_by_agent_and_number_and_rolled_at_the_size(tmp_path):
    writer = TrajectoryWriter(str(tmp_path), "search", roll_bytes=3000)
    positions = [writer.append([trajectory(100)])[0] for _ in range(9)]
    writer.close()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"search-{n:05d}.arrow" for n in range(len(names))] and len(names) > 2
    assert all(3000 <= (tmp_path / name).stat().st_size < 6000 for name in names[:-1])
    for name in names:
        table = pa.ipc.open_stream((tmp_path / name).read_bytes()).read_all()
        assert table.schema == trajectories.SCHEMA and table.num_rows == sum(p.file == name for p in positions)


def test_local_columns_are_views_into_the_file(tmp_path):
    positions = TrajectoryWriter(str(tmp_path), "main").append([trajectory(50000), trajectory(60000)])
    before = pa.total_allocated_bytes()
    first, second = read(str(tmp_path), positions)
    for column in (first.tokens, second.tokens, first.logprobs, second.logprobs):
        assert column.base is not None and not column.flags.writeable
    assert first.tokens.ctypes.data + 4 * 50000 == second.tokens.ctypes.data
    assert pa.total_allocated_bytes() - before < 2 * 110000  # the masks, unpacked; not the 8 bytes a token of the rest


def test_no_writer_appends_to_the_file_of_another(tmp_path):
    one = TrajectoryWriter(str(tmp_path), "main")
    other = TrajectoryWriter(str(tmp_path), "main")  # opens lazily, so both take 0 to be free
    rows = [trajectory(n, seed=n) for n in (3, 4, 5, 6)]
    positions = [writer.append([row])[0] for writer, row in zip([one, other, one, other], rows, strict=True)]
    later = TrajectoryWriter(str(tmp_path), "main").append([rows[0]])
    assert [p.file for p in [*positions, *later]] == [f"main-{n:05d}.arrow" for n in (0, 1, 0, 1, 2)]
    assert all(same(a, b) for a, b in zip(read(str(tmp_path), positions), rows, strict=True))
    prefix = TrajectoryWriter(str(tmp_path), "ma").append([rows[0]])  # another agent's numbers are not ours
    assert prefix[0].file == "ma-00000.arrow"


def test_nothing_appended_opens_no_file(tmp_path):
    writer = TrajectoryWriter(str(tmp_path), "main")
    assert writer.append([]) == [] and read(str(tmp_path), []) == []
    writer.sync()
    writer.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("agent", ["", "a/b", "../x", "a b", "a\n"])
def test_an_agent_that_cannot_name_a_file_is_refused(tmp_path, agent):
    with pytest.raises(ValueError, match="agent"):
        TrajectoryWriter(str(tmp_path), agent)


def test_wrong_dtypes_are_our_own_bug(tmp_path):
    wrong = Trajectory(np.zeros(2, np.int64), np.zeros(2, bool), np.zeros(2, np.float32), 0)
    with pytest.raises(AssertionError, match="tokens"):
        TrajectoryWriter(str(tmp_path), "main").append([trajectory(1), wrong])


@pytest.mark.parametrize("file", ["../main-00000.arrow", "a/../../x", "/etc/passwd", "", "..", "a/.."])
def test_positions_outside_the_root_are_refused(tmp_path, file):
    root = tmp_path / "root"
    TrajectoryWriter(str(root), "main").append([trajectory(3)])
    TrajectoryWriter(str(tmp_path), "main").append([trajectory(3)])  # the file that "../main-00000.arrow" would reach
    with pytest.raises(ValueError, match="file: expected a path below"):
        read(str(root), [Position(file, len(trajectories.HEADER), 0)])


def test_missing_files_and_rows_are_named(tmp_path):
    (position,) = TrajectoryWriter(str(tmp_path), "main").append([trajectory(3)])
    with pytest.raises(FileNotFoundError, match="main-00007"):
        read(str(tmp_path), [Position("main-00007.arrow", position.offset, 0)])
    for row in (-1, 1, 2**40):
        with pytest.raises(ValueError, match=f"{position.file} at byte {position.offset}: expected a row below 1"):
            read(str(tmp_path), [Position(position.file, position.offset, row)])


def test_a_foreign_file_is_named(tmp_path):
    table = pa.table({"tokens": [1, 2]})
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    with pytest.raises(ValueError, match=r"x\.arrow at byte 0: not a trajectory file"):
        read(str(tmp_path), [Position("x.arrow", 0, 0)])


def test_every_truncation_is_an_error_for_the_torn_batch_and_none_for_those_before(tmp_path):
    writer = TrajectoryWriter(str(tmp_path), "main")
    rows = [trajectory(5, seed=1), trajectory(7, seed=2)]
    positions = [writer.append([row])[0] for row in rows]
    path = file_of(tmp_path, positions[0])
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=re.escape(f"{positions[1].file} at byte {positions[1].offset}")):
            read(str(tmp_path), [positions[1]])
        if size >= positions[1].offset:
            assert same(read(str(tmp_path), [positions[0]])[0], rows[0])


@settings(max_examples=150)
@given(st.binary(max_size=400), st.integers(-10, 2000))
def test_garbage_and_wrong_offsets_are_value_errors(garbage, offset):
    with tempfile.TemporaryDirectory() as folder:
        (position,) = TrajectoryWriter(folder, "main").append([trajectory(9)])
        path = Path(folder) / position.file
        path.write_bytes(path.read_bytes()[: position.offset] + garbage)
        with pytest.raises(ValueError, match="at byte"):
            read(folder, [Position(position.file, offset, 0)])


# ---- disk full

FULL = """
import resource, sys
import numpy as np
from mgrpo.engine.run.trajectories import TrajectoryWriter
from mgrpo.engine.types import Trajectory
row = Trajectory(np.arange(100, dtype=np.int32), np.ones(100, bool), np.ones(100, np.float32), 5)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))  # Python ignores SIGXFSZ: EFBIG, after a partial write
writer = TrajectoryWriter(sys.argv[1], "main")
failed = 0
for _ in range(12):
    try:
        for p in writer.append([row]):
            print("at", p.file, p.offset, p.row)
    except OSError as error:
        failed += 1
        print("full", error.errno, error.filename)
writer.close()
"""


def test_a_full_disk_for_real(tmp_path):
    child = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], check=True, capture_output=True, text=True, timeout=60
    )
    lines = [line.split() for line in child.stdout.splitlines()]
    good = [Position(file, int(offset), int(row)) for kind, file, offset, row in (x for x in lines if x[0] == "at")]
    failures = [line for line in lines if line[0] == "full"]
    assert len(good) + len(failures) == 12 and len(good) >= 8 and failures
    assert {int(number) for _, number, _ in failures} == {errno.EFBIG}
    torn = {Path(path).name for _, _, path in failures}
    assert [(tmp_path / name).stat().st_size for name in torn] == [4000] * len(torn)  # a partial write was there
    assert len({p.file for p in good}) > 1  # and the writer rolled to a new file
    for back in read(str(tmp_path), good):
        assert back.version == 5 and (back.tokens == np.arange(100)).all() and (back.logprobs == 1).all()


def test_no_space_names_the_file_and_rolls(tmp_path, monkeypatch):
    writer = TrajectoryWriter(str(tmp_path), "main")
    rows = [trajectory(20, seed=n) for n in range(3)]
    first = writer.append([rows[0]])
    written = trajectories.write_all

    def half(file, data):
        written(file, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(trajectories, "write_all", half)
        for name in ("main-00000.arrow", "main-00001.arrow"):  # in a record batch, then in a new file's header
            with pytest.raises(OSError, match="No space left") as raised:
                writer.append([rows[1]])
            assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(tmp_path / name)
    last = writer.append([rows[2]])
    assert last[0].file == "main-00002.arrow"
    back = read(str(tmp_path), first + last)
    assert same(back[0], rows[0]) and same(back[1], rows[2])


def test_a_failed_write_is_not_tried_again_at_close(tmp_path, monkeypatch):
    writer = TrajectoryWriter(str(tmp_path), "main")
    (position,) = writer.append([trajectory(4)])
    size = file_of(tmp_path, position).stat().st_size

    def full(file, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trajectories, "write_all", full)
    with pytest.raises(OSError, match="No space left"):
        writer.append([trajectory(4)])
    writer.close()
    assert file_of(tmp_path, position).stat().st_size == size


def test_sync_and_close_force_every_appended_byte_to_the_disk(tmp_path, monkeypatch):
    synced: dict[str, int] = {}
    fsync = os.fsync

    def spy(file):
        fsync(file)
        descriptor = file if isinstance(file, int) else file.fileno()
        synced[os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))] = os.fstat(descriptor).st_size

    monkeypatch.setattr(os, "fsync", spy)
    writer = TrajectoryWriter(str(tmp_path), "main", roll_bytes=1000)
    for _ in range(5):
        writer.append([trajectory(30)])
    writer.sync()
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert len(sizes) > 1 and {name: synced.get(name) for name in sizes} == sizes
    assert tmp_path.name in synced  # the new files' names as well


# ---- kill -9

ENDLESS = """
import sys
import numpy as np
from mgrpo.engine.run.trajectories import TrajectoryWriter
from mgrpo.engine.types import Trajectory
writer = TrajectoryWriter(sys.argv[1], "main", roll_bytes=1 << 20)
n = 0
while True:
    n += 1
    row = Trajectory(np.full(20000, n, np.int32), np.ones(20000, bool), np.zeros(20000, np.float32), n)
    for p in writer.append([row, row]):
        print(p.file, p.offset, p.row, n, flush=True)
"""


def test_kill_9_loses_nothing_that_was_announced(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ENDLESS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    lines = [child.stdout.readline() for _ in range(25)]
    child.send_signal(signal.SIGKILL)
    lines += [line for line in child.stdout if line.endswith("\n")]
    assert child.wait(30) == -signal.SIGKILL
    child.stdout.close()
    fields = [line.split() for line in lines]
    back = read(str(tmp_path), [Position(file, int(offset), int(row)) for file, offset, row, _ in fields])
    for got, (*_, n) in zip(back, fields, strict=True):
        assert got.version == int(n) and len(got) == 20000 and (got.tokens == int(n)).all()
    used = {path.name for path in tmp_path.iterdir()}
    assert TrajectoryWriter(str(tmp_path), "main").append([trajectory(1)])[0].file not in used


# ---- several writers of one name, and removal


@pytest.mark.parametrize("local", [True, False])
def test_writers_of_one_name_never_write_one_file(tmp_path, local):
    root = str(tmp_path) if local else f"memory://{uuid.uuid4()}"
    writers = [TrajectoryWriter(root, "main", roll_bytes=1) for _ in range(3)]
    rows = [trajectory(4, seed) for seed in range(12)]
    positions = [writers[i % 3].append([row])[0] for i, row in enumerate(rows)]
    assert len({position.file for position in positions}) == 12
    assert all(same(a, b) for a, b in zip(read(root, positions), rows, strict=True))


@pytest.mark.parametrize("local", [True, False])
def test_files_go_but_the_last_of_each_writer(tmp_path, local):
    root = str(tmp_path) if local else f"memory://{uuid.uuid4()}"
    writers = [TrajectoryWriter(root, name, roll_bytes=1) for name in ("main-a", "main-b", "clerk-a")]
    files = [[writer.append([trajectory(3)])[0].file for _ in range(12)] for writer in writers]
    everything = [name for names in files for name in names]
    gone = trajectories.remove(root, everything[1:])
    assert sorted(gone) == sorted(set(everything[1:]) - {names[-1] for names in files})
    assert sorted(trajectories.remove(root, gone)) == sorted(gone), "gone already: may be forgotten all the same"
    later = TrajectoryWriter(root, "main-a").append([trajectory(5)])
    assert later[0].file not in everything and len(read(root, later)[0]) == 5


@pytest.mark.parametrize("name", ["../main-00000.arrow", "/etc/passwd", "", "a/../../x"])
def test_nothing_outside_the_root_goes(tmp_path, name):
    TrajectoryWriter(str(tmp_path), "main").append([trajectory(3)])
    (tmp_path / "root").mkdir()
    with pytest.raises(ValueError, match="file: expected a path below"):
        trajectories.remove(str(tmp_path / "root"), [name])
    assert (tmp_path / "main-00000.arrow").exists()


def test_a_trajectory_that_is_not_the_one_written_is_refused_by_its_digest(tmp_path):
    writer = TrajectoryWriter(str(tmp_path), "main")
    written = [trajectory(20, seed=1), trajectory(20, seed=2)]
    positions = writer.append(written)
    writer.close()
    digests = [row.sampler_digest for row in written]
    assert all(same(a, b) for a, b in zip(read(str(tmp_path), positions, digests), written, strict=True))
    with pytest.raises(ValueError, match=rf"row 1: a trajectory of digest {digests[1]}: expected {digests[0]}"):
        read(str(tmp_path), [positions[1]], [digests[0]])
    file, bits = file_of(tmp_path, positions[0]), written[0].logprobs.tobytes()
    whole = file.read_bytes()
    at = whole.index(bits)
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(ValueError, match=rf"{positions[0].file} at byte .*: expected {digests[0]}"):
        read(str(tmp_path), positions, digests)
    assert same(read(str(tmp_path), positions, ["", digests[1]])[1], written[1])  # the row beside it is whole


def test_nothing_is_appended_to_a_file_that_was_deleted(tmp_path):
    writer = TrajectoryWriter(str(tmp_path), "main")
    (lost,) = writer.append([trajectory(5)])
    file_of(tmp_path, lost).unlink()
    (found,) = writer.append([trajectory(6, seed=1)])
    writer.close()
    assert same(read(str(tmp_path), [found])[0], trajectory(6, seed=1))
