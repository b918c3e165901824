"""Measure the prefix trees: time, tokens and rows against TRL's TreeRow and LightBinPack's radix_merge.

Our time is that of the plan (which trajectories share a row) and of the buffers of every row, on one thread like the
peers. All have the same cap on the distinct tokens of a row; TRL also applies it to a row's trained tokens, shared or
not. There are two measurements: `fresh`, which the targets are for, and `reused`, where ours uses an Arena and the
peers run under the memory rule `recycled` (see `memory.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mgrpo import _packing
from mgrpo.bench.harness import Candidate, Result, figure
from mgrpo.bench.packing import memory
from mgrpo.bench.packing.plan import times
from mgrpo.bench.packing.tree_case import ROLLOUTS, Case, distinct_prefixes, make
from mgrpo.bench.packing.tree_peers import Rows, radix_rows, trl_rows

CAP = 32768
TARGETS = {"TRL TreeRow": 100, "LightBinPack radix_merge": 20}


def ours(case: Case, arena: _packing.Arena | None = None) -> list[dict[str, Any]]:
    """Plan and fill our trees."""
    rows_N = case.rows_N
    offsets_M1, ids_N, shared_N = _packing.tree_plan(case.tokens_T, case.offsets_N1, rows_N, CAP)
    return _packing.tree_fill(
        case.tokens_T,
        case.offsets_N1,
        case.sampled_T,
        ids_N,
        shared_N,
        rows_N,
        case.advantages_N,
        np.ones(len(rows_N)),
        old_logprobs_T=case.logprobs_T,
        bins_M1=offsets_M1,
        arena=arena,
        threads=1,
    )


def measure(queries: int, rounds: int) -> list[Result]:
    """Measure the trees of some queries against the peers'."""
    case, arena = make(queries), _packing.Arena()
    peers = {"TRL TreeRow": trl_rows(case, CAP), "LightBinPack radix_merge": radix_rows(case, CAP)}
    installed: dict[str, Candidate] = {name: rows.run for name, rows in peers.items() if rows is not None}
    fresh = memory.time_settled({"ours": lambda: ours(case), **installed}, rounds)
    memory.fix("recycled")
    reused = memory.time_settled({"ours": lambda: ours(case, arena), **installed}, rounds)
    memory.fix("fresh")
    made, fewest, name = ours(case), distinct_prefixes(case), f"tree {queries} x {ROLLOUTS}"
    tokens = sum(len(row["input_ids"]) for row in made)
    assert max(len(row["input_ids"]) for row in made) <= CAP
    return [
        figure(f"{name}: time", fresh["ours"].seconds * 1e3, "ms"),
        figure(f"{name}: reused, time", reused["ours"].seconds * 1e3, "ms"),
        *(
            times(f"{name}: times {peer}", fresh["ours"], fresh.get(peer), "not installed", at_least=target)
            for peer, target in TARGETS.items()
        ),
        *(
            times(f"{name}: reused, times {peer}", reused["ours"], reused.get(peer), "not installed")
            for peer in TARGETS
        ),
        figure(f"{name}: tokens / distinct prefixes", tokens / fewest, "", at_most=1.1),
        figure(f"{name}: tokens / all trajectories'", tokens / len(case.tokens_T), ""),
        *(figure for peer, rows in peers.items() for figure in compared(name, peer, rows, len(made), tokens)),
    ]


def compared(name: str, peer: str, rows: Rows | None, count: int, tokens: int) -> list[Result]:
    """Return our rows and tokens against a peer's."""
    why = None if rows else "not installed"
    return [
        figure(f"{name}: bins / {peer}'s", count / rows.count if rows else None, "", at_most=1, why=why),
        figure(f"{name}: tokens / {peer}'s", tokens / rows.tokens if rows else None, "", why=why),
    ]


def results(quick: bool) -> list[Result]:
    """Return all results of the trees."""
    return measure(8, 3) if quick else measure(64, 3)
