"""Make what `mgrpo bench step` trains on: sealed groups of one agent with trajectory files, as a trainer finds them.

There are three sources. *A recorded run* of the geography example, if there is one: the samples in the middle of its
rl stage. *Geography* as its scripts play it, with careless mistakes drawn anew for every rollout of a question: real
texts, tools, rewards and d_k, the same for everyone who has run `prepare.py`. *The agent mix*: random tokens with the
lengths of long-horizon agents. Lengths and d_k are the quantiles of their distributions in random order, so that few
rollouts represent many.

Legend: N trajectories or rollouts, L tokens of a trajectory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from mgrpo.engine.config.schema import Config, load_config, parse_config, read_dump
from mgrpo.engine.environment.loader import load_environment
from mgrpo.engine.model.causal_lm import load_tokenizer
from mgrpo.engine.rollout.demonstrations import Demonstrations
from mgrpo.engine.rollout.episodes import Job
from mgrpo.engine.rollout.records import write_rollouts
from mgrpo.engine.run.trajectories import Position, TrajectoryWriter
from mgrpo.engine.store import CallRecord, Group, RolloutRecord
from mgrpo.engine.store.open import open_copy
from mgrpo.engine.types import MAIN, Task, Trajectory

SUB = "sub"
LR = 1e-30  # so small that no weight changes: every step begins with the same weights and costs the same
GEOGRAPHY, RECORDED = Path("examples/geography/train.toml"), Path("runs/geography/train")
CARELESSNESS = 0.4  # probability per call; some of a question's rollouts are then right, and some wrong
LENGTHS = {MAIN: (8192, 32768), SUB: (205, 4096)}  # tokens of a trajectory, bounds of a log-uniform distribution
TURNS = {MAIN: 1024, SUB: 256}  # tokens of a turn: what the agent writes and what a tool returns
WRITTEN = 0.25  # share of a turn that the agent writes; the tool returned the rest
PROMPT = 0.125  # share of a trajectory
ALIGNED, CALLS, SPREAD = 8, 3.0, 1.0  # D; the mean of d_k, which is log-normal with this sigma
_MAIN, _SUB = ("{} to {}".format(*LENGTHS[agent]) for agent in (MAIN, SUB))
WORDS = f"""\
The agent mix: main trajectories of {_MAIN} tokens, the sub-agent's of {_SUB}, log-uniform, divided by the factor
after "mix/"; d_k log-normal (sigma {SPREAD:g}) with mean {CALLS:g}, aligned to D = {ALIGNED}. The prompt takes
{PROMPT:.1%} of a trajectory; {WRITTEN:.0%} of the rest are the agent's own tokens. The number of right rollouts varies
evenly over the queries, from none to all; if none or all are right, the main agent has no advantage. No two
trajectories are identical.
Geography: episodes recorded in the middle of {RECORDED} if that exists, otherwise episodes played by the
example's scripts, with a careless mistake in {CARELESSNESS:.0%} of the calls, drawn anew for every rollout."""


@dataclass(frozen=True)
class Case:
    """Hold sealed groups of one agent. config: that of a run with such groups; trajectories: their files' folder."""

    name: str
    agent: str
    config: Config
    groups: list[Group]
    trajectories: str

    @property
    def index(self) -> int:
        """The agent's position in the config."""
        return list(self.config.agents).index(self.agent)


# ---- the agent mix


