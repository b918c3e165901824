"""Follow a decoupled run by its metrics files, and show new rows on the display."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from mgrpo.engine.config.schema import Config
from mgrpo.engine.report.display import Display
from mgrpo.engine.report.metrics import Place, Tail, merge, place_of, prefixed
from mgrpo.engine.run.directory import RunPaths
from mgrpo.engine.run.metrics import STAGES, Row, is_evaluation

SCARCE = 1 << 20  # bytes; with less free space processes wait for more, and may be unable even to log that


class Unmerged:
    """Follow the rows of all processes of a run, and keep those that wait for another agent's row of the same step.

    Rows are forgotten once they are merged, so that the memory and the time of a look do not grow with the steps done.
    last: the newest row of each process, by its name and the stage.
    """

    def __init__(self, run: RunPaths, agents: Collection[str]) -> None:
        self.run = run
        self.agents = {name: Tail(run.agent(name).metrics) for name in agents}
        self.workers: dict[str, Tail] = {}
        self.last: dict[str, dict[str, Row]] = {name: {} for name in agents}
        self.first: Place = (0, 0, False)  # the first that is not merged yet
        self._waiting: dict[str, list[Row]] = {name: [] for name in agents}

    def read(self, late: bool = False) -> list[Row]:
        """Return, in order, the rows of steps that all agents have taken since the last call, and new evaluations.

        Steps that an agent takes again after a rewind are among them, as soon as it has.

        late: keep the last step until the next call, with what workers count for it meanwhile.
        """
        if any([self._follow(name, tail) for name, tail in self.agents.items()]):
            self._go_back()
        for path in self.run.worker_metrics():
            self.workers.setdefault(path.parent.name, Tail(path))
        for name, tail in self.workers.items():
            self._follow(name, tail)
        rows = merge({name: self._waiting[name] for name in self.agents}, [self._waiting[n] for n in self.workers])
        if late and (steps := [place_of(row) for row in rows if not is_evaluation(row)]):
            rows = [row for row in rows if is_evaluation(row) or place_of(row) < steps[-1]]
        self.first = max([self.first, *(_after(place_of(row)) for row in rows if not is_evaluation(row))])
        for name in self._waiting:
            self._waiting[name] = [row for row in self._waiting[name] if self._waits(row)]
        return rows

    def close(self) -> None:
        """Close the files."""
        for tail in (*self.agents.values(), *self.workers.values()):
            tail.close()

    def _follow(self, name: str, tail: Tail) -> bool:
        """Read what is new in a process's file, and return whether the file is another one than before."""
        if renewed := tail.renewed():
            self.last[name], self._waiting[name] = {}, []
        for row in tail.rows():
            if is_evaluation(row):
                self._waiting[name].append(row)
                continue
            self.last[name][row["stage"]] = row
            if self._waits(row):
                self._waiting[name].append(row)
        return renewed

    def _go_back(self) -> None:
        """Wait again for the steps that an agent lost by a rewind, with the rows of the others that belong to them."""
        nothing = (0, -1, True)
        reached = [max(map(place_of, self.last[name].values()), default=nothing) for name in self.agents]
        if (again := _after(min(reached))) >= self.first:
            return
        self.first = again
        for name, tail in (*self.agents.items(), *self.workers.items()):
            tail.restart()
            self._waiting[name] = [row for row in tail.rows() if not is_evaluation(row) and self._waits(row)]

    def _waits(self, row: Row) -> bool:
        return not is_evaluation(row) and place_of(row) >= self.first


class Watch:
    """Follow a run directory. Rows that were there before are not shown, only the step at which the run continues."""

    def __init__(self, config: Config, display: Display) -> None:
        self.display, self.rows = display, Unmerged(RunPaths(config.run_dir), config.agents)
        self.steps = {"warmup": config.warmup.steps, "rl": config.steps}
        self.stage = ""
        self.waits: list[str] = []  # what agents wait for, in words
        self.rows.read()
        self._begin(*self.rows.first[:2])

    def look(self, states: Mapping[str, str]) -> None:
        """Show what is new. states: the state of each process, in words."""
        for row in self.rows.read():
            self._show(place_of(row), row)
        self.display.now(self._now(), self._notes(states))

    def close(self) -> None:
        """Close the files that are followed."""
        self.rows.close()

    def _show(self, place: Place, row: Row) -> None:
        if row["stage"] != self.stage:
            self._begin(place[0], place[1])
        self.display.row(row)
        if place[2]:
            self._begin_next(place[0], place[1] + 1)

    def _begin(self, stage: int, step: int) -> None:
        """Show the stage and step at which the run is, skipping a stage that has no steps left."""
        self.stage = STAGES[stage]
        self.display.stage(self.stage, step, self.steps[self.stage])
        self._begin_next(stage, step)

    def _begin_next(self, stage: int, step: int) -> None:
        if step >= self.steps[STAGES[stage]] and stage + 1 < len(STAGES):
            self._begin(stage + 1, 0)

    def _now(self) -> Row:
        """Return each agent's newest metrics, of any step, and the number of steps it has taken."""
        row: Row = {}
        for name in self.rows.agents:
            if last := self.rows.last[name].get(self.stage):
                row |= prefixed(name, last) | {f"{name}/step": last["step"] + 1}
        return row

    def _waits(self) -> list[str]:
        """Return what agents wait for; say it too, once, for a display that shows no notes."""
        told = {name: _told(self.rows.run.agent(name).waiting) for name in self.rows.agents}
        waits = [f"{name} waits: {reason}" for name, reason in told.items() if reason]
        for text in waits:
            if text not in self.waits:
                self.display.say(text)
        self.waits = waits
        return waits

    def _notes(self, states: Mapping[str, str]) -> list[str]:
        rates = [rate(name, self.rows.last[name].get(self.stage, {})) for name in self.rows.workers]
        free = shutil.disk_usage(self.rows.run.path).free
        full = [f"the disk is full: {free} bytes free in {self.rows.run.path}"] if free < SCARCE else []
        return (
            full
            + self._waits()
            + [note for note in rates if note]
            + [f"{name} {state}" for name, state in states.items() if state != "running"]
        )


def _told(path: Path) -> str:
    """Return what a process wrote down that it waits for; "" if it does not wait."""
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""


def rate(worker: str, row: Row) -> str:
    """Return a worker's speed by its newest row, in words; "" if the row has none."""
    if row.get("perf/rollouts_per_second") is None:
        return ""
    waited = f", waited {row['time/waiting']:.1f} s" if row.get("time/waiting") is not None else ""
    return f"{worker} {row['perf/rollouts_per_second']:.1f} rollouts/s{waited}"


def _after(place: Place) -> Place:
    """Return the place of the evaluation that comes after a step."""
    return place[0], place[1] + 1, False
