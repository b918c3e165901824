"""Follow a decoupled run by its metrics files, and show new rows on the display."""

from __future__ import annotations

import shutil
from collections.abc import Mapping

from mgrpo.engine.config.schema import Config
from mgrpo.engine.report.display import Display
from mgrpo.engine.report.metrics import Place, Tail, merge, newest, place_of, prefixed
from mgrpo.engine.run.directory import RunPaths
from mgrpo.engine.run.metrics import STAGES, Row

SCARCE = 1 << 20  # bytes; with less free space processes wait for more, and may be unable even to log that


class Watch:
    """Follow a run directory. Rows that were there before are not shown, only the step at which the run continues."""

    def __init__(self, config: Config, display: Display) -> None:
        self.run, self.display = RunPaths(config.run_dir), display
        self.steps = {"warmup": config.warmup.steps, "rl": config.steps}
        self.agents = {name: Tail(self.run.agent(name).metrics) for name in config.agents}
        self.workers: dict[str, Tail] = {}
        self.stage = ""
        self._read()
        merged = self._merged()
        self.shown = set(merged)
        steps = [(stage, step + 1) for stage, step, trained in merged if trained]
        self._begin(*(steps[-1] if steps else (0, 0)))

    def look(self, states: Mapping[str, str]) -> None:
        """Show what is new. states: the state of each process, in words."""
        if self._read():
            merged = self._merged()
            self.shown &= merged.keys()  # a step that was rewound is shown again when it is repeated
            for place, row in merged.items():
                if place not in self.shown:
                    self._show(place, row)
        self.display.now(self._now(), self._notes(states))

    def close(self) -> None:
        """Close the files that are followed."""
        for tail in (*self.agents.values(), *self.workers.values()):
            tail.close()

    def _show(self, place: Place, row: Row) -> None:
        self.shown.add(place)
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

    def _read(self) -> bool:
        for path in self.run.worker_metrics():
            self.workers.setdefault(path.parent.name, Tail(path))
        return any([tail.read() for tail in (*self.agents.values(), *self.workers.values())])

    def _merged(self) -> dict[Place, Row]:
        agents = {name: tail.rows for name, tail in self.agents.items()}
        rows = merge(agents, [tail.rows for tail in self.workers.values()])
        return {place_of(row): row for row in rows}

    def _now(self) -> Row:
        """Return each agent's newest metrics, of any step, and the number of steps it has taken."""
        row: Row = {}
        for name, tail in self.agents.items():
            if last := newest(tail.rows, self.stage):
                row |= prefixed(name, last) | {f"{name}/step": last["step"] + 1}
        return row

    def _notes(self, states: Mapping[str, str]) -> list[str]:
        rates = [rate(name, newest(tail.rows, self.stage)) for name, tail in self.workers.items()]
        free = shutil.disk_usage(self.run.path).free
        full = [f"the disk is full: {free} bytes free in {self.run.path}"] if free < SCARCE else []
        return (
            full
            + [note for note in rates if note]
            + [f"{name} {state}" for name, state in states.items() if state != "running"]
        )


def rate(worker: str, row: Row) -> str:
    """Return a worker's speed by its newest row, in words; "" if the row has none."""
    if row.get("perf/rollouts_per_second") is None:
        return ""
    waited = f", waited {row['time/waiting']:.1f} s" if row.get("time/waiting") is not None else ""
    return f"{worker} {row['perf/rollouts_per_second']:.1f} rollouts/s{waited}"
