"""Read tasks from a data set in one line: from a hub, a Parquet, JSON-lines or CSV file, or one that is in memory.

Rows are numbered as the data set has them, then shuffled, then a part of them is taken. So the same arguments give the
same tasks in the same order in every process, and a row has the same id in whatever part of the data set it is taken.
"""

from __future__ import annotations

import csv
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mgrpo.engine.config.hub_names import looks_like_id
from mgrpo.engine.hub.failures import HubSource, explaining, patiently, token
from mgrpo.engine.types import Task

log = logging.getLogger(__name__)
Row = dict[str, Any]
Plain = bool | int | float | str | None


@dataclass(frozen=True)
class Table:
    """Hold rows that are read when they are asked for. name: what errors call them."""

    name: str
    columns: Sequence[str]
    size: int
    take: Callable[[list[int]], list[Row]]


def read_dataset(
    source: Any,
    subset: str = "",
    *,
    split: str = "train",
    revision: str = "",
    columns: Mapping[str, str] | Sequence[str] | None = None,
    id_column: str = "",
    shuffle: bool = False,
    seed: int = 0,
    skip: int = 0,
    limit: int | None = None,
) -> list[Task]:
    """Return the rows of a data set as tasks.

    source: the path of a .parquet, .jsonl or .csv file, or of a directory of Parquet files; a `datasets.Dataset`, or a
    `DatasetDict`; or the id of a data set on a hub, such as "openai/gsm8k", which needs the package datasets. subset,
    split, revision: of that data set; `split` also picks from a `DatasetDict`. columns: what a task's data holds: the
    column of each name in it, or the columns that keep their names; None: all columns. id_column: the column that names
    the tasks; empty: the column "id" if there is one of distinct texts or whole numbers, else "split/number of the
    row". shuffle: by `seed`, before `skip` rows are left out and at most `limit` are taken.

    Raises ValueError naming what is wrong: the file, the data set, the split, or the column and those that there are.
    """
    table = _table(source, subset, split, revision)
    names = _names(table, columns)
    rows = _order(table, shuffle, seed, skip, limit)
    found = table.take(rows)
    ids = _ids(table, found, id_column, [f"{split}/{row}" for row in rows])
    return [
        Task(task, {name: _plain(table, column, row[column]) for name, column in names.items()})
        for task, row in zip(ids, found, strict=True)
    ]


def _table(source: Any, subset: str, split: str, revision: str) -> Table:
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.exists() or not looks_like_id(str(source)):
            return _file(path)
        return _memory(_load(str(source), subset, split, revision), split, str(source))
    return _memory(source, split, type(source).__name__)


def _file(path: Path) -> Table:
    readers = {".parquet": _parquet, ".jsonl": _json_lines, ".csv": _csv}
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(
            f"data set: {path} given: expected a file, a directory of Parquet files, or the id of a data set on a hub, "
            "such as 'openai/gsm8k'"
        )
    reader = readers.get(files[0].suffix)
    if reader is None:
        raise ValueError(f"data set: {path} given: expected a name that ends in one of {', '.join(readers)}")
    try:
        return reader(path, files)
    except (OSError, pa.ArrowException, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"data set: {path} cannot be read: {error}") from error


def _parquet(path: Path, files: Sequence[Path]) -> Table:
    table = pa.concat_tables([pq.read_table(file) for file in files], promote_options="default")

    def take(rows: list[int]) -> list[Row]:
        return list(table.take(pa.array(rows, pa.int64())).to_pylist())

    return Table(str(path), table.column_names, table.num_rows, take)


def _json_lines(path: Path, _: Sequence[Path]) -> Table:
    rows = [_object(path, number, line) for number, line in enumerate(_lines(path), 1)]
    columns = list(dict.fromkeys(name for row in rows for name in row))

    def take(taken: list[int]) -> list[Row]:
        return [{name: rows[i].get(name) for name in columns} for i in taken]

    return Table(str(path), columns, len(rows), take)


def _lines(path: Path) -> list[str]:
    """Return the lines; only a line feed ends one, unlike for `splitlines`, which also splits within JSON's texts."""
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def _object(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data set: {path}, row {number}: {line:.80} given: expected JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"data set: {path}, row {number}: {line:.80} given: expected an object")
    return row


