"""Write and read trajectory files, which carry the tokens from the samplers to the trainers, beside the store.

A file is an Arrow IPC stream with one record batch per `append` and one row per call. Each file has one writer; nothing
is appended to a file that an earlier process left. Readers need no footer and no end mark: a `Position` gives the
offset of a record batch's message. So a file can be read while it is written, and a torn tail, to which no position
refers, is ignored.

Unlike pyarrow's stream writer, we write the messages of the schema and of the batches ourselves, because we must know
where each begins, and because a failed write must not stay in a buffer and be repeated when the file is closed. An
object store (any fsspec URL that is not a local path) cannot append: there every record batch is a separate file.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from mgrpo.engine.system.files import fsync, write_all
from mgrpo.engine.system.remote import file_system
from mgrpo.engine.types import Trajectory

WEIGHTS = ("version", "version_last", "step")  # columns for the weights that sampled a row
SCHEMA = pa.schema(
    [
        pa.field("tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("sampled", pa.list_(pa.bool_()), nullable=False),
        pa.field("logprobs", pa.list_(pa.float32()), nullable=False),
        *(pa.field(name, pa.int64(), nullable=False) for name in WEIGHTS),
    ]
)
DTYPES = {"tokens": np.dtype(np.int32), "sampled": np.dtype(np.bool_), "logprobs": np.dtype(np.float32)}
HEADER: bytes = SCHEMA.serialize().to_pybytes()
TORN = (pa.ArrowInvalid, OSError, EOFError)  # what pyarrow raises for bytes that are no whole record batch


@dataclass(frozen=True)
class Position:
    """Locate one trajectory. file: relative to the root; offset: of its batch's message, in bytes; row: in it."""

    file: str
    offset: int
    row: int


class TrajectoryWriter:
    """Append the trajectories of one agent to `<root>/<agent>-<n>.arrow`, where n is the next free number.

    root: local path or fsspec URL. roll_bytes: a file that has reached this size is closed and the next one opened.
    Threads must not share a writer. Raises ValueError if the agent's name cannot be part of a file name.
    """

    def __init__(self, root: str, agent: str, roll_bytes: int = 256 << 20) -> None:
        if not re.fullmatch(r"[\w.-]+", agent):
            raise ValueError(f"agent: expected a name of letters, digits, '_', '-' and '.', got {agent!r}")
        self.fs, self.root = file_system(root)
        self.agent, self.roll_bytes = agent, roll_bytes
        self.local = isinstance(self.fs, LocalFileSystem)
        self.fs.makedirs(self.root, exist_ok=True)
        self._number = _first_free(self.fs, self.root, agent)
        self._file: io.FileIO | None = None

    def append(self, trajectories: Sequence[Trajectory]) -> list[Position]:
        """Write one record batch to the operating system, and return the positions of its rows, in the order given.

        Raises OSError naming the file if the disk is full. Then nothing of this batch is referenced, what was appended
        before stays valid, and the next append opens a new file.
        """
        if not trajectories:
            return []
        message = _record_batch(trajectories).serialize()
        name, offset = self._write_local(message) if self.local else self._write_object(message)
        return [Position(name, offset, row) for row in range(len(trajectories))]

    def sync(self) -> None:
        """Force everything appended so far to the disk. An object store has it already."""
        if self._file is not None:
            os.fsync(self._file)

    def close(self) -> None:
        """Close the file, after forcing it to the disk."""
        file, self._file = self._file, None
        if file is not None:
            with file:
                os.fsync(file)  # a later sync no longer sees this file

    def _write_local(self, message: pa.Buffer) -> tuple[str, int]:
        if self._file is not None and (self._file.tell() >= self.roll_bytes or _is_deleted(self._file)):
            self.close()
        try:
            file = self._file or self._open()
            offset = file.tell()
            write_all(file, memoryview(message))
        except OSError as error:
            path = error.filename if self._file is None else self._file.name
            self.close()
            raise OSError(error.errno, f"cannot append trajectories: {error.strerror}", path) from error
        return os.path.basename(file.name), offset

    def _write_object(self, message: pa.Buffer) -> tuple[str, int]:
        while True:
            name, path = self._name(), self._path()
            self._number += 1
            with contextlib.suppress(FileExistsError):  # another writer of this name came first
                self.fs.pipe_file(path, HEADER + message.to_pybytes(), mode="create")
                return name, len(HEADER)

    def _open(self) -> io.FileIO:
        """Open the next file: unbuffered, so that a write reaches the system or raises; exclusive, so never shared."""
        while self._file is None:
            path = self._path()
            self._number += 1
            with contextlib.suppress(FileExistsError):  # another writer of this agent came first
                self._file = io.FileIO(path, "x")
        write_all(self._file, memoryview(HEADER))
        fsync(self.root)
        return self._file

    def _name(self) -> str:
        return f"{self.agent}-{self._number:05d}.arrow"

    def _path(self) -> str:
        return f"{self.root}/{self._name()}"


