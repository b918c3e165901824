"""Time and report what benchmarks measure: interleaved timing, peak memory, and a table that ends in one JSON line.

Unlike in the usual loop over candidates, the candidates of a comparison run in turns, round after round. Other work on
the machine then affects all of them alike, and a ratio is the median of the rounds' ratios.
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
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch

Candidate = Callable[[], object]
CPU = torch.device("cpu")
PIPE_WIDTH = 160  # columns of a table written to a file or a pipe, for which rich would take 80


@dataclass(frozen=True)
class Result:
    """Hold one figure. `value` None: not measured, for the reason `why`. `met` None: no target, or not measured."""

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
    """Return a result; if it has a target, the result says whether it is met."""
    assert value is not None or why, f"{name}: no value and no reason"
    assert at_least is None or at_most is None, f"{name}: two targets"
    if at_least is not None:
        return Result(name, value, unit, f">= {at_least:g}", None if value is None else value >= at_least, why)
    if at_most is not None:
        return Result(name, value, unit, f"<= {at_most:g}", None if value is None else value <= at_most, why)
    return Result(name, value, unit, why=why)


@dataclass(frozen=True)
class Timing:
    """Hold the seconds of each round of one candidate."""

    rounds: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """The median of the rounds."""
        return median(self.rounds)

    def over(self, other: Timing) -> float:
        """Return this candidate's time divided by the other's: the median over the rounds."""
        return median(mine / theirs for mine, theirs in zip(self.rounds, other.rounds, strict=True))

    def times_faster_than(self, other: Timing) -> float:
        """Return the other's time divided by this candidate's: the median over the rounds."""
        return other.over(self)


def summed(timings: Iterable[Timing]) -> Timing:
    """Return the timing of running all of these one after the other: each round's sum."""
    return Timing(tuple(map(sum, zip(*(timing.rounds for timing in timings), strict=True))))


def interleave(
    candidates: Mapping[str, Candidate], *, rounds: int, device: torch.device = CPU, warmup: int = 1
) -> dict[str, Timing]:
    """Time every candidate `rounds` times, in turns; each round begins with the next candidate."""
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
    """Return the peak memory of one call above what was held before: torch's on a GPU, resident pages on a CPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)  # memory that is free but still resident would not show in the peak
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def commit() -> str:
    """Return the commit of these sources, with "+" if they differ from it; outside a checkout $COMMIT, or "unknown"."""
    describe = ("describe", "--always", "--abbrev=7", "--dirty=+", "--exclude=*")
    here = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(["git", "-C", str(here), *describe], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT", "unknown")
    return answer.stdout.strip()


def machine(device: torch.device = CPU) -> str:
    """Describe the machine: processor or GPU, its number of cores or memory, and the versions that matter."""
    software = f"Python {platform.python_version()}, torch {torch.__version__}"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {software}"
    cpu = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads, {software}"


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; the first and last columns are aligned left, those between them, numbers, right."""
    print(title)
    if find_spec("rich") is None:  # on a machine with torch and triton alone
        print(*("  ".join(row) for row in (columns, *rows)), sep="\n")
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place in (0, len(columns) - 1) else "right")
    for row in rows:
        table.add_row(*map(escape, row))  # brackets are text here, not markup
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)


def report(
    bench: str,
    results: Sequence[Result],
    device: torch.device = CPU,
    *,
    targets_only: bool = False,
) -> None:
    """Print a table for people (targets_only: only results with a target) and as the last line one line of JSON."""
    marks = {True: "met", False: "missed", None: ""}
    rows = (
        (r.name, "-" if r.value is None else f"{r.value:.4g}", r.unit, r.target or "", r.why or marks[r.met])
        for r in results
        if r.target or not targets_only
    )
    show(f"{bench} at {commit()} on {machine(device)}", ("name", "value", "unit", "target", ""), rows)
    print(json_line(bench, results, device), flush=True)


def keep(file: Path | None, bench: str, results: Sequence[Result], device: torch.device = CPU) -> None:
    """Write the line of JSON to a file, if there is one, so that a time-out loses nothing that was measured."""
    if file is not None:
        file.write_text(json_line(bench, results, device) + "\n")


def json_line(bench: str, results: Sequence[Result], device: torch.device = CPU) -> str:
    """Return the line of JSON that a benchmark prints for programs."""
    line = {"bench": bench, "commit": commit(), "machine": machine(device), "results": [asdict(r) for r in results]}
    return json.dumps(line)
