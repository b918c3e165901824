"""Measure the workload of a simulated run from a decoupled run that took place: from its store and its metrics.

The store has every episode's begin (when its query was taken), its seconds and its sampled tokens; this also tells how
many episodes ran beside it. Non-negative least squares over all episodes of

    seconds = pause + tokens * (step_seconds + beside * row_seconds)

gives the two rates of a worker; an episode's remaining seconds are its pause. In the same way a trainer's overhead and
rate follow from the seconds and tokens of its steps. The first rl step fills caches and is left out.

One run cannot show everything. The two rates cannot be separated if the same number of episodes always ran at once
(then row_seconds gets all, so that more slots promise nothing), nor can the cost of a prompt from a pause. Not measured
are the seconds that processes on the same cores take from each other, the worth of more GPUs than the run had
(`TrainerCost.efficiency` is assumed), and how pauses and failures grow with load. An episode that another worker
sampled again is dated by the time at which its query was taken again.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from mgrpo.engine.config.schema import Config
from mgrpo.engine.run.directory import RunPaths
from mgrpo.engine.run.metrics import Row, is_evaluation, read_metrics
from mgrpo.engine.simulate.workload import EpisodeCost, TrainerCost, WorkerCost, Workload
from mgrpo.engine.store import STATUSES
from mgrpo.engine.store.open import open_store

Record = Mapping[str, Any]  # a row of a table of the store
Columns = dict[str, np.ndarray]


def measure(config: Config, until: int | None = None) -> Workload:
    """Measure the workload of the run that `config` describes, from its rl steps below `until` (default: all).

    Raises ValueError if it is no decoupled run with at least two finished rl steps.
    """
    run, end = RunPaths(config.run_dir), config.steps if until is None else until
    steps = {name: _steps(run.agent(name).metrics, end) for name in config.agents}
    if config.colocated or not all(steps.values()):
        raise ValueError(f"run_dir: {run.path} given: expected a decoupled run that has taken two rl steps")
    tables = _tables(config)
    ended = _episodes(config, tables, end)
    token_seconds, pause_N = _rates(ended, ended["query"] // config.queries_per_step)
    edges = [0, *(np.flatnonzero(np.diff(ended["query"])) + 1).tolist(), len(pause_N)]
    rows_AN = np.stack([ended[f"rows {name}"] for name in config.agents])
    trainers = {name: _trainer(config, name, rows, tables) for name, rows in steps.items()}
    episodes = EpisodeCost(ended["actions"], pause_N, rows_AN, edges)
    return Workload(episodes, _worker(config, ended, token_seconds, end), trainers)


def _tables(config: Config) -> dict[str, list[Record]]:
    tables: dict[str, list[Record]] = defaultdict(list)

    def add(line: str) -> None:
        row = json.loads(line)
        tables[row["table"]].append(row)

    with closing(open_store(config)) as store:
        store.audit.dump(add)
    return tables


def _steps(path: Path, end: int) -> list[Row]:
    rows = [row for row in read_metrics(path) if row["stage"] == "rl" and not is_evaluation(row)]
    return [row for row in rows if 1 <= row["step"] < end]


# ---- episodes


def _episodes(config: Config, tables: Mapping[str, Sequence[Record]], end: int) -> Columns:
    """Return columns of the episodes, sorted by query.

    They are query, worker, begin, seconds, actions and, per agent, its trainable tokens.
    """
    names, taken = list(config.agents), {row["query"]: row for row in tables["queries"]}
    limits = range(config.queries_per_step, end * config.queries_per_step)
    ended = [row for row in tables["rollouts"] if row["query"] in limits]
    ended.sort(key=lambda row: (row["query"], row["rollout"]))
    place = {(row["query"], row["rollout"]): i for i, row in enumerate(ended)}
    counts_2AN = np.zeros((2, len(names), len(ended)))
    for call in tables["calls"]:
        i = place.get((call["query"], call["rollout"]))
        if i is not None:
            counts_2AN[:, names.index(call["agent"]), i] += call["actions"], call["rows"]
    queries = [taken[row["query"]] for row in ended]
    return {
        "query": np.array([row["query"] for row in ended]),
        "worker": np.array([row["worker"] for row in queries]),
        "begin": np.array([row["taken"] for row in queries], np.float64),
        "seconds": np.array([row["seconds"] for row in ended]),
        "actions": counts_2AN[0].sum(0),
        **{f"rows {name}": rows_N for name, rows_N in zip(names, counts_2AN[1], strict=True)},
    }


def _rates(ended: Columns, step_N: np.ndarray) -> tuple[tuple[float, float], np.ndarray]:
    """Return (step_seconds, row_seconds) of a worker, and each episode's remaining seconds, (N,).

    On a shared machine some steps are faster than others; this difference is divided out.
    """
    tokens_N = ended["actions"]
    given_NC = np.stack([tokens_N * _beside(ended), tokens_N, np.ones(len(tokens_N))], 1)
    seconds_N = _even(ended["seconds"], given_NC @ least_squares(given_NC, ended["seconds"]), step_N)
    row, step, _ = least_squares(given_NC, seconds_N)
    over_N = seconds_N - given_NC[:, :2] @ [row, step]
    pause_N = np.maximum(over_N, 0)  # cutting off negative noise must not raise the mean
    return (step, row), pause_N * (max(over_N.mean(), 0) / max(pause_N.mean(), 1e-12))


def _even(seconds_N: np.ndarray, fitted_N: np.ndarray, step_N: np.ndarray) -> np.ndarray:
    """Return the seconds as if every step had the mean speed; their mean is unchanged."""
    fitted_S, seconds_S = np.bincount(step_N, fitted_N), np.bincount(step_N, seconds_N)
    even_N = seconds_N * (fitted_S / np.maximum(seconds_S, 1e-12))[step_N]
    return even_N * (seconds_N.sum() / max(even_N.sum(), 1e-12))


def _beside(ended: Columns) -> np.ndarray:
    """Return the mean number of episodes that ran on each episode's worker meanwhile, itself included, (N,)."""
    beside_N = np.ones(len(ended["query"]))
    for worker in set(ended["worker"].tolist()):
        mine = ended["worker"] == worker
        begins, ends = ended["begin"][mine], (ended["begin"] + ended["seconds"])[mine]
        times, running = _timeline(ended, worker)
        area = np.concatenate([[0.0], np.cumsum(running[:-1] * np.diff(times))])  # episode-seconds until then
        spent = np.interp(ends, times, area) - np.interp(begins, times, area)
        beside_N[mine] = np.maximum(spent / np.maximum(ends - begins, 1e-9), 1.0)
    return beside_N


