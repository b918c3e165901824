"""The rows of metrics of a run as one sequence, whoever wrote them.

In a decoupled run each agent's trainer and each rollout worker has a metrics.jsonl of its own. Merged they read as a
colocated run's: an agent's metrics after its name, the workers' rollouts/* and time/rollout as they are, what else the
workers say after "workers/", and as time/step the slowest agent's.
"""

from __future__ import annotations

import io
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mgrpo.engine.config.schema import Config
from mgrpo.engine.report.display import is_evaluation
from mgrpo.engine.run.directory import read_metrics
from mgrpo.engine.run.tensorboard import STAGES

Row = dict[str, Any]
Place = tuple[int, int, bool]  # of a row: stage, step, and whether it is the step's (an evaluation comes before it)


def read_rows(run: Path, config: Config) -> list[Row]:
    """All rows of a run directory, in order. Of a decoupled run, steps that every agent has taken, and evaluations."""
    if config.topology == "colocated":
        return read_metrics(run / "metrics.jsonl")
    agents = {name: read_metrics(run / "agents" / name / "metrics.jsonl") for name in config.agents}
    return merge(agents, [read_metrics(path) for path in worker_files(run)])


def worker_files(run: Path) -> list[Path]:
    return sorted(run.glob("workers/*/metrics.jsonl"))


def merge(
    agents: Mapping[str, Sequence[Mapping[str, Any]]], workers: Sequence[Sequence[Mapping[str, Any]]]
) -> list[Row]:
    """Of each agent and each worker its rows; returns the run's. Of two evaluations of a step the last counts."""
    steps = {name: {place_of(row): row for row in rows} for name, rows in agents.items()}
    whole = set.intersection(*(set(rows) for rows in steps.values()))
    sampled = _sampled(workers)
    merged: dict[Place, Row] = {
        place: head(place) | sampled[place] | _together({name: rows[place] for name, rows in steps.items()})
        for place in whole
    }
    merged |= {place_of(row): dict(row) for rows in workers for row in rows if is_evaluation(row)}
    return [merged[place] for place in sorted(merged)]


def place_of(row: Mapping[str, Any]) -> Place:
    return STAGES.index(row["stage"]), row["step"], not is_evaluation(row)


def head(place: Place) -> Row:
    return {"stage": STAGES[place[0]], "step": place[1]}


def prefixed(name: str, row: Mapping[str, Any]) -> Row:
    return {f"{name}/{key}": value for key, value in row.items() if key not in ("stage", "step")}


def _together(rows: Mapping[str, Mapping[str, Any]]) -> Row:
    """One step's rows, of all agents."""
    merged: Row = {}
    for name, row in rows.items():
        merged |= prefixed(name, row)
    times = [row["time/step"] for row in rows.values() if row.get("time/step") is not None]
    return merged | ({"time/step": max(times)} if times else {})


def _sampled(workers: Sequence[Sequence[Mapping[str, Any]]]) -> defaultdict[Place, Row]:
    """What the workers did for each step: counts of all, and the seconds of the one that took longest."""
    totals: defaultdict[Place, list[Counter[str]]] = defaultdict(list)
    for rows in workers:
        mine: defaultdict[Place, Counter[str]] = defaultdict(Counter)
        for row in rows:
            if not is_evaluation(row):
                mine[place_of(row)].update(_numbers(row))
        for place, counter in mine.items():
            totals[place].append(counter)
    return defaultdict(dict, {place: _all_workers(counters) for place, counters in totals.items()})


def _all_workers(counters: Sequence[Counter[str]]) -> Row:
    keys = sorted({key for counter in counters for key in counter})
    join = {key: sum if key.startswith("rollouts/") else max for key in keys}
    named = {key: key if key.startswith("rollouts/") or key == "time/rollout" else f"workers/{key}" for key in keys}
    return {named[key]: join[key](counter[key] for counter in counters) for key in keys}


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    kinds = ("rollouts/", "time/")  # what adds up over a step's several rows
    return {key: value for key, value in row.items() if key.startswith(kinds) and value is not None}


class Tail:
    """The rows of a metrics.jsonl that another process appends to and may take back to an earlier step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        self._file: io.FileIO | None = None

    def read(self) -> bool:
        """Brings `rows` up to date; returns whether anything changed."""
        anew = self._open()
        if self._file is None:
            return False
        text = self._file.readall()
        whole = text[: text.rfind(b"\n") + 1]
        self._file.seek(len(whole) - len(text), os.SEEK_CUR)
        self.rows += map(json.loads, whole.splitlines())
        return bool(whole) or anew

    def _open(self) -> bool:
        """Whether there is another file than before, as after a rewind.

        Until then the old one is held open: the kernel gives the number of one that is gone to the next.
        """
        try:
            now = self.path.stat()
            if self._file and os.path.samestat(now, os.fstat(self._file.fileno())) and now.st_size >= self._file.tell():
                return False
            old, self._file = self._file, io.FileIO(self.path)
        except FileNotFoundError:
            return False
        if old:
            old.close()
        self.rows = []
        return True


def newest(rows: Iterable[Row], stage: str) -> Row:
    """The last row of a step of the stage; empty if there is none."""
    last: Row = {}
    for row in rows:
        if row["stage"] == stage and not is_evaluation(row):
            last = row
    return last
