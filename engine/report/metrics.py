"""Read the metrics of a run as one sequence of rows, also if several processes wrote them.

In a decoupled run each agent's trainer and each rollout worker writes its own metrics.jsonl. Merged, they read like
those of a colocated run: an agent's metrics get its name as prefix, the workers' rollouts/* and time/rollout keep their
keys, all other worker metrics get the prefix "workers/", and time/step is that of the slowest agent.
"""

from __future__ import annotations

import io
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mgrpo.engine.config.schema import Config
from mgrpo.engine.run.directory import RunPaths
from mgrpo.engine.run.metrics import STAGES, Row, is_evaluation, parse_row, read_metrics

# Of a row: stage, step, and False for an evaluation, which comes before the step itself.
Place = tuple[int, int, bool]
FLAT = 3  # steps without any gradient, in a row, that are worth a word
PIECE = 1 << 20  # bytes that are read at a time; no row is as long


def read_rows(run: Path, config: Config) -> list[Row]:
    """Return all rows of a run in order; for a decoupled run, evaluations and steps that all agents have taken."""
    paths = RunPaths(run)
    if config.colocated:
        return read_metrics(paths.metrics)
    agents = {name: read_metrics(paths.agent(name).metrics) for name in config.agents}
    return merge(agents, [read_metrics(path) for path in paths.worker_metrics()])


def merge(agents: Mapping[str, Sequence[Row]], workers: Sequence[Sequence[Row]]) -> list[Row]:
    """Merge the rows of each agent and each worker into those of the run. The last evaluation of a step counts."""
    steps = {name: {place_of(row): row for row in rows} for name, rows in agents.items()}
    whole = set.intersection(*(set(rows) for rows in steps.values()))
    sampled = _sampled(workers)
    merged: dict[Place, Row] = {
        place: head(place) | sampled[place] | _together({name: rows[place] for name, rows in steps.items()})
        for place in whole
    }
    merged |= {place_of(row): dict(row) for rows in workers for row in rows if is_evaluation(row)}
    return [merged[place] for place in sorted(merged)]


def place_of(row: Row) -> Place:
    """Return a row's place in the order of rows."""
    return STAGES.index(row["stage"]), row["step"], not is_evaluation(row)


def head(place: Place) -> Row:
    """Return a row with only stage and step."""
    return {"stage": STAGES[place[0]], "step": place[1]}


def without_gradient(rows: Iterable[Row]) -> int:
    """Return how many rl steps in a row, up to the last one, gave no agent a gradient."""
    number = 0
    for row in rows:
        if row["stage"] == "rl" and not is_evaluation(row):
            norms = [value for key, value in row.items() if key.endswith("/grad_norm")]
            number = number + 1 if norms and not any(norms) else 0
    return number


def flat(steps: int) -> str:
    """Say that the last steps gave no gradient; "" if they are too few to mention."""
    if steps < FLAT:
        return ""
    return f"no gradient in the last {steps} steps: all rewards of a group are equal, so that nothing is learnt"


def prefixed(name: str, row: Row) -> Row:
    """Return a row's metrics with `name`/ before each key, without stage and step."""
    return {f"{name}/{key}": value for key, value in row.items() if key not in ("stage", "step")}


def _together(rows: Mapping[str, Row]) -> Row:
    """Merge all agents' rows of one step."""
    merged: Row = {}
    for name, row in rows.items():
        merged |= prefixed(name, row)
    times = [row["time/step"] for row in rows.values() if row.get("time/step") is not None]
    return merged | ({"time/step": max(times)} if times else {})


def _sampled(workers: Sequence[Sequence[Row]]) -> defaultdict[Place, Row]:
    """Sum up what the workers did for each step: the counts of all, and the seconds of the slowest."""
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


def _numbers(row: Row) -> dict[str, Any]:
    kinds = ("rollouts/", "time/")  # keys that are summed over a worker's several rows of a step
    return {key: value for key, value in row.items() if key.startswith(kinds) and value is not None}


class Tail:
    """Follow a metrics.jsonl to which another process appends and which it may rewind to an earlier step.

    It keeps no rows, so that it may follow a run of any length.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: io.FileIO | None = None

    def renewed(self) -> bool:
        """Open the file if it is another one than before, as after a rewind, and return whether it is.

        The old file stays open until then, because the kernel reuses the inode number of a file that is gone.
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
        return True

    def rows(self) -> Iterator[Row]:
        """Yield the rows that were appended since the last call, or all of a renewed file.

        A line that is no row, as a damaged disk leaves, is left out: a display need not show everything.
        """
        while self._file and (text := self._file.read(PIECE)):
            whole = text[: text.rfind(b"\n") + 1]
            self._file.seek(len(whole) - len(text), os.SEEK_CUR)
            if not whole:
                return
            yield from filter(None, map(parse_row, whole.splitlines()))

    def restart(self) -> None:
        """Let `rows` begin with the first row again."""
        if self._file:
            self._file.seek(0)

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()
            self._file = None
