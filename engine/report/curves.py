"""Draw the figure of a run: reward, held-out accuracy, calls and entropy over the rl steps.

A row of step s was sampled by weights that had taken s rl steps, and an evaluation at s measures the same weights, so
that both are drawn at s.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter

from mgrpo.engine.config.schema import Config
from mgrpo.engine.run.metrics import Row
from mgrpo.engine.system.files import replacing

Curve = tuple[np.ndarray, np.ndarray]  # steps and values

COLORS = ["#1f5fa8", "#d1622b", "#2f8f5b", "#8a4fa3", "#a3862c", "#4aa3b5", "#b5486b", "#666666"]  # by agent
WINDOW = 10  # steps of the running mean


def draw_curves(path: Path, config: Config, rows: Sequence[Row]) -> None:
    """Draw the four panels into a PNG at `path`, replacing the file as a whole. rows: those of the rl stage."""
    figure = Figure(figsize=(11, 7), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    axes = figure.subplots(2, 2, sharex=True).flat
    agents = list(config.agents)
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(agents)}
    done = max((row["step"] + 1 for row in rows if "time/step" in row), default=0)
    figure.suptitle(f"{path.parent.name}: {done} of {config.steps} rl steps", fontsize=13)
    _panel(axes[0], "reward", "mean of the step's rollouts", agents, rows, "reward_mean", colors)
    _accuracy(axes[1], rows)
    _panel(axes[2], "sub-agent calls", "calls per rollout", config.subs, rows, "calls_mean", colors)
    _panel(axes[3], "entropy", "nats per token", agents, rows, "entropy_mean", colors)
    reach = max((row["step"] for row in rows), default=0) or 1
    axes[0].set_xlim(-0.06 * reach, 1.06 * reach)  # shared by all
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    figure.supxlabel(f"rl steps done        thin: each step, thick: mean of the last {WINDOW}", fontsize=10)
    _save(path, figure)


def curve(rows: Sequence[Row], key: str) -> Curve:
    """Return steps and values of the rows that have a value of the key."""
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return np.array([step for step, _ in points]), np.array([value for _, value in points], np.float64)


def running_mean(values: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """Return the mean of each value and the window - 1 values before it, or of fewer at the beginning."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _panel(
    ax: Axes, title: str, unit: str, agents: Sequence[str], rows: Sequence[Row], metric: str, colors: dict[str, str]
) -> None:
    """Draw a thin line of each agent's values and a thick one of their running mean."""
    curves = {name: curve(rows, f"{name}/{metric}") for name in agents}
    for name, (steps, values) in curves.items():
        marker = "." if len(steps) < WINDOW else ""  # a line of one point would be invisible
        ax.plot(steps, values, color=colors[name], alpha=0.35, linewidth=1, marker=marker)
        ax.plot(steps, running_mean(values), color=colors[name], linewidth=2, label=name)
    _decorate(ax, title, unit)
    if any(len(steps) for steps, _ in curves.values()):
        ax.legend(fontsize=9, frameon=False)
    else:
        _say(ax, "no rl steps yet" if agents else "no sub-agents")


def _accuracy(ax: Axes, rows: Sequence[Row]) -> None:
    """Draw the held-out accuracy, with 95 % intervals if there are any."""
    _decorate(ax, "held-out accuracy", "right answers, 95 % intervals")
    steps, values = curve(rows, "eval/held_out_accuracy")
    if not len(steps):
        return _say(ax, "not evaluated yet")
    ax.plot(steps, values, color=COLORS[0], linewidth=2, marker="o", markersize=5)
    bounds = [_bounds(row) for row in rows if row.get("eval/held_out_accuracy") is not None]
    low, high = np.array(bounds).T
    ax.errorbar(steps, (low + high) / 2, yerr=(high - low) / 2, fmt="none", ecolor=COLORS[0], alpha=0.6, capsize=4)
    for i in {0, len(steps) - 1}:
        text = ax.annotate(f"{values[i]:.1%}", (steps[i], high[i]), (0, 5), textcoords="offset points")
        text.set(ha="center", fontsize=10, fontweight="bold")
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.margins(y=0.12)


def _bounds(row: Row) -> tuple[float, float]:
    """Return an evaluation's interval, or an empty one if it has none."""
    value = row["eval/held_out_accuracy"]
    low, high = row.get("eval/low"), row.get("eval/high")
    return (value, value) if low is None or high is None else (low, high)


def _decorate(ax: Axes, title: str, unit: str) -> None:
    ax.set_title(title, fontsize=11, loc="left", fontweight="bold")
    ax.set_ylabel(unit, fontsize=9)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def _say(ax: Axes, text: str) -> None:
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color="0.5")
    ax.set_yticks([])


def _save(path: Path, figure: Figure) -> None:
    """Replace the file as a whole: a viewer finds the old figure or the new one, even if several processes draw it."""
    with replacing(path, writer=f"{os.getpid()}-", durable=False) as aside:
        figure.savefig(aside)  # without pyplot the canvas is Agg's
