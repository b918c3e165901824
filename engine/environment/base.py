"""Define the one small class that a user writes to train on their own problem, and read task files for it."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import ClassVar

from mgrpo.engine.types import Action, Call, Delegate, Episode, Score, Task, ToolCall

Split = str  # "train", "held_out", or the name of another set in eval.sets


def read_tasks(path: str | Path) -> list[Task]:
    """Read tasks from a JSON-lines file. Each line is an object: the task's data, in which "id" names the task.

    Raises ValueError naming the file and the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"tasks: {path} is not a file: expected one with a JSON object per line")
    tasks: dict[str, Task] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"tasks: {path}, line {number}: {line[:80]!r} given: expected JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("id"), str):
            raise ValueError(
                f"tasks: {path}, line {number}: {line[:80]!r} given: expected an object with a string 'id'"
            )
        if row["id"] in tasks:
            raise ValueError(f"tasks: {path}, line {number}: id {row['id']!r} given again: expected each id once")
        tasks[row["id"]] = Task(row["id"], row)
    if not tasks:
        raise ValueError(f"tasks: {path} is empty: expected one JSON object per line")
    return list(tasks.values())


class ToolError(Exception):
    """Report a mistake of the agent in a tool call. The agent gets the error's text as the tool's result."""


class Environment:
    """Define the tasks, the agents' prompts and tools, how texts become actions, and how episodes are scored.

    Most methods get a call: `call.agent` is the agent's name, `call.task` and `call.request` say what it is to do, and
    `call.turns` holds what has happened so far. Texts are raw: they spell out the special tokens of a chat template. An
    exception other than ToolError ends its episode as `failed` (in `score`, it leaves the episode unscored). It is
    logged and counted, and the run continues.

    Methods that are not `async` run in threads, usually one after the other in the same thread; while one takes long,
    others run beside it. in_threads: False for code that must not leave the main thread; one that blocks then holds up
    all episodes. No time limit ends it alone: after `sampling.timeout` seconds, in a worker `store.lease` seconds more,
    the whole process ends with an error that names it.

    volatile: names of the options that may change when a run is resumed, because nothing that was trained depends on
    them, such as the address of a judge.
    """

    in_threads: ClassVar[bool] = True
    volatile: ClassVar[Collection[str]] = ()

    def tasks(self, split: Split) -> Sequence[Task]:
        """Return the tasks to train on, those held out for evaluation, or those of another set that eval.sets names."""
        raise NotImplementedError

    def prompt(self, call: Call) -> str:
        """Return the text that an agent's call starts with."""
        raise NotImplementedError

    def parse(self, call: Call, text: str) -> Action:
        """Return the action in the text: Answer, Malformed, or a tuple of ToolCall and Delegate that run together."""
        raise NotImplementedError

    def tool(self, call: Call, use: ToolCall) -> str:
        """Run a tool and return its result as text. Raise ToolError for a mistake of the agent."""
        raise ToolError(f"there is no tool named {use.name!r}")

    def observation(self, call: Call, results: Sequence[tuple[ToolCall | Delegate, str]]) -> str:
        """Return the text that an agent reads after its tool calls and delegations, given their results in order."""
        return "".join(f"{text}\n" for _, text in results)

    def score(self, episode: Episode) -> Score:
        """Return format and correctness of the episode, and format and expert score of each sub-agent call."""
        raise NotImplementedError

    def correct(self, episode: Episode) -> float:
        """Return the correctness of an episode of an evaluation, which needs no more. If not defined, `score` tells."""
        raise NotImplementedError

    def script(self, call: Call) -> str:
        """Return the next text of a demonstration, with its stop string. Only warm-up needs this method."""
        raise NotImplementedError(f"{type(self).__name__} has no script(), which warm-up needs")
