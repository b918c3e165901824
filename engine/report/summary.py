"""Report on a run, finished or not: a figure, a summary in plain words, and whole episodes to read.

A training may be writing to the run directory meanwhile: a report takes no lock, and reads a copy of the store.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from mgrpo.engine.config.schema import Config, read_dump
from mgrpo.engine.report.curves import draw_curves
from mgrpo.engine.report.metrics import flat, read_rows, without_gradient
from mgrpo.engine.report.transcript import Transcripts
from mgrpo.engine.run.directory import RunPaths
from mgrpo.engine.run.metrics import Row, is_evaluation
from mgrpo.engine.run.scores import best_of, ceased, keeps_best, why_ended
from mgrpo.engine.system.statistics import difference

EDGE = 10  # steps, at most, over which the first and the last values of a run are averaged


def read_config(run: Path) -> Config:
    """Read the configuration of a run directory. Raises ValueError if it is not a run directory."""
    file = RunPaths(run).config
    if not file.is_file():
        raise ValueError(f"RUN: {run} given: expected a run directory, with the config.json that `mgrpo train` wrote")
    try:
        return read_dump(file.read_text())
    except ValueError as error:
        raise ValueError(f"RUN: {file} is not the configuration of a run: {error}") from error


def draw(run: Path) -> Path:
    """Draw curves.png of a run directory and return its path. Raises ValueError if it is no run directory."""
    config, path = read_config(run), RunPaths(run).curves
    draw_curves(path, config, _rows(run, config, "rl"))
    return path


def show_episodes(run: Path, console: Console, count: int = 2, query: int | None = None) -> None:
    """Print `count` whole episodes of one query side by side, from the best reward to the worst.

    query: by default the first of the latest rl step whose rewards differ. Raises ValueError if `run` is no run
    directory, if the query was not sampled, and for count < 1.
    """
    config = read_config(run)
    steps = _training(_rows(run, config, "rl"))
    if count < 1:
        raise ValueError(f"episodes: {count} given, expected at least 1")
    if query is None and not steps:
        return console.print("no rl steps yet: no episodes to show")
    first = steps[-1]["step"] * config.queries_per_step if steps else 0
    queries = range(first, first + config.queries_per_step) if query is None else [query]
    Transcripts(run, config).show(console, count, queries)


def summary(run: Path) -> str:
    """Say in plain lines what ran and with what result. Raises ValueError if `run` is no run directory."""
    config = read_config(run)
    warmup, rl = _rows(run, config, "warmup"), _rows(run, config, "rl")
    steps = _training(rl)
    lines = [
        f"{run}: {len(warmup)} of {config.warmup.steps} warm-up steps, {len(steps)} of {config.steps} rl steps of "
        f"{config.queries_per_step} queries x {config.algorithm.rollouts} rollouts",
        *_held_out([row for row in rl if is_evaluation(row)]),
        *_best(config, rl, len(steps)),
    ]
    if not steps:
        return "\n".join([*lines, "no rl steps yet"])
    notes = [note] if (note := flat(without_gradient(steps))) else []
    return "\n".join([*lines, "", *_agents(config, steps), *notes, "", *_rollouts_and_time(config, steps)])


def _held_out(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return ["held-out accuracy: not evaluated yet"]
    lines = [_accuracy_line(row) for row in (rows if len(rows) == 1 else (rows[0], rows[-1]))]
    return lines if len(rows) == 1 else [*lines, f"held-out accuracy: {compare(rows[0], rows[-1])}"]


def _best(config: Config, rows: Sequence[Row], done: int) -> list[str]:
    """Say which evaluation was the best one, whose checkpoint is kept, and whether the run has ended early."""
    results = {row["step"]: row for row in rows if is_evaluation(row)}
    lines = []
    if keeps_best(config) and (best := best_of(results, config.eval)):
        lines.append(f"best held-out score: {percent(best[1])} after {best[0]} rl steps, kept as rl-{best[0]:05d}")
    if done < config.steps and ceased(results, config):
        lines.append(f"the run {why_ended(config, done)}")
    return lines


def _accuracy_line(row: Row) -> str:
    low, high = ("-" if row.get(key) is None else percent(row[key]) for key in ("eval/low", "eval/high"))
    failed = f", {row['eval/failed']} failed and count as wrong" if row.get("eval/failed") else ""
    return (
        f"held-out accuracy after {row['step']} rl steps: {percent(row['eval/held_out_accuracy'])} "
        f"(95 % interval {low} to {high}, {row['eval/questions']} questions{failed})"
    )


def compare(before: Row, after: Row) -> str:
    """Say how the accuracy changed between two evaluation rows, and whether that is more than noise.

    The interval is that of two independent samples. It is a wide one, because both evaluations ask the same questions.
    """
    shares = [row["eval/held_out_accuracy"] for row in (before, after)]
    counts = [row["eval/questions"] for row in (before, after)]
    low, high = difference(shares[0] * counts[0], counts[0], shares[1] * counts[1], counts[1])
    points = f"{100 * (shares[1] - shares[0]):+.1f} points"
    if math.isnan(low):
        return f"from {shares[0]:.3f} to {shares[1]:.3f}: scores outside of 0 to 1 have no interval"
    interval = f"{points}, 95 % interval {100 * low:+.1f} to {100 * high:+.1f}"
    moved = f"from {percent(shares[0])} to {percent(shares[1])} ({interval})"
    if low <= 0 <= high:
        return f"no change beyond noise: {moved}"
    return f"{'rose' if low > 0 else 'fell'} {moved}"


def _agents(config: Config, rows: Sequence[Row]) -> list[str]:
    """Return a table of each agent's metrics in the first and in the last steps."""
    edge = max(1, min(EDGE, len(rows) // 2))
    columns = [("reward", "reward_mean", ".3f"), ("calls", "calls_mean", ".2f"), ("entropy", "entropy_mean", ".2f")]
    heads = [heading for heading, _, _ in columns]
    table = [["agent", *heads, "zero-std groups", "tokens/s", ""]]
    for name, agent in config.agents.items():
        moved = [_moved(rows, f"{name}/{metric}", how, edge) for _, metric, how in columns]
        rest = [_mean(rows, f"{name}/zero_std", ".0%"), _mean(rows, f"{name}/perf/tokens_per_second", ",.0f")]
        table.append([name, *moved, *rest, "" if agent.train else "frozen"])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
    return [f"mean of the first and of the last {edge} rl steps:", *lines]


def _moved(rows: Sequence[Row], key: str, how: str, edge: int) -> str:
    first, last = _mean(rows[:edge], key, how), _mean(rows[-edge:], key, how)
    return "-" if first == last == "-" else f"{first} -> {last}"


def _rollouts_and_time(config: Config, rows: Sequence[Row]) -> list[str]:
    counts = (f"{sum(_values(rows, f'rollouts/{s}')):.0f} {s}" for s in ("scored", "unscored", "failed"))
    whole = _seconds(rows, "time/step")
    times = _in_turn(config, rows, whole) if config.colocated else _side_by_side(config, rows)
    return [f"rollouts: {', '.join(counts)}", f"time: {whole:.1f} s per rl step on average: {times}"]


def _in_turn(config: Config, rows: Sequence[Row], whole: float) -> str:
    parts = {"rollouts": "time/rollout"} | {f"training {name}": f"{name}/time/train" for name in config.agents}
    seconds = {name: _seconds(rows, key) for name, key in parts.items()}
    seconds["the rest"] = max(0.0, whole - sum(seconds.values()))
    return ", ".join(f"{value:.1f} s {name}" for name, value in seconds.items())


def _side_by_side(config: Config, rows: Sequence[Row]) -> str:
    """Give the seconds in which each process works, and those in which it waits for the others."""
    parts = {name: ("training", f"{name}/time/train", f"{name}/time/waiting") for name in config.agents}
    parts["workers"] = ("sampling", "time/rollout", "workers/time/waiting")
    return "; ".join(
        f"{name} {_seconds(rows, busy):.1f} s {doing}, {_seconds(rows, waiting):.1f} s waiting"
        for name, (doing, busy, waiting) in parts.items()
    )


def _seconds(rows: Sequence[Row], key: str) -> float:
    """Return the average per step."""
    return sum(_values(rows, key)) / len(rows)


def _rows(run: Path, config: Config, stage: str) -> list[Row]:
    return [row for row in read_rows(run, config) if row["stage"] == stage]


def _training(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of steps, without those of evaluations."""
    return [row for row in rows if not is_evaluation(row)]


def _values(rows: Sequence[Row], key: str) -> list[float]:
    return [row[key] for row in rows if row.get(key) is not None]


def _mean(rows: Sequence[Row], key: str, how: str) -> str:
    values = _values(rows, key)
    return format(float(np.mean(values)), how) if values else "-"


def percent(share: float) -> str:
    """Write a share as 12.3 %."""
    return f"{100 * share:.1f} %"
