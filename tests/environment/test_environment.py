"""Test task files, and the defaults of an environment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mgrpo.engine.environment.base import Environment, ToolError, read_tasks
from mgrpo.engine.types import Call, Delegate, Task, ToolCall


def test_tasks_are_read_in_order_with_their_data(tmp_path: Path) -> None:
    rows = [{"id": "b", "question": "Où?"}, {"id": "a", "hops": [1, 2]}]
    (tmp_path / "tasks.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    assert read_tasks(tmp_path / "tasks.jsonl") == [Task("b", rows[0]), Task("a", rows[1])]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"tasks: .*tasks\.jsonl is empty: expected one JSON object per line"),
        ('{"id": "a"}\n{"id": \n', r"tasks\.jsonl, line 2: '\{\"id\": ' given: expected JSON"),
        ('{"id": "a"}\n\n', r"line 2: '' given: expected JSON"),
        ('{"id": "a"}\n[1]\n', r"line 2: '\[1\]' given: expected an object with a string 'id'"),
        ('{"name": "a"}\n', r"line 1: .* given: expected an object with a string 'id'"),
        ('{"id": 7}\n', r"line 1: .* given: expected an object with a string 'id'"),
        ('{"id": "a"}\n{"id": "b"}\n{"id": "a"}\n', r"line 3: id 'a' given again: expected each id once"),
    ],
)
def test_an_invalid_task_file_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "tasks.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_tasks(tmp_path / "tasks.jsonl")


def test_a_missing_task_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"tasks: .*nowhere\.jsonl is not a file: expected one with a JSON object per line"
    ):
        read_tasks(tmp_path / "nowhere.jsonl")


def test_by_default_there_is_no_tool_and_results_are_read_line_by_line() -> None:
    environment, call = Environment(), Call("main", Task("a", {}))
    with pytest.raises(ToolError, match="there is no tool named 'search'"):
        environment.tool(call, ToolCall("search", "x"))
    assert environment.observation(call, [(ToolCall("t", "x"), "one"), (Delegate("sub", "y"), "two")]) == "one\ntwo\n"
