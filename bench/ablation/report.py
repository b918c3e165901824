"""Report the runs of the ablation as a table, a figure and JSON, from their folders alone.

A seed is one sample: intervals are 95 % of Student's t over seeds, and say nothing about other questions or models. An
arm's difference from co-training is taken seed by seed, as all arms of a seed begin with the same weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from mgrpo.bench.harness import commit, machine, show
from mgrpo.engine.config.schema import Config
from mgrpo.engine.report.curves import COLORS, curve, running_mean
from mgrpo.engine.report.summary import read_config
from mgrpo.engine.run.metrics import Row, is_evaluation, read_metrics

RESULTS = Path(__file__).parents[1] / "results"
REFERENCE = "co-train"
EDGE = 10  # steps over which the "last" figures are averaged
WATCHED = ("reward_mean", "calls_mean", "entropy_mean", "zero_std")  # these may explain a difference
# Student's t at 0.975 for 1 to 30 degrees of freedom; beyond that, the normal's with two Cornish-Fisher terms
T = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.306, 2.2622, 2.2281),
    *(2.201, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.093, 2.086),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)
Z = 1.95996


@dataclass(frozen=True)
class Ended:
    """Hold one run that ended. rows: the metrics of its rl stage."""

    config: Config
    rows: Sequence[Row]
    commits: Sequence[str]

    @property
    def accuracies(self) -> list[float]:
        """Accuracy on held-out questions: at the start of the rl stage, at each evaluation, and at the end."""
        return [row["eval/held_out_accuracy"] for row in self.rows if is_evaluation(row)]

    def last(self, key: str) -> float | None:
        """Return the mean of the last values of a metric; None if there are none."""
        values = [row[key] for row in self.rows if row.get(key) is not None][-EDGE:]
        return mean(values) if values else None


Arms = Mapping[str, Mapping[int, Ended]]  # by arm, then by seed


def final(folder: Path) -> Ended | None:
    """Return the run in a folder, or None unless it was evaluated after its last step."""
    if not (folder / "config.json").exists():
        return None
    config = read_config(folder)
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["stage"] == "rl"]
    if not any(row["step"] == config.steps and is_evaluation(row) for row in rows):
        return None
    commits = folder / "commits"
    return Ended(config, rows, sorted(set(commits.read_text().split())) if commits.exists() else [])


def collect(runs: Path) -> dict[str, dict[str, dict[int, Ended]]]:
    """Return the runs by model, arm and seed, from folders <model>/<arm>-<seed>."""
    found: dict[str, dict[str, dict[int, Ended]]] = {}
    for folder in sorted(runs.glob("*/*-*")):
        arm, _, seed = folder.name.rpartition("-")
        if (ended := final(folder)) is not None:
            found.setdefault(folder.parent.name, {}).setdefault(arm, {})[int(seed)] = ended
    return found


# ---- statistics


def t_quantile(freedom: int) -> float:
    """Return the 0.975 quantile of Student's t."""
    if freedom <= len(T):
        return T[freedom - 1]
    return Z + (Z**3 + Z) / (4 * freedom) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * freedom**2)


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Return the mean over the seeds with its 95 % t-interval, which is None for a single seed."""
    middle = mean(values)
    if len(values) < 2:
        return {"mean": middle, "low": None, "high": None}
    half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return {"mean": middle, "low": middle - half, "high": middle + half}


def band(curves_SN: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean, low, high (N,) over S seeds for each of N steps; for a single seed all three are equal."""
    middle_N = curves_SN.mean(0)
    if len(curves_SN) < 2:
        return middle_N, middle_N, middle_N
    half_N = t_quantile(len(curves_SN) - 1) * curves_SN.std(0, ddof=1) / math.sqrt(len(curves_SN))
    return middle_N, middle_N - half_N, middle_N + half_N


def summary(arms: Arms) -> dict[str, Any]:
    """Summarise each arm: its seeds, accuracy at start and end, and its difference from co-training, seed by seed."""
    return {arm: _summary(runs, arms.get(REFERENCE, {})) for arm, runs in arms.items()}


def _summary(runs: Mapping[int, Ended], reference: Mapping[int, Ended]) -> dict[str, Any]:
    both = sorted(runs.keys() & reference.keys())
    less = [runs[seed].accuracies[-1] - reference[seed].accuracies[-1] for seed in both]
    agents = next(iter(runs.values())).config.agents
    watched = [f"{agent}/{key}" for agent in agents for key in WATCHED]
    lasts = {key: [last for run in runs.values() if (last := run.last(key)) is not None] for key in watched}
    return {
        "seeds": list(runs),
        "commits": sorted({name for run in runs.values() for name in run.commits}),
        "steps": next(iter(runs.values())).config.steps,
        "accuracies": {seed: run.accuracies for seed, run in runs.items()},
        "start": interval([run.accuracies[0] for run in runs.values()]),
        "end": interval([run.accuracies[-1] for run in runs.values()]),
        "less co-train": interval(less) | {"seeds": both} if both else None,
        "last steps": {key: mean(values) for key, values in lasts.items() if values},
    }


