"""Decide which task a query asks, in the same way in every process of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mgrpo.engine.config.schema import Config
from mgrpo.engine.environment.base import Environment, Split
from mgrpo.engine.rollout.episodes import Job
from mgrpo.engine.run.identity import task_order
from mgrpo.engine.types import Task

# Warm-up and evaluation number their queries from here on, so that they draw other random numbers than rl queries.
WARMUP_QUERIES = 1 << 32
EVAL_QUERIES = 1 << 33


def load_tasks(environment: Environment, split: Split) -> Sequence[Task]:
    """Return the environment's tasks.

    Raises ValueError if there are none, or if they are not a sequence of Task.
    """
    tasks = environment.tasks(split)
    what = f"environment: {type(environment).__name__}.tasks({split!r})"
    if isinstance(tasks, str | Mapping) or not all(hasattr(tasks, name) for name in ("__len__", "__getitem__")):
        raise ValueError(f"{what} returned {type(tasks).__name__}: expected a list of Task")
    if len(tasks) == 0:
        raise ValueError(f"{what} is empty, expected tasks")
    for i, task in enumerate(tasks):
        if not isinstance(task, Task):
            raise ValueError(
                f"{what}[{i}] is {task!r:.80}: expected a Task, such as Task('an id', {{'question': '…'}})"
            )
        if not isinstance(task.id, str):
            raise ValueError(f"{what}[{i}].id is {task.id!r:.80}: expected text")
    return tasks


def in_order(tasks: Sequence[Task], run_dir: str | Path) -> Sequence[Task]:
    """Return the tasks to train on in the order in which the run counts them, which its first process wrote down.

    Tasks of which several have the same id stay as they are. Raises ValueError if the run has other ids.
    """
    by_id = {task.id: task for task in tasks}
    if len(by_id) < len(tasks):
        return tasks
    order = task_order(run_dir, list(by_id))
    if odd := sorted(set(order) ^ by_id.keys()):
        raise ValueError(
            f"environment: tasks('train') has {len(by_id)} ids, the run was begun with {len(order)}: {odd[0]!r} is not "
            "in both: expected the same ones, in any order"
        )
    return tasks if order == list(by_id) else [by_id[name] for name in order]


def digest_of(tasks: Sequence[Task]) -> str:
    """Return a hash of the tasks' ids and data: 16 bytes of blake2b in hex. If all ids differ, their order is ignored.

    Of data that JSON cannot express, only the types count, as their texts may differ between processes.
    """
    lines = [f"{task.id!r} {_text(task.data)}\n" for task in tasks]
    if len({task.id for task in tasks}) == len(tasks):
        lines.sort()
    digest = hashlib.blake2b(digest_size=16)
    for line in lines:
        digest.update(line.encode(errors="surrogatepass"))
    return digest.hexdigest()


def _text(data: object) -> str:
    try:
        return json.dumps(data, sort_keys=True, default=lambda value: type(value).__name__)
    except (TypeError, ValueError, RecursionError):  # keys that are no text, or a structure that contains itself
        return type(data).__name__


def pick(tasks: Sequence[Task], seed: int, query: int) -> Task:
    """Return the task of a query: all tasks come once in a shuffled order, then again in another one, and so on."""
    epoch, place = divmod(query, len(tasks))
    return tasks[np.random.default_rng([seed, epoch]).permutation(len(tasks))[place]]


def find_task(tasks: Sequence[Task], seed: int, query: int, task_id: str) -> Task:
    """Return the task that a query was opened with, also if the tasks have another order here.

    Raises ValueError if there is no such task here, or if several have its id.
    """
    task = pick(tasks, seed, query)
    if task.id == task_id:
        return task
    found = [task for task in tasks if task.id == task_id]
    if len(found) != 1:
        raise ValueError(
            f"environment: query {query} asks task {task_id!r}, and {len(found)} tasks of tasks('train') have this id: "
            "expected one, as in the process that began the query"
        )
    return found[0]


def warmup_jobs(tasks: Sequence[Task], config: Config, step: int) -> list[Job]:
    """Return the scripted episodes of one warm-up step."""
    first = WARMUP_QUERIES + step * config.warmup.episodes
    queries = range(first, first + config.warmup.episodes)
    return [Job(query, 0, pick(tasks, config.seed, query)) for query in queries]