def mix(agent: str, model: Path, folder: Path, factor: int, queries: int, rollouts: int, **compute: Any) -> Case:
    """Make the agent mix for one agent, with lengths divided by `factor`. compute: keys of the config's section."""
    random = np.random.default_rng(len(agent))
    counts_N = np.ones(queries * rollouts, np.int64) if agent == MAIN else calls_made(queries * rollouts, random)
    lengths_N = lengths_of(LENGTHS[agent], int(counts_N.sum()), factor, random)
    turn, vocabulary = max(4, TURNS[agent] // factor), _vocabulary(model)
    trajectories = [trajectory_of(length, turn, vocabulary, random) for length in lengths_N.tolist()]
    groups = sealed(agent, trajectories, counts_N.reshape(queries, rollouts), folder)
    return Case(f"mix/{factor}, {agent}", agent, _config(model, folder, compute), groups, str(folder))


def long(model: Path, folder: Path, length: int, rollouts: int, **compute: Any) -> Case:
    """Make one query whose rollouts have one length; after the first half turn all tokens are the agent's own."""
    random, vocabulary = np.random.default_rng(0), _vocabulary(model)
    tokens = random.integers(1, vocabulary, (rollouts, length + 1)).astype(np.int32)
    sampled_L = np.arange(length + 1) >= TURNS[MAIN] // 2
    trajectories = [Trajectory(tokens_L, sampled_L, np.zeros(length + 1, np.float32), 0) for tokens_L in tokens]
    groups = sealed(MAIN, trajectories, np.ones((1, rollouts), np.int64), folder)
    return Case(f"{rollouts} x {length}", MAIN, _config(model, folder, compute), groups, str(folder))


def _config(model: Path, folder: Path, compute: dict[str, Any]) -> Config:
    agent = {"model": str(model), "lr": LR}
    return parse_config(
        {
            "run_dir": str(folder),
            "environment": {"use": "none:None"},
            "agents": {MAIN: agent, SUB: agent},
            "algorithm": {"aligned_calls": ALIGNED},
            "compute": compute,
        }
    )


def _vocabulary(model: Path) -> int:
    return int(json.loads((model / "config.json").read_text())["vocab_size"])


def calls_made(rollouts: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Return d_k of each rollout."""
    spread_N = np.exp(SPREAD * quantiles(NormalDist().inv_cdf, rollouts))
    return random.permutation(np.round(spread_N * CALLS / spread_N.mean()).astype(np.int64))


def lengths_of(bounds: tuple[int, int], count: int, factor: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Return `count` lengths, log-uniform within the bounds divided by `factor`."""
    least, most = (math.log(bound / factor) for bound in bounds)
    lengths_N = np.exp(quantiles(lambda share: least + share * (most - least), count))
    return random.permutation(np.maximum(np.round(lengths_N).astype(np.int64), 4))


def quantiles(inverse: Any, count: int) -> NDArray[np.float64]:
    """Return the quantiles at the middles of `count` equal shares."""
    return np.array([inverse((i + 0.5) / count) for i in range(count)])


def trajectory_of(length: int, turn: int, vocabulary: int, random: np.random.Generator) -> Trajectory:
    """Make a trajectory: a prompt, turns, and at the end what the agent wrote last."""
    written = max(1, round(WRITTEN * turn))
    places_L = np.arange(length) - max(1, round(PROMPT * length))
    sampled_L = (places_L >= 0) & (places_L % turn < written)
    sampled_L[max(1, length - written) :] = True
    tokens_L = random.integers(1, vocabulary, length).astype(np.int32)
    return Trajectory(tokens_L, sampled_L, np.where(sampled_L, -1, 0).astype(np.float32), 0)


def sealed(agent: str, trajectories: Sequence[Trajectory], counts_QK: NDArray[np.int64], folder: Path) -> list[Group]:
    """Write trajectories to the folder and group them by query, counts_QK of them for each rollout."""
    writer = TrajectoryWriter(str(folder), agent)
    placed = iter(list(zip(trajectories, writer.append(trajectories), strict=True)))
    writer.close()
    random, queries = np.random.default_rng(0), len(counts_QK)
    groups = []
    for query, counts_K in enumerate(counts_QK.tolist()):
        right = right_of(query, queries, len(counts_K))
        rollouts = [RolloutRecord(query, k, "scored", True, float(k < right), 0.0) for k in range(len(counts_K))]
        calls = [c for k, count in enumerate(counts_K) for c in _records(agent, query, k, count, placed, random)]
        groups.append(Group(query, "", 0, rollouts, calls))
    return groups


def right_of(query: int, queries: int, rollouts: int) -> int:
    """Return how many rollouts of a query are right.

    If each query's probability of that were uniform, the number would be uniform from 0 to K, and 2 of K + 1 groups
    would have no advantage. Quantiles at the first quarters of equal shares come nearest to that: 1 of 3 or 4 queries
    for K = 6.
    """
    return int((query + 0.25) / queries * (rollouts + 1))


def _records(
    agent: str,
    query: int,
    rollout: int,
    count: int,
    placed: Iterator[tuple[Trajectory, Position]],
    random: np.random.Generator,
) -> Iterator[CallRecord]:
    for number in range(count):
        trajectory, position = next(placed)
        yield CallRecord(
            agent=agent,
            query=query,
            rollout=rollout,
            call=number,
            format=True,
            expert=None if agent == MAIN else float(random.integers(5)) / 4,
            version=0,
            tokens=len(trajectory),
            actions=int(trajectory.sampled.sum()),
            turns=1,
            truncated=False,
            ended="answer",
            position=position,
            rows=trajectory.rows,
            digest=trajectory.digest,
            sampler_digest=trajectory.sampler_digest,
        )


# ---- geography


def geography(folder: Path, queries: int, overrides: Sequence[str] = ()) -> list[Case]:
    """Make a case for each agent of the example. Raises ValueError if the example's data is missing."""
    spoilt = f"environment.options.carelessness={CARELESSNESS}"
    config = load_config(GEOGRAPHY, [spoilt, f"agents.main.lr={LR}", f"agents.sub.lr={LR}", *overrides])
    environment = load_environment(config.environment)
    tokenizers = {name: load_tokenizer(name, agent) for name, agent in config.agents.items()}
    tasks = environment.tasks("train")
    chosen = tasks[:: max(1, len(tasks) // queries)][:queries]
    jobs = [
        Job(query, rollout, Task(f"{task.id}#{rollout}", task.data))  # a hash of the id seeds the mistakes
        for query, task in enumerate(chosen)
        for rollout in range(config.algorithm.rollouts)
    ]
    rollouts = Demonstrations(config, environment, tokenizers).run(jobs)
    writers = {name: TrajectoryWriter(str(folder), name) for name in config.agents}
    records, calls = write_rollouts(writers, rollouts)
    for writer in writers.values():
        writer.close()
    return [
        Case(f"geography, {agent}", agent, config, _grouped(agent, records, calls), str(folder))
        for agent in config.agents
    ]


def recorded(run: Path, queries: int) -> list[Case]:
    """Load a case per agent: the first queries of a run's middle rl step. Raises ValueError if it has no rollouts."""
    config = read_dump((run / "config.json").read_text())
    agents = {name: msgspec.structs.replace(agent, lr=LR) for name, agent in config.agents.items()}
    config = msgspec.structs.replace(config, agents=agents)
    first = config.steps // 2 * config.queries_per_step
    with open_copy(config, run) as store:
        chosen = [query for query in range(first, first + config.queries_per_step) if store.groups.rollouts_of(query)][
            :queries
        ]
        rollouts = [rollout for query in chosen for rollout in store.groups.rollouts_of(query)]
        calls = [call for query in chosen for call in store.groups.calls_of(query)]
    if not rollouts:
        raise ValueError(f"{run}: no rollout of queries from {first} on, expected those of an rl step")
    return [
        Case(f"geography recorded, {agent}", agent, config, _grouped(agent, rollouts, calls), str(run / "trajectories"))
        for agent in agents
    ]


def _grouped(agent: str, rollouts: Sequence[RolloutRecord], calls: Sequence[CallRecord]) -> list[Group]:
    return [
        Group(
            query,
            "",
            0,
            [r for r in rollouts if r.query == query],
            [c for c in calls if (c.agent, c.query) == (agent, query)],
        )
        for query in sorted({r.query for r in rollouts})
    ]
