"""Show the progress of a run: as a live table on a terminal, else as one plain line per row of metrics.

Both displays get each stage when it begins, and then every row of metrics.jsonl (keys as training/trainer.py names
them). A metric that a row does not have, such as a frozen agent's gradient norm, is shown as "-". If agents are
separate processes, a row comes when the slowest has taken the step; between rows the table shows each agent's newest
step.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mgrpo.engine.report.metrics import flat, without_gradient
from mgrpo.engine.run.metrics import Row, is_evaluation

Column = tuple[str, str, str]  # heading, an agent's metric, format

OPTIMISER: tuple[Column, ...] = (
    ("entropy", "entropy_mean", ".2f"),
    ("grad", "grad_norm", ".3g"),
    ("lr", "lr", ".1e"),
    ("tok/s", "perf/tokens_per_second", ",.0f"),
)
COLUMNS: dict[str, tuple[Column, ...]] = {
    "warmup": (("logprob", "logprob_mean", ".3f"), *OPTIMISER),
    "rl": (
        ("reward", "reward_mean", ".3f"),
        ("format", "format", ".2f"),
        ("correct", "correct", ".3f"),
        ("expert", "expert", ".3f"),
        ("calls", "calls_mean", ".2f"),
        ("length", "length_mean", ".0f"),
        *OPTIMISER,
    ),
}
OWN_PACE: tuple[Column, Column] = (("step", "step", ".0f"), ("wait", "time/waiting", ".1f"))  # for decoupled agents
BRIEF = ("logprob", "reward", "correct", "expert", "calls", "entropy")  # headings on a plain line
PARTS = 10.0  # seconds between two lines that say how far something is
RECENT = 10  # steps whose median time is used to estimate the remaining time


class Display(Protocol):
    """Show the progress of a run."""

    def stage(self, name: str, first: int, steps: int) -> None:
        """Begin a stage of `steps` steps; `first` is the next step."""

    def row(self, row: Row) -> None:
        """Show one row of metrics.jsonl."""

    def now(self, row: Row, notes: Sequence[str]) -> None:
        """Show each agent's newest metrics and notes on processes, if they can be replaced by the next ones."""

    def say(self, text: str) -> None:
        """Show a line of text."""

    def doing(self, text: str, part: float | None = None) -> None:
        """Show what takes time now, until the next call or row, and which part of it is done, from 0 to 1."""

    def close(self) -> None:
        """Leave the terminal as it was."""


def make_display(agents: list[str], console: Console | None = None, *, decoupled: bool = False) -> Display:
    """Return a live table if the console (by default standard output) is a terminal, else plain lines."""
    console = console or Console()
    return _Table(agents, console, decoupled) if console.is_terminal else _Lines(agents, console)


class Progress:
    """Keep track of a run's progress by its stages and rows."""

    def __init__(self) -> None:
        self.stage("", 0, 0)
        self.accuracy = ""

    def stage(self, name: str, first: int, steps: int) -> None:
        """Begin a stage."""
        self.name, self.done, self.steps = name, first, steps
        self.began = time.monotonic()
        self.latest: Row = {}
        self.eta = ""
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._flat = 0  # steps without any gradient, in a row

    def row(self, row: Row) -> None:
        """Take in the next row."""
        if is_evaluation(row):
            self.accuracy = accuracy(row)
            return
        self.latest, self.done = row, row["step"] + 1
        self._flat = self._flat + 1 if without_gradient([row]) else 0
        if "time/step" in row:
            self._recent.append(row["time/step"])
        if self._recent:
            self.eta = clock(statistics.median(self._recent) * (self.steps - self.done))

    @property
    def flat(self) -> str:
        """Whether the last steps gave no gradient, in words; "" if they did."""
        return flat(self._flat)

    @property
    def lost(self) -> str:
        """The latest step's unscored and failed rollouts, in words; "" if there are none."""
        counts = {kind: self.latest.get(f"rollouts/{kind}", 0) for kind in ("unscored", "failed")}
        return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)


class _Lines:
    """Print a short line per row, at once, for logs and pipes."""

    def __init__(self, agents: Sequence[str], console: Console) -> None:
        self.agents, self.console, self.progress = agents, console, Progress()
        self.does, self.shown = "", 0.0  # what was shown last, and when

    def stage(self, name: str, first: int, steps: int) -> None:
        self.progress.stage(name, first, steps)
        if first < steps:
            self.say(f"{name}: steps {first + 1} to {steps}")

    def row(self, row: Row) -> None:
        self.progress.row(row)
        if is_evaluation(row):
            self.say(f"{row['stage']} {row['step']}/{self.progress.steps} | {self.progress.accuracy}")
        else:
            self.say(" | ".join(self._parts(row)))

    def now(self, row: Row, notes: Sequence[str]) -> None:
        """Do nothing: a printed line cannot be replaced, so it is printed once the row is complete."""

    def say(self, text: str) -> None:
        print(text, file=self.console.file, flush=True)

    def doing(self, text: str, part: float | None = None) -> None:
        if text != self.does:
            self.say(text)
        elif part is not None and time.monotonic() > self.shown + PARTS:
            self.say(f"{text}: {part:.0%}")
        else:
            return
        self.does, self.shown = text, time.monotonic()

    def close(self) -> None:
        """Do nothing: every line is printed already."""

    def _parts(self, row: Row) -> list[str]:
        columns = [column for column in COLUMNS[row["stage"]] if column[0] in BRIEF]
        agents = [" ".join([agent, *cells]) for agent in self.agents if (cells := _named(row, agent, columns))]
        times = f"{_cell(row, 'time/step', '.1f')} s, {self.progress.eta or '-'} left"
        lost = [note for note in (self.progress.lost, self.progress.flat) if note]
        return [f"{row['stage']} {self.progress.done}/{self.progress.steps}", *agents, *lost, times]


