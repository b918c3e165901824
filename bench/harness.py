"""What the benchmarks share: interleaved timing, peak memory, and one report, a table that ends in one JSON line.

Departs from the usual loop over candidates: the candidates of a comparison run in turns, round after round, so that
whatever else the machine does in the meantime falls on all of them, and a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Candidate = Callable[[], object]
CPU = torch.device("cpu")
# Of tables that go to a file or a pipe, where rich would take 80 columns.
PIPE_WIDTH = 160
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Result:
    """One figure. `value` None: not measured here, and `why` says why. `met` None: no target, or not measured."""

    name: str
    value: float | None
    unit: str
    target: str | None = None
    met: bool | None = None
    why: str | None = None


def figure(
    name: str,
    value: float | None,
    unit: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    why: str | None = None,
) -> Result:
    """A result held to its target, if it has one."""
    assert value is not None or why, f"{name}: no value and no reason"
    assert at_least is None or at_most is None, f"{name}: two targets"
    if at_least is not None:
        return Result(name, value, unit, f">= {at_least:g}", None if value is None else value >= at_least, why)
    if at_most is not None:
        return Result(name, value, unit, f"<= {at_most:g}", None if value is None else value <= at_most, why)
    return Result(name, value, unit, why=why)


@dataclass(frozen=True)
class Timing:
    """Seconds of each round of one candidate."""

    rounds: tuple[float, ...]

    @property
    def seconds(self) -> float:
        return median(self.rounds)

    def over(self, other: Timing) -> float:
        """Median over the rounds of this one's time over the other's."""
        return median(mine / theirs for mine, theirs in zip(self.rounds, other.rounds, strict=True))

    def times_faster_than(self, other: Timing) -> float:
        """Median over the rounds of how many times as long the other took."""
        return other.over(self)


def summed(timings: Iterable[Timing]) -> Timing:
    """One after the other: each round's sum."""
    return Timing(tuple(map(sum, zip(*(timing.rounds for timing in timings), strict=True))))


def interleave(
    candidates: Mapping[str, Candidate], *, rounds: int, device: torch.device = CPU, warmup: int = 1
) -> dict[str, Timing]:
    """Times every candidate `rounds` times, in turns whose order moves on by one each round."""
    for _ in range(warmup):
        for run in candidates.values():
            run()
    names = list(candidates)
    measured: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            measured[name].append(_seconds(candidates[name], device))
    return {name: Timing(tuple(seconds)) for name, seconds in measured.items()}


def _seconds(run: Candidate, device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def extra_bytes(run: Candidate, device: torch.device) -> int:
    """Peak memory of one call above what was held before: what torch allocates on a GPU, resident pages on a CPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)  # what is free but still resident would not show in the peak
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def commit() -> str:
    """The commit these sources are at, "+" if they differ from it; outside a checkout what $COMMIT says, or unknown."""
    asked = ("describe", "--always", "--abbrev=7", "--dirty=+", "--exclude=*")
    here = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(["git", "-C", str(here), *asked], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT", "unknown")
    return answer.stdout.strip()


def machine(device: torch.device = CPU) -> str:
    """The machine in words: processor or GPU, its number of cores or memory, and the versions that matter."""
    software = f"Python {platform.python_version()}, torch {torch.__version__}"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {software}"
    cpu = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads, {software}"


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table: the first column and the last to the left, what is between them, numbers, to the right."""
    table = Table()
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place in (0, len(columns) - 1) else "right")
    for row in rows:
        table.add_row(*map(escape, row))  # a bracket is no markup
    print(title)
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)


def report(
    bench: str,
    results: Sequence[Result],
    device: torch.device = CPU,
    *,
    targets_only: bool = False,
) -> None:
    """Prints the table for people, of the targets only if that is asked, then one line of JSON, the last one."""
    marks = {True: "met", False: "missed", None: ""}
    rows = (
        (r.name, "-" if r.value is None else f"{r.value:.4g}", r.unit, r.target or "", r.why or marks[r.met])
        for r in results
        if r.target or not targets_only
    )
    show(f"{bench} at {commit()} on {machine(device)}", ("name", "value", "unit", "target", ""), rows)
    print(json_line(bench, results, device), flush=True)


def json_line(bench: str, results: Sequence[Result], device: torch.device = CPU) -> str:
    """What a benchmark says to programs."""
    line = {"bench": bench, "commit": commit(), "machine": machine(device), "results": [asdict(r) for r in results]}
    return json.dumps(line)
