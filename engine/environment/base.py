"""What a user writes to train on a problem of their own: one small class."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from mgrpo.engine.types import Action, Call, Delegate, Episode, Score, Task, ToolCall

Split = Literal["train", "held_out"]


def read_tasks(path: str | Path) -> list[Task]:
    """Tasks from a JSON-lines file: one object a line, whose "id" names the task and which is its data.

    Raises ValueError that names the file and the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"tasks: {path} is no file, expected one JSON object a line")
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
        raise ValueError(f"tasks: {path} is empty, expected one JSON object a line")
    return list(tasks.values())


class ToolError(Exception):
    """Raised by a tool for what the agent did wrong; its text goes back to the agent as the tool's result."""


class Environment:
    """The task list, the agents' prompts and tools, how an action is read and how an episode is scored.

    Every method is told the call it is about: `call.agent` says whose, `call.task` and `call.request` what for, and
    `call.turns` what happened so far. Texts are raw: special tokens of a chat template are written out in them.
    An exception other than ToolError ends that episode as `failed` (in `score`: leaves it unscored); it is logged and
    counted, and the run goes on.
    """

    def tasks(self, split: Split) -> Sequence[Task]:
        """The tasks to train on, or those held out for evaluation."""
        raise NotImplementedError

    def prompt(self, call: Call) -> str:
        """The text an agent's call starts with."""
        raise NotImplementedError

    def parse(self, call: Call, text: str) -> Action:
        """What the agent's text means: Answer, Malformed, or a tuple of ToolCall and Delegate run side by side."""
        raise NotImplementedError

    def tool(self, call: Call, use: ToolCall) -> str:
        """The result of a tool as text. Raise ToolError for what the agent did wrong."""
        raise ToolError(f"there is no tool named {use.name!r}")

    def observation(self, call: Call, results: Sequence[tuple[ToolCall | Delegate, str]]) -> str:
        """The text an agent reads after its tool calls and delegations, given each one's result in order."""
        return "".join(f"{text}\n" for _, text in results)

    def score(self, episode: Episode) -> Score:
        """Format and correctness of the episode, and format and expert score of each sub-agent call."""
        raise NotImplementedError

    def script(self, call: Call) -> str:
        """The action a demonstration takes next in this call, stop string included. Needed for warm-up only."""
        raise NotImplementedError(f"{type(self).__name__} has no script(), which warm-up needs")
