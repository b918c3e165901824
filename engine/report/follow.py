"""A decoupled run, watched from its metrics files: what its display is told, and when."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mgrpo.engine.config.schema import Config
from mgrpo.engine.report.display import Display
from mgrpo.engine.report.metrics import Place, Row, Tail, merge, newest, place_of, prefixed, worker_files
from mgrpo.engine.run.tensorboard import STAGES

SCARCE = 1 << 20  # bytes; with less room the processes wait for more, and may not even be able to log that


class Watch:
    """Follows a run directory. Of what was there before only the place is shown where the run goes on."""

    def __init__(self, config: Config, display: Display) -> None:
        self.run, self.display = Path(config.run_dir), display
        self.steps = {"warmup": config.warmup.steps, "rl": config.steps}
        self.agents = {name: Tail(self.run / "agents" / name / "metrics.jsonl") for name in config.agents}
        self.workers: dict[str, Tail] = {}
        self.stage = ""
        self._read()
        merged = self._merged()
        self.told = set(merged)
        steps = [(stage, step + 1) for stage, step, trained in merged if trained]
        self._begin(*(steps[-1] if steps else (0, 0)))

    def look(self, states: Mapping[str, str]) -> None:
        """Tells the display what is new. states: of each process, in words."""
        if self._read():
            merged = self._merged()
            self.told &= merged.keys()  # what was taken back will be told when it comes again
            for place, row in merged.items():
                if place not in self.told:
                    self._tell(place, row)
        self.display.now(self._now(), self._notes(states))

    def _tell(self, place: Place, row: Row) -> None:
        self.told.add(place)
        if row["stage"] != self.stage:
            self._begin(place[0], place[1])
        self.display.row(row)
        if place[2]:
            self._begin_next(place[0], place[1] + 1)

    def _begin(self, stage: int, step: int) -> None:
        """The display is told where the run stands; a stage of which nothing is left is over."""
        self.stage = STAGES[stage]
        self.display.stage(self.stage, step, self.steps[self.stage])
        self._begin_next(stage, step)

    def _begin_next(self, stage: int, step: int) -> None:
        if step >= self.steps[STAGES[stage]] and stage + 1 < len(STAGES):
            self._begin(stage + 1, 0)

    def _read(self) -> bool:
        for path in worker_files(self.run):
            self.workers.setdefault(path.parent.name, Tail(path))
        return any([tail.read() for tail in (*self.agents.values(), *self.workers.values())])

    def _merged(self) -> dict[Place, Row]:
        agents = {name: tail.rows for name, tail in self.agents.items()}
        rows = merge(agents, [tail.rows for tail in self.workers.values()])
        return {place_of(row): row for row in rows}

    def _now(self) -> Row:
        """Each agent's newest metrics, of whatever step, and the number of steps it has taken."""
        row: Row = {}
        for name, tail in self.agents.items():
            if last := newest(tail.rows, self.stage):
                row |= prefixed(name, last) | {f"{name}/step": last["step"] + 1}
        return row

    def _notes(self, states: Mapping[str, str]) -> list[str]:
        rates = [rate(name, newest(tail.rows, self.stage)) for name, tail in self.workers.items()]
        free = shutil.disk_usage(self.run).free
        full = [f"the disk is full: {free} bytes free in {self.run}"] if free < SCARCE else []
        return full + [note for note in rates if note] + [f"{name} {s}" for name, s in states.items() if s != "running"]


def rate(worker: str, row: Mapping[str, Any]) -> str:
    """What a worker's newest row says of its pace, "" if nothing."""
    if row.get("perf/rollouts_per_second") is None:
        return ""
    waited = f", waited {row['time/waiting']:.1f} s" if row.get("time/waiting") is not None else ""
    return f"{worker} {row['perf/rollouts_per_second']:.1f} rollouts/s{waited}"
