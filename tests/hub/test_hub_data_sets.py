"""Test that tasks are read from data sets of any form alike, and that what is wrong with one is named."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_stub import point_to, serving
from huggingface_hub import HfApi

from mgrpo import read_dataset
from mgrpo.engine.types import Task

ROWS = [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(10)]


class InMemory:
    """What is used of a `datasets.Dataset`."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows, self.column_names = rows, list(rows[0])

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        return [self.rows[i] for i in numbers]


def parquet(folder: Path) -> Path:
    path = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path


def parquet_folder(folder: Path) -> Path:
    (folder / "rows").mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS[:4]), folder / "rows" / "train-00000.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS[4:]), folder / "rows" / "train-00001.parquet")
    return folder / "rows"


def json_lines(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def comma_separated(folder: Path) -> Path:
    path = folder / "rows.csv"
    path.write_text("question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in ROWS))
    return path


def on_a_hub(folder: Path) -> str:
    return "tiny/sums"


FORMS = [parquet, parquet_folder, json_lines, comma_separated, lambda _: InMemory(ROWS), on_a_hub]
NAMES = ["Parquet", "a folder of Parquet", "JSON lines", "CSV", "in memory", "on a hub"]


@pytest.fixture(autouse=True)
def datasets(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stand in for the package datasets; return what it was asked for."""
    asked: list[dict[str, Any]] = []

    def load_dataset(repo: str, subset: str | None, **options: Any) -> InMemory:
        asked.append({"repo": repo, "subset": subset} | options)
        return InMemory(ROWS)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_the_same_rows_are_the_same_tasks_in_every_form(form: Callable[[Path], Any], tmp_path: Path):
    source = form(tmp_path)
    assert read_dataset(source) == [Task(f"train/{i}", row) for i, row in enumerate(ROWS)]
    part = read_dataset(source, shuffle=True, seed=7, skip=2, limit=3, columns={"problem": "question"})
    rows = np.random.default_rng(7).permutation(10)[2:5]
    assert part == [Task(f"train/{i}", {"problem": ROWS[i]["question"]}) for i in rows]


def test_a_seed_gives_an_order_and_parts_do_not_overlap(tmp_path: Path):
    source = json_lines(tmp_path)
    train = read_dataset(source, shuffle=True, seed=1, limit=7)
    held_out = read_dataset(source, shuffle=True, seed=1, skip=7)
    assert sorted(task.id for task in train + held_out) == [f"train/{i}" for i in range(10)]
    assert read_dataset(source, shuffle=True, seed=2, limit=7) != train


def test_a_hub_is_asked_with_all_that_was_given_and_the_token(
    datasets: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", "mine")
    read_dataset("tiny/sums", "small", split="test", revision="v1")
    assert datasets == [{"repo": "tiny/sums", "subset": "small", "split": "test", "revision": "v1", "token": "mine"}]


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (
            404,
            "RepoNotFound",
            "'tiny/none' given: http.* has no such data set: expected an id that it has, or HF_TOKEN",
        ),
        (
            403,
            "GatedRepo",
            "it is gated: expected that you accept its licence at http.*/datasets/tiny/none and set HF_",
        ),
    ],
)
def test_what_the_hub_said_is_told_whatever_the_package_makes_of_it(
    status: int, code: str, message: str, monkeypatch: pytest.MonkeyPatch
):
    def load_dataset(*_: Any, **__: Any) -> None:
        try:
            HfApi().dataset_info("tiny/none")
        except OSError as error:  # as the package datasets does: without the cause
            missing = FileNotFoundError("Dataset doesn't exist on the Hub or cannot be accessed.")
            missing.__context__ = error
            raise missing from None

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with serving() as hub:
        point_to(hub.url, monkeypatch)
        hub.faults["/api/datasets/"] = [(status, {"X_Error_Code": code})]
        with pytest.raises(ValueError, match=f"data set: .*{message}"):
            read_dataset("tiny/none")


def test_a_split_that_is_not_there_is_told_as_the_package_does(monkeypatch: pytest.MonkeyPatch):
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ValueError('Unknown split "dev". Should be one of [...]')

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(
        ValueError, match=r'data set: \'tiny/sums\' given: Unknown split "dev"\. Should be one of \[\.\.\.\]$'
    ):
        read_dataset("tiny/sums", split="dev")


def test_a_dictionary_of_splits(tmp_path: Path):
    splits = {"train": InMemory(ROWS), "test": InMemory(ROWS[:2])}
    assert [task.id for task in read_dataset(splits, split="test")] == ["test/0", "test/1"]
    with pytest.raises(ValueError, match="split 'dev' given: expected one of train, test of dict"):
        read_dataset(splits, split="dev")


def test_ids_are_those_of_a_column_if_they_name_rows():
    named = [{"id": 10 + i, **row} for i, row in enumerate(ROWS)]
    assert read_dataset(InMemory(named))[0].id == "10"
    assert read_dataset(InMemory(named), id_column="answer")[0].id == "1"
    same = [{"id": "x", **row} for row in ROWS]
    assert read_dataset(InMemory(same))[3].id == "train/3"
    with pytest.raises(ValueError, match=r"id_column: 'id' given: expected a column of distinct texts .*, not 'x'"):
        read_dataset(InMemory(same), id_column="id")


def test_values_are_those_of_json(tmp_path: Path):
    row = {"when": datetime.date(2026, 1, 2), "many": [1, {"a": None}], "empty": None}
    assert read_dataset(InMemory([row]))[0].data == {"when": "2026-01-02", "many": [1, {"a": None}], "empty": None}
    with pytest.raises(ValueError, match=r"column 'image' of InMemory holds bytes: expected .* columns = \[\.\.\.\]"):
        read_dataset(InMemory([{"image": b"\xff", "text": "x"}]))
    assert read_dataset(InMemory([{"image": b"\xff", "text": "x"}]), columns=["text"])[0].data == {"text": "x"}


def test_a_row_may_lack_a_column_of_json_lines(tmp_path: Path):
    (tmp_path / "x.jsonl").write_text('{"a": "1\\u2028"}\n\n{"b": 2}\n')
    tasks = read_dataset(tmp_path / "x.jsonl")
    assert [task.data for task in tasks] == [
        {"a": "1\u2028", "b": None},
        {"a": None, "b": 2},
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": {"problem": "qestion"}}, "columns: 'qestion' given: expected a column of .*: question, answer"),
        ({"columns": ["no"]}, "columns: 'no' given: expected a column of .*: question, answer"),
        ({"id_column": "key"}, "id_column: 'key' given: expected a column of .*: question, answer"),
        ({"skip": 10}, "skip = 10 and limit = None given: expected to leave some of the 10 rows"),
        ({"limit": 0}, "skip = 0 and limit = 0 given: expected to leave some"),
        ({"limit": -1}, "limit: -1 given: expected at least 0"),
    ],
)
def test_what_is_asked_for_in_vain_is_named(options: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=f"data set: {message}"):
        read_dataset(parquet(tmp_path), **options)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"a": 1}\n{"a"\n', 'row 2: {"a" given: expected JSON'),
        ("x.jsonl", b"[1]\n", r"row 1: \[1\] given: expected an object"),
        ("x.jsonl", b"\xff\n", "cannot be read: .*utf-8"),
        ("x.parquet", b"no Parquet", "cannot be read"),
        ("x.csv", b"a,b\n1\n", "row 1: expected 2 values"),
        ("x.csv", b"a,b\n1,2,3\n", "row 1: expected 2 values"),
        ("x.txt", b"a", "expected a name that ends in one of .parquet, .jsonl, .csv"),
    ],
)
def test_a_file_that_is_none(name: str, content: bytes, message: str, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_dataset(tmp_path / name)


def test_a_place_where_nothing_is(tmp_path: Path):
    with pytest.raises(ValueError, match="expected a file, a directory of Parquet files, or the id of a data set"):
        read_dataset(tmp_path / "none.parquet")


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"expected the package datasets: pip install mgrpo\[data\]"):
        read_dataset("tiny/sums")
