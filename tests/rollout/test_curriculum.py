"""Test what an environment may return as its tasks."""

from __future__ import annotations

from typing import Any

import pytest

from mgrpo.engine.environment.base import Environment
from mgrpo.engine.rollout.curriculum import find_task, load_tasks, pick
from mgrpo.engine.types import Task


class Given(Environment):
    def __init__(self, given: Any) -> None:
        self.given = given

    def tasks(self, split):
        return self.given


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ((Task(str(i), {}) for i in range(3)), r"tasks\('train'\) returned generator: expected a list of Task"),
        ({"a": Task("a", {})}, "returned dict: expected a list of Task"),
        ("abc", "returned str: expected a list of Task"),
        (None, "returned NoneType: expected a list of Task"),
        ({Task("a", 1)}, "returned set: expected a list of Task"),
        ([], r"tasks\('train'\) is empty, expected tasks"),
        ([Task("a", {}), {"id": "b", "q": "2"}], r"tasks\('train'\)\[1\] is \{'id': 'b', 'q': '2'\}: expected a Task"),
        (["a", "b"], r"\[0\] is 'a': expected a Task"),
        ([Task(5, {})], r"\[0\]\.id is 5: expected text"),  # type: ignore[arg-type]
    ],
)
def test_tasks_of_another_kind_are_named_in_one_line(given, told):
    with pytest.raises(ValueError, match=rf"^environment: Given\..*{told}") as caught:
        load_tasks(Given(given), "train")
    assert "\n" not in str(caught.value)


class Lazy:
    """A sequence of its own kind, as data sets are."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> Task:
        if i >= 3:
            raise IndexError(i)
        return Task(str(i), {})


@pytest.mark.parametrize("given", [[Task("a", {})], (Task("a", {}),), Lazy()])
def test_any_sequence_of_tasks_is_taken_as_it_is(given):
    assert load_tasks(Given(given), "train") is given


def test_a_query_asks_its_own_task_wherever_that_is_in_the_list():
    tasks = [Task(f"{i}", {}) for i in range(9)]
    other = [tasks[i] for i in (4, 2, 7, 0, 8, 1, 3, 6, 5)]
    for query in range(20):
        opened = pick(tasks, 0, query)
        assert find_task(tasks, 0, query, opened.id) is find_task(other, 0, query, opened.id) is opened


@pytest.mark.parametrize(("ids", "number"), [("abcd", 0), ("xxab", 2)])
def test_a_query_whose_task_is_not_known_here_is_refused(ids, number):
    tasks = [Task(name, {}) for name in ids]
    query = next(query for query in range(9) if pick(tasks, 0, query).id != "x")
    with pytest.raises(
        ValueError, match=rf"query {query} asks task 'x', and {number} tasks of .* have this id: expected"
    ):
        find_task(tasks, 0, query, "x")


def test_tasks_that_share_an_id_are_told_apart_by_their_place():
    tasks = [Task("x", {"n": n}) for n in range(5)]
    for query in range(10):
        assert find_task(tasks, 0, query, "x") is pick(tasks, 0, query)