@dataclass(frozen=True)
class _Activity:
    """Hold what takes time now, which part of it is done, and since when it goes on."""

    text: str
    part: float | None
    began: float

    def line(self) -> RenderableType:
        """Lay out the text, the bar if the part is known, and the time."""
        line = Table.grid(padding=(0, 2))
        bar: list[RenderableType] = []
        if self.part is not None:
            bar = [ProgressBar(1.0, self.part, width=24), f"{self.part:.0%}"]
        line.add_row(Text(self.text), *bar, clock(time.monotonic() - self.began))
        return line


class _Table:
    """Draw a table every second, so that its clock shows that the run is alive."""

    def __init__(self, agents: Sequence[str], console: Console, decoupled: bool) -> None:
        self.agents, self.console, self.progress = agents, console, Progress()
        self.decoupled = decoupled
        self.newest: Row = {}
        self.notes: Sequence[str] = ()
        self.activity: _Activity | None = None
        self.live = Live(console=console, get_renderable=self._render, refresh_per_second=1)

    def stage(self, name: str, first: int, steps: int) -> None:
        self.progress.stage(name, first, steps)
        self.newest, self.activity = {}, None
        self.live.start()
        self.live.refresh()

    def row(self, row: Row) -> None:
        self.activity = None
        self.progress.row(row)
        self.live.refresh()

    def now(self, row: Row, notes: Sequence[str]) -> None:
        self.newest, self.notes = row, notes
        self.live.refresh()

    def say(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)

    def doing(self, text: str, part: float | None = None) -> None:
        before = self.activity
        new = before is None or before.text != text
        self.activity = _Activity(text, part, time.monotonic() if before is None or new else before.began)
        self.live.start()
        if new:  # parts are drawn every second: a download reports them more often than anyone can read
            self.live.refresh()

    def close(self) -> None:
        self.live.stop()

    def _render(self) -> RenderableType:
        """Lay out the table. Its own thread calls this too, so it reads only what `Progress` replaces as a whole."""
        progress, activity = self.progress, self.activity
        doing = [activity.line()] if activity else []
        if not progress.name:
            return Group(*doing)
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(progress.name, style="bold"),
            f"step {progress.done} of {progress.steps}",
            ProgressBar(max(progress.steps, 1), progress.done, width=24),
            f"elapsed {clock(time.monotonic() - progress.began)}",
            f"ETA {progress.eta or '-'}",
        )
        notes = [note for note in (progress.accuracy, progress.lost, progress.flat) if note]
        agents = self._agents(progress.name, self.newest or progress.latest)
        return Group(head, Text("   ".join(notes) or "not evaluated yet"), agents, *map(Text, self.notes), *doing)

    def _agents(self, stage: str, row: Row) -> Table:
        columns = COLUMNS.get(stage, ())
        if self.decoupled:
            columns = (OWN_PACE[0], *(column for column in columns if column[0] != "lr"), OWN_PACE[1])
        table = Table("agent", box=None, padding=(0, 1, 0, 0), header_style="dim")
        for heading, _, _ in columns:
            table.add_column(heading, justify="right")
        for agent in self.agents:
            cells = [_cell(row, f"{agent}/{metric}", how) for _, metric, how in columns]
            table.add_row(Text(agent, style="bold"), *cells)
        return table


def accuracy(row: Row) -> str:
    """Describe an evaluation row in words."""
    interval = f"{_cell(row, 'eval/low', '.1%')} to {_cell(row, 'eval/high', '.1%')}"
    found = f"held-out {_cell(row, 'eval/held_out_accuracy', '.1%')} ({interval}) after {row['step']} steps"
    return found + (f", {row['eval/failed']} of {row['eval/questions']} failed" if row.get("eval/failed") else "")


def clock(seconds: float) -> str:
    """Write a duration as 1:02:03 or 2:03."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def _cell(row: Row, key: str, how: str) -> str:
    value = row.get(key)
    return "-" if value is None else format(value, how)


def _named(row: Row, agent: str, columns: Sequence[Column]) -> list[str]:
    """Return the columns that an agent has, each after its heading."""
    cells = ((heading, _cell(row, f"{agent}/{metric}", how)) for heading, metric, how in columns)
    return [f"{heading} {cell}" for heading, cell in cells if cell != "-"]