def read(root: str, positions: Sequence[Position], digests: Sequence[str] = ()) -> list[Trajectory]:
    """Read the trajectories at the positions, in that order; read each record batch once.

    digests: the `sampler_digest` of each trajectory when it was written, compared with that of what is read; none for
    "" or without digests. In a local file, tokens and logprobs are read-only views into the mapped file, not copies.
    Raises ValueError if a position points outside the root, into torn or missing bytes or past its batch's rows, or if
    a trajectory has another digest; FileNotFoundError if there is no such file.
    """
    fs, directory = file_system(root)
    sources = {name: _source(fs, directory, name) for name in dict.fromkeys(p.file for p in positions)}
    batches = {key: _Batch(sources[key[0]], *key) for key in dict.fromkeys((p.file, p.offset) for p in positions)}
    found = [batches[p.file, p.offset].trajectory(p.row) for p in positions]
    for position, trajectory, digest in zip(positions, found, digests, strict=bool(digests)):
        if digest and trajectory.sampler_digest != digest:
            where = f"{position.file} at byte {position.offset}, row {position.row}"
            raise ValueError(f"{where}: a trajectory of digest {trajectory.sampler_digest}: expected {digest}")
    return found


class _Batch:
    """Hold the columns of one record batch as flat arrays: T tokens in B rows."""

    def __init__(self, source: Any, file: str, offset: int) -> None:
        self.where = f"{file} at byte {offset}"
        batch = self._read(source, offset)
        self.weights_B = {name: batch.column(name).to_numpy() for name in WEIGHTS}
        self.rows = len(batch)
        self.offsets = {name: batch.column(name).offsets.to_numpy() for name in DTYPES}
        self.flat_T = {name: batch.column(name).values.to_numpy(zero_copy_only=False) for name in DTYPES}

    def _read(self, source: Any, offset: int) -> pa.RecordBatch:
        try:
            source.seek(0)
            if not pa.ipc.read_schema(source).equals(SCHEMA):
                raise ValueError(f"{self.where}: not a trajectory file")
            source.seek(offset)
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(source), SCHEMA)
            batch.validate(full=True)
        except TORN as error:
            raise ValueError(f"{self.where}: no whole record batch (torn or truncated file): {error}") from error
        return batch

    def trajectory(self, row: int) -> Trajectory:
        if not 0 <= row < self.rows:
            raise ValueError(f"{self.where}: expected a row below {self.rows}, got {row}")
        values: dict[str, Any] = {name: self.flat_T[name][o[row] : o[row + 1]] for name, o in self.offsets.items()}
        values |= {name: int(value_B[row]) for name, value_B in self.weights_B.items()}
        return Trajectory(**values)


def remove(root: str, files: Iterable[str]) -> list[str]:
    """Delete files that are no longer needed, and return those that are gone now, so that the store can forget them.

    Keep the last file of each writer, which may still be written to. Raises ValueError for a file outside the root.
    """
    fs, directory = file_system(root)
    paths = {name: below(directory, name) for name in files}
    last = last_files(root)
    gone = [name for name in paths if name not in last.values()]
    for name in gone:
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            fs.rm_file(paths[name])
    return gone


def last_files(root: str) -> dict[str, str]:
    """Return the last file of each writer, by the writer's name."""
    fs, directory = file_system(root)
    there = {os.path.basename(path) for path in listing(fs, directory)}
    return {_writer(name): name for name in sorted(there, key=_number)}


def listing(fs: Any, directory: str) -> list[str]:
    """List a directory. One that does not exist is empty, as in an object store, which has no empty directories."""
    try:
        return list(fs.ls(directory, detail=False, refresh=True))
    except FileNotFoundError:
        return []


def below(directory: str, name: str) -> str:
    """Return the path of a file whose name comes from the store. Raises ValueError if it is outside the directory."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name:
        raise ValueError(f"file: expected a path below {directory}, got {name!r}")
    return f"{directory}/{name}"


def _is_deleted(file: io.FileIO) -> bool:
    """Return whether an open file has lost its name, so that nobody could read what is appended to it."""
    return os.fstat(file.fileno()).st_nlink == 0


def _writer(name: str) -> str:
    return name.rpartition("-")[0]


def _number(name: str) -> int:
    match = re.search(r"-(\d+)\.arrow$", name)
    return int(match[1]) if match else -1


def _record_batch(trajectories: Sequence[Trajectory]) -> pa.RecordBatch:
    lengths_B = np.array([len(t) for t in trajectories], np.int64)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths_B)]), pa.int32())
    columns = [_ragged([getattr(t, name) for t in trajectories], name, offsets) for name in DTYPES]
    weights = [pa.array([getattr(t, name) for t in trajectories], pa.int64()) for name in WEIGHTS]
    return pa.RecordBatch.from_arrays([*columns, *weights], schema=SCHEMA)


def _ragged(rows: list[np.ndarray], name: str, offsets: pa.Array) -> pa.ListArray:
    assert all(row.dtype == DTYPES[name] for row in rows), f"{name}: expected {DTYPES[name]} throughout"
    return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(rows)))


def _source(fs: Any, directory: str, name: str) -> Any:
    """Open one file below the directory as a seekable Arrow input: mapped if it is local, else fetched as a whole."""
    full = below(directory, name)
    return pa.memory_map(full) if isinstance(fs, LocalFileSystem) else pa.BufferReader(fs.cat_file(full))


def _first_free(fs: Any, root: str, agent: str) -> int:
    pattern = re.compile(rf"{re.escape(agent)}-(\d+)\.arrow")
    matches = (pattern.fullmatch(os.path.basename(path)) for path in listing(fs, root))
    return max((int(match[1]) + 1 for match in matches if match), default=0)
