"""Run `mgrpo simulate`: predict how a run would go on a given number of GPUs, before they are there.

For each number of GPUs it looks for the best split between rollout workers and trainers, simulates that split for more
steps, and finds the bottleneck: every resource in turn is made twice as fast, or the stragglers are removed, and the
change that shortens the step most names the bottleneck.

The batch is that of the config for any number of GPUs: this is strong scaling. For a larger batch, use
--set queries_per_step=….
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter

from mgrpo.engine.config.schema import Config, read_dump
from mgrpo.engine.report.curves import COLORS
from mgrpo.engine.run.directory import RunPaths
from mgrpo.engine.simulate.events import Outcome, Simulation
from mgrpo.engine.simulate.fit import measure
from mgrpo.engine.simulate.workload import Workload, read_workload

SHARES = (
    0.125,
    0.25,
    0.375,
    0.5,
    0.625,
    0.75,
    0.875,
)  # of the GPUs that sample: tried first, then shares between the best ones
NOTABLE = 0.01  # share of the step that a bottleneck's absence would save at least


@dataclass(frozen=True)
class Split:
    """Divide the GPUs between workers and trainers.

    workers: their number. trainers: GPUs of each trained agent; a frozen agent's trainer shares those of the others.
    """

    workers: int
    trainers: dict[str, int]


@dataclass(frozen=True)
class Estimate:
    """Describe the best split of a number of GPUs.

    saved: by possible bottleneck, the share of a step's seconds that its absence would save.
    """

    gpus: int
    split: Split
    outcome: Outcome
    saved: dict[str, float]

    @property
    def bottleneck(self) -> str:
        """The resource that holds the run up most, or "none alone"."""
        name = max(self.saved, key=lambda name: self.saved[name])
        return name if self.saved[name] >= NOTABLE else "none alone"

    @property
    def busy(self) -> float:
        """The share of all GPUs' time in which they compute."""
        trainers = self.split.trainers
        used = sum(count * self.outcome.trainers_busy[name] for name, count in trainers.items())
        sampling = self.gpus - sum(trainers.values())
        return (used + sampling * self.outcome.workers_busy) / self.gpus


def simulate(config: Config, source: Path, gpus: str, steps: int, figure: Path) -> str:
    """Simulate `steps` rl steps on each number of `gpus`, draw the figure, and return a table and a line of JSON.

    source: the TOML file of a workload, or the directory of a decoupled run to measure. Raises ValueError for invalid
    input.
    """
    if steps < 1:
        raise ValueError(f"--steps: {steps} given: expected at least 1")
    counts = read_counts(gpus)
    workload = load(config, source)
    plans = [best_plan(config, workload, count, steps) for count in counts]
    draw(figure, plans)
    return f"{table(plans)}\nfigure: {figure}\n{json.dumps([summary(plan) for plan in plans])}"


def load(config: Config, source: Path) -> Workload:
    """Return the workload for `config`, which may ask for another batch or staleness than the measured run."""
    if not source.is_dir():
        return read_workload(source, config)
    if not RunPaths(source).config.is_file():
        raise ValueError(f"--workload: {source} given: expected a TOML file, or the directory of a run")
    measured = msgspec.structs.replace(read_dump(RunPaths(source).config.read_text()), run_dir=str(source))
    if set(measured.agents) != set(config.agents):
        raise ValueError(f"--workload: {source} has agents {sorted(measured.agents)}: expected {sorted(config.agents)}")
    return measure(measured)


def read_counts(text: str) -> list[int]:
    """Read numbers of GPUs: "64..4096" doubles from the first to the last, "8,16,24" lists them."""
    try:
        if ".." in text:
            first, last = (int(part) for part in text.split(".."))
            counts = [first * 2**i for i in range(max(last, 1).bit_length()) if 0 < first * 2**i <= last]
        else:
            counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 2:
        raise ValueError(f"--gpus: {text!r} given: expected numbers of at least 2, as in 64..4096 or 8,16,24")
    return counts


# ---- the best split


def best_plan(config: Config, workload: Workload, gpus: int, steps: int) -> Estimate:
    """Find the best split of the GPUs and simulate `steps` rl steps of it. Raises ValueError for too few GPUs."""
    splits = {split.workers: split for share in SHARES for split in splits_of(config, workload, gpus, share)}
    if not splits:
        trainers = len(config.trained)
        raise ValueError(
            f"--gpus: {gpus} given: expected {workload.worker.gpus + trainers} or more, for a worker and the trainers"
        )
    short = min(steps, config.sampling.max_staleness + 4)
    tried = {workers: run(config, workload, split, short).step_seconds for workers, split in splits.items()}
    for split in _between(config, workload, gpus, tried):
        splits[split.workers] = split
        tried[split.workers] = run(config, workload, split, short).step_seconds
    best = splits[min(tried, key=lambda workers: tried[workers])]
    outcome = run(config, workload, best, steps)
    saved = {
        name: 1 - run(config, changed, best, steps).step_seconds / outcome.step_seconds
        for name, changed in without(config, workload)
    }
    return Estimate(gpus, best, outcome, saved)


def run(config: Config, workload: Workload, split: Split, steps: int) -> Outcome:
    """Simulate one split."""
    gpus = {name: split.trainers.get(name, 1) for name in config.agents}
    return Simulation(config, workload, split.workers, gpus, steps).run()