def _timeline(ended: Columns, worker: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the times at which a worker's episodes began or ended, in order, and how many ran from each on."""
    mine = ended["worker"] == worker
    begins, ends = ended["begin"][mine], (ended["begin"] + ended["seconds"])[mine]
    times = np.concatenate([begins, ends])
    order = np.argsort(times, kind="stable")
    return times[order], np.cumsum(np.repeat([1, -1], len(begins))[order])


def least_squares(given_NC: np.ndarray, wanted_N: np.ndarray) -> list[float]:
    """Return the x >= 0 that minimises |given @ x - wanted|, by trying every set of columns (at most three).

    Of equally good sets the first counts, in order of size, then of columns.
    """
    columns = range(given_NC.shape[1])
    best, least = np.zeros(len(columns)), float(wanted_N @ wanted_N)
    for size in columns:
        for chosen in map(list, itertools.combinations(columns, size + 1)):
            x, *_ = np.linalg.lstsq(given_NC[:, chosen], wanted_N)
            error = float(((given_NC[:, chosen] @ x - wanted_N) ** 2).sum())
            if (x >= 0).all() and error < least - 1e-9 * float(wanted_N @ wanted_N):
                best, least = np.zeros(len(columns)), error
                best[chosen] = x
    return best.tolist()


# ---- trainers and weights


def _trainer(config: Config, name: str, steps: Sequence[Row], tables: Mapping[str, Sequence[Record]]) -> TrainerCost:
    """Measure one agent's trainer, assuming that none of its ranks waited for another."""
    trained_S = np.array([row.get("tokens_trained", 0) for row in steps], np.float64)
    passes_S = np.array([row.get("time/forward_backward", 0.0) for row in steps])
    publish = float(np.mean([row["time/publish"] for row in steps]))
    around = float(np.mean([row["time/step"] - row["time/waiting"] for row in steps]) - publish - passes_S.mean())
    token_seconds, fixed = least_squares(np.stack([trained_S, np.ones(len(steps))], 1), passes_S)
    return TrainerCost(
        rate=1 / max(token_seconds * config.agents[name].ranks, 1e-12),
        overhead=max(around, 0) + fixed,
        publish=publish,
        kept=float(trained_S.sum()) / max(_rows(config, name, steps, tables), 1),
        zero_std=float(np.mean([row["zero_std"] for row in steps])),
    )


def _rows(config: Config, name: str, steps: Sequence[Row], tables: Mapping[str, Sequence[Record]]) -> float:
    """Return the trainable tokens of as many queries as these steps have claimed."""
    mine = [call for call in tables["calls"] if call["agent"] == name]
    sampled = len({row["query"] for row in tables["rollouts"]})
    return sum(call["rows"] for call in mine) / sampled * len(steps) * config.queries_per_step


def _worker(config: Config, ended: Columns, rates: tuple[float, float], end: int) -> WorkerCost:
    """Measure a rollout worker, which loads each trained agent's weights after every step, or skips some when late.

    Between two lots of episodes it loads, waits, and else mostly writes and records: that time belongs to no episode.
    """
    files = RunPaths(config.run_dir).worker_metrics()
    rows = [pair for path in files for pair in itertools.pairwise(read_metrics(path)) if pair[1]["step"] < end]
    rows = [(before, row) for before, row in rows if not is_evaluation(row) and not is_evaluation(before)]
    versions = [f"{name}/version" for name in config.trained]
    loads = sum(row[version] != before[version] for before, row in rows for version in versions)
    weights = sum(row["time/weights"] for _, row in rows)
    recorded = [sum(row[f"rollouts/{status}"] for status in STATUSES) for _, row in rows]
    spans = [count / row["perf/rollouts_per_second"] for count, (_, row) in zip(recorded, rows, strict=True)]
    outside = sum(spans) - weights - sum(row["time/waiting"] for _, row in rows)
    running, lots = _sampling(ended)
    each = len(ended["query"])
    between = outside * each / max(sum(recorded), 1) - running
    return WorkerCost(*rates, load_seconds=weights / max(loads, 1), record_seconds=max(between, 0) / lots)


def _sampling(ended: Columns) -> tuple[float, int]:
    """Return the seconds in which any of a worker's episodes ran, summed over workers, and how many lots began."""
    seconds, lots = 0.0, 0
    for worker in set(ended["worker"].tolist()):
        times, running = _timeline(ended, worker)
        seconds += float(np.diff(times)[running[:-1] > 0].sum())
        lots += int((running == 0).sum())
    return seconds, lots