# ---- what is shown


def report(runs: Path, results: Path = RESULTS) -> None:
    """Print a table, and write ablation.json and ablation.png into results."""
    found = collect(runs)
    if not found:
        return print("no run has ended yet")
    summaries = {model: summary(arms) for model, arms in found.items()}
    for model, arms in summaries.items():
        heads = ("arm", "seeds", "start of rl", "end of rl", "less co-train, points", "")
        show(
            f"{model}: held-out accuracy, mean and 95 % interval over seeds",
            heads,
            [_row(*one) for one in arms.items()],
        )
    line = {"bench": "ablation", "commit": commit(), "machine": machine(), "models": summaries}
    results.mkdir(parents=True, exist_ok=True)
    _write(results / "ablation.json", json.dumps(line, indent=1) + "\n")
    draw(found, results / "ablation.png")
    print(f"written to {results}")


def _row(arm: str, summary: Mapping[str, Any]) -> tuple[str, ...]:
    less = "" if arm == REFERENCE or summary["less co-train"] is None else _points(summary["less co-train"])
    return arm, str(len(summary["seeds"])), _points(summary["start"]), _points(summary["end"]), less, ""


def _points(of: Mapping[str, float | None]) -> str:
    """Format a mean and its interval in percentage points."""
    middle, low, high = (None if of[key] is None else 100 * float(of[key] or 0) for key in ("mean", "low", "high"))
    return f"{middle:.1f}" + ("" if low is None else f" ({low:.1f} to {high:.1f})")


def draw(found: Mapping[str, Arms], to: Path) -> None:
    """Draw a line of panels per model: accuracy over the steps and at the end, rewards of main and sub-agent."""
    from matplotlib.figure import Figure

    page = Figure(figsize=(17, 4.4 * len(found)), dpi=120, layout="constrained")
    names = sorted({arm for arms in found.values() for arm in arms})
    colors = {arm: COLORS[i % len(COLORS)] for i, arm in enumerate(names)}
    for line, (model, arms) in zip(page.subplots(len(found), 4, squeeze=False), found.items(), strict=True):
        _bands(line[0], arms, colors, "eval/held_out_accuracy", window=1)
        _ends(line[1], arms, colors)
        _bands(line[2], arms, colors, "main/reward_mean", window=EDGE)
        asked = {arm: runs for arm, runs in arms.items() if any(run.last("sub/calls_mean") for run in runs.values())}
        _bands(line[3], asked, colors, "sub/reward_mean", window=EDGE)
        line[0].set(title=f"{model}: held-out accuracy", xlabel="rl steps")
        line[1].set(title="at the end: each seed, mean, 95 %")
        line[2].set(title=f"main's reward, mean of {EDGE} steps", xlabel="rl steps")
        line[3].set(title="sub-agent's reward", xlabel="rl steps")
        line[0].legend(fontsize=8, frameon=False)
        for ax in line:  # an interval of few seeds may reach beyond [0, 1]
            low, high = ax.get_ylim()
            ax.set_ylim(max(low, 0), min(high, 1))
    aside = to.with_name(f".{to.name}")
    page.savefig(aside, format="png")
    aside.replace(to)


def _bands(ax: Any, arms: Arms, colors: Mapping[str, str], key: str, window: int) -> None:
    for arm, runs in arms.items():
        curves = [curve(run.rows, key) for run in runs.values()]
        steps = curves[0][0]
        if not len(steps) or any(len(other) != len(steps) for other, _ in curves):
            continue  # runs of several lengths have no mean
        middle_N, low_N, high_N = band(np.stack([running_mean(values, window) for _, values in curves]))
        ax.plot(steps, middle_N, color=colors[arm], label=arm)
        ax.fill_between(steps, low_N, high_N, color=colors[arm], alpha=0.15, linewidth=0)
    ax.grid(alpha=0.25)


def _ends(ax: Any, arms: Arms, colors: Mapping[str, str]) -> None:
    for place, (arm, runs) in enumerate(arms.items()):
        ends = [run.accuracies[-1] for run in runs.values()]
        ax.plot([place] * len(ends), ends, ".", color=colors[arm], alpha=0.5)
        if (high := interval(ends)["high"]) is not None:
            ax.errorbar(place + 0.15, mean(ends), yerr=high - mean(ends), fmt="o", color=colors[arm], capsize=4)
    ax.set_xticks(range(len(arms)), list(arms), rotation=20, fontsize=8)
    ax.grid(alpha=0.25)


def _write(path: Path, text: str) -> None:
    """Replace a file atomically: readers see the old or the new one, also if several processes write it."""
    aside = path.with_name(f".{path.name}")
    aside.write_text(text)
    aside.replace(path)