def splits_of(config: Config, workload: Workload, gpus: int, share: float) -> Iterator[Split]:
    """Yield the split with this share of the GPUs in workers, if every part gets some.

    Trainers get theirs in proportion to their work.
    """
    names, size = config.trained, workload.worker.gpus
    workers = int(gpus * share) // size
    left = gpus - workers * size
    if workers < 1 or left < len(names):
        return
    rows_A = workload.episodes.rows_AN.mean(1)
    needs = [(workload.trainers[name], rows_A[list(config.agents).index(name)]) for name in names]
    work = np.array([rows * trainer.kept / trainer.rate for trainer, rows in needs])
    counts = np.maximum(1, np.floor((left - len(names)) * work / max(work.sum(), 1e-300)).astype(int) + 1)
    counts[int(work.argmax())] += left - counts.sum()
    yield Split(workers, dict(zip(names, counts.tolist(), strict=True)))


def _between(config: Config, workload: Workload, gpus: int, tried: Mapping[int, float]) -> Iterator[Split]:
    """Yield the splits half way between the best one and its neighbours."""
    order = sorted(tried)
    best = order.index(min(tried, key=lambda workers: tried[workers]))
    for other in {max(best - 1, 0), min(best + 1, len(order) - 1)} - {best}:
        share = (order[best] + order[other]) / 2 * workload.worker.gpus / gpus
        yield from splits_of(config, workload, gpus, share)


def without(config: Config, workload: Workload) -> Iterator[tuple[str, Workload]]:
    """Yield, by name, workloads with one thing at a time removed or twice as fast."""
    edit, worker, episodes = msgspec.structs.replace, workload.worker, workload.episodes
    faster = edit(worker, step_seconds=worker.step_seconds / 2, row_seconds=worker.row_seconds / 2)
    yield "sampling", replace(workload, worker=faster)
    yield "pauses", replace(workload, episodes=replace(episodes, pause_N=episodes.pause_N / 2))
    yield "stragglers", replace(workload, episodes=episodes.even())
    published = {n: edit(t, publish=t.publish / 2) for n, t in workload.trainers.items()}
    lighter = edit(worker, load_seconds=worker.load_seconds / 2)
    yield "weights", replace(workload, worker=lighter, trainers=published)
    for name in config.trained:
        trainer = workload.trainers[name]
        twice = edit(trainer, rate=2 * trainer.rate, overhead=trainer.overhead / 2)
        yield f"training {name}", replace(workload, trainers={**workload.trainers, name: twice})


# ---- what is shown


def summary(plan: Estimate) -> dict[str, object]:
    """Return an estimate as a JSON object."""
    split, outcome = asdict(plan.split), asdict(plan.outcome)
    return {
        "gpus": plan.gpus,
        **split,
        **outcome,
        "busy": plan.busy,
        "bottleneck": plan.bottleneck,
        "saved": plan.saved,
    }


def table(plans: list[Estimate]) -> str:
    """Return the estimates as a table in plain text, a line per number of GPUs."""
    names = list(plans[0].split.trainers)
    head = ["GPUs", "workers", *names, "s/step", "rollouts/s", "busy: all", "workers", *names]
    lines = [[*head, "staleness", "expired", "bottleneck"]] + [_line(plan) for plan in plans]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(f"{cell:>{w}}" for cell, w in zip(line, widths, strict=True)) for line in lines)


def _line(plan: Estimate) -> list[str]:
    o, trainers = plan.outcome, plan.split.trainers
    busy = [plan.busy, o.workers_busy, *(o.trainers_busy[name] for name in trainers)]
    saved = max(plan.saved.values())
    return [
        *map(str, (plan.gpus, plan.split.workers, *trainers.values())),
        f"{o.step_seconds:.4g}",
        f"{o.rollouts_per_second:.4g}",
        *(f"{share:.0%}" for share in busy),
        f"{o.staleness_mean:.2f}, at most {o.staleness_worst}",
        f"{o.expired:.1%}",
        f"{plan.bottleneck} ({saved:.0%})",
    ]


def draw(path: Path, plans: list[Estimate]) -> None:
    """Draw utilisation and speed-up against GPUs into a PNG file."""
    figure = Figure(figsize=(11, 4.5), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    left, right = figure.subplots(1, 2)
    gpus, names = [plan.gpus for plan in plans], list(plans[0].split.trainers)
    left.plot(gpus, [plan.busy for plan in plans], color="0.2", linewidth=2.5, marker="o", label="all GPUs")
    left.plot(gpus, [plan.outcome.workers_busy for plan in plans], color="0.6", marker="o", label="workers")
    for i, name in enumerate(names):
        busy = [plan.outcome.trainers_busy[name] for plan in plans]
        left.plot(gpus, busy, color=COLORS[i % len(COLORS)], marker="o", label=f"trainer of {name}")
    left.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    left.set_ylim(0, 1.02)
    speedup = [plans[0].outcome.step_seconds / plan.outcome.step_seconds for plan in plans]
    right.plot(gpus, [count / gpus[0] for count in gpus], color="0.7", linestyle="--", label="as many times the GPUs")
    right.plot(gpus, speedup, color=COLORS[0], linewidth=2.5, marker="o", label="steps per second")
    for plan, value in zip(plans, speedup, strict=True):
        right.annotate(plan.bottleneck, (plan.gpus, value), (4, -12), textcoords="offset points", fontsize=7)
    right.set_yscale("log", base=2)
    _dress(left, "busy", "share of time", gpus)
    _dress(right, "speed-up, and what holds it up", f"times {gpus[0]} GPUs", gpus)
    figure.savefig(path)  # without pyplot the canvas is Agg's


def _dress(ax: Axes, title: str, unit: str, gpus: list[int]) -> None:
    ax.set_title(title, fontsize=11, loc="left", fontweight="bold")
    ax.set_ylabel(unit, fontsize=9)
    ax.set_xscale("log", base=2)
    ax.set_xticks(gpus, [str(count) for count in gpus])
    ax.set_xlabel("GPUs", fontsize=9)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False)