def _csv(path: Path, _: Sequence[Path]) -> Table:
    """Read a file with a line of names on top. Every value stays the text that it is."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        rows, columns = list(reader), list(reader.fieldnames or ())
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise ValueError(f"data set: {path}, row {number}: expected {len(columns)} values, one for each column")
    return Table(str(path), columns, len(rows), lambda taken: [rows[i] for i in taken])


def _memory(data: Any, split: str, name: str) -> Table:
    """Take a data set of the package datasets, as it is."""
    if isinstance(data, Mapping):
        if split not in data:
            raise ValueError(f"data set: split {split!r} given: expected one of {', '.join(data)} of {name}")
        data = data[split]
    if not hasattr(data, "column_names") or not hasattr(data, "select"):
        kind = type(data).__name__
        raise ValueError(f"data set: {kind} given: expected a path, an id, or a datasets.Dataset that is not streamed")
    return Table(name, list(data.column_names), len(data), lambda rows: [dict(row) for row in data.select(rows)])


def _load(repo: str, subset: str, split: str, revision: str) -> Any:
    """Load a data set from a hub, with the user's token."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"data set: {repo!r} given: expected the package datasets: pip install mgrpo[data]") from error

    def load() -> Any:
        return load_dataset(repo, subset or None, split=split, revision=revision or None, token=token())

    with explaining(HubSource(repo, revision, kind="data set")):
        return patiently(load, log.warning, repo)


def _names(table: Table, columns: Mapping[str, str] | Sequence[str] | None) -> dict[str, str]:
    """Return the column of each name in a task's data."""
    if columns is None:
        columns = table.columns
    names = dict(columns) if isinstance(columns, Mapping) else {name: name for name in columns}
    for column in names.values():
        _check_column(table, column, "columns")
    return names


def _check_column(table: Table, column: str, key: str) -> None:
    if column not in table.columns:
        raise ValueError(
            f"data set: {key}: {column!r} given: expected a column of {table.name}: {', '.join(table.columns)}"
        )


def _order(table: Table, shuffle: bool, seed: int, skip: int, limit: int | None) -> list[int]:
    """Return the numbers of the rows that are taken, in their order."""
    for key, value in (("skip", skip), ("limit", limit)):
        if value is not None and value < 0:
            raise ValueError(f"data set: {key}: {value} given: expected at least 0")
    rows = np.random.default_rng(seed).permutation(table.size) if shuffle else np.arange(table.size)
    taken = rows[skip : None if limit is None else skip + limit]
    if not len(taken):
        raise ValueError(
            f"data set: skip = {skip} and limit = {limit} given: expected to leave some of the {table.size} rows of "
            f"{table.name}"
        )
    return [int(row) for row in taken]


def _ids(table: Table, rows: Sequence[Row], column: str, numbers: list[str]) -> list[str]:
    if column:
        _check_column(table, column, "id_column")
    elif "id" not in table.columns:
        return numbers
    found = [row[column or "id"] for row in rows]
    usable = all(isinstance(value, str | int) for value in found)
    ids = [str(value) for value in found]
    if usable and len(set(ids)) == len(ids):
        return ids
    if column:
        odd = next((each for each, times in Counter(ids).items() if times > 1), ids[0])
        raise ValueError(
            f"data set: id_column: {column!r} given: expected a column of distinct texts or whole numbers, not {odd!r}"
        )
    return numbers


def _plain(table: Table, column: str, value: Any) -> Any:
    """Return a value as JSON has it, so that the digest of a run's tasks covers it. Raises ValueError for any other."""
    if isinstance(value, Plain):
        return value
    if isinstance(value, list | tuple):
        return [_plain(table, column, each) for each in value]
    if isinstance(value, Mapping):
        return {str(name): _plain(table, column, each) for name, each in value.items()}
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    raise ValueError(
        f"data set: column {column!r} of {table.name} holds {type(value).__name__}: expected texts, numbers, dates, "
        "lists and objects; leave it out by columns = [...]"
    )
