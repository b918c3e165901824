"""Write a run's config for a launcher, see whether its processes run, and record what its display shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mgrpo.engine.run.metrics import Row


def alive(pid: int) -> bool:
    """Return whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def written(folder: Path, raw: dict[str, Any], name: str = "run.toml") -> Path:
    """Write a run's config as a TOML file of dotted keys, and return its path."""

    def lines(value: Any, key: str) -> list[str]:
        if isinstance(value, dict):
            return [line for name, inner in value.items() for line in lines(inner, f"{key}.{name}".lstrip("."))]
        return [f"{key} = {json.dumps(value)}"]

    (folder / name).write_text("\n".join(lines(raw, "")))
    return folder / name


class Recording:
    """A display that keeps the stages, rows and texts that it is given."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int, int]] = []
        self.rows: list[Row] = []
        self.said: list[str] = []

    def stage(self, name: str, first: int, steps: int) -> None:
        self.stages.append((name, first, steps))

    def row(self, row: Row) -> None:
        self.rows.append(row)

    def say(self, text: str) -> None:
        self.said.append(text)

    def doing(self, text: str, part: float | None = None) -> None: ...

    def close(self) -> None: ...
