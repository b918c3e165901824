"""The prefix trees: time, tokens and rows against TRL's TreeRow and LightBinPack's radix_merge.

Timed of ours: the plan (which trajectories share a row) and the buffers of every row. All have the same cap, on the
distinct tokens of a row; TRL holds a row's trained tokens, shared or not, to it as well. Our
buffers cost as much to fault in as to fill, so both rules of packing_memory are measured; the targets are for `fresh`,
which is the slower.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from mgrpo import _packing
from mgrpo.bench import packing_memory
from mgrpo.bench.harness import Candidate, Result, figure
from mgrpo.bench.packing_plan import times
from mgrpo.bench.packing_tree_case import ROLLOUTS, Case, distinct_prefixes, make
from mgrpo.bench.tree_peers import Rows, radix_rows, trl_rows

CAP = 32768
TARGETS = {"TRL TreeRow": 100, "LightBinPack radix_merge": 20}


def ours(case: Case) -> list[dict[str, Any]]:
    rows_N = case.rows_N
    weights_N = np.ones(len(rows_N))
    offsets_M1, ids_N, shared_N = _packing.tree_plan(case.tokens_T, case.offsets_N1, rows_N, CAP)
    return [
        _packing.tree_fill(
            case.tokens_T,
            case.offsets_N1,
            case.sampled_T,
            ids_N[begin:end],
            shared_N[begin:end],
            rows_N,
            case.advantages_N,
            weights_N,
            old_logprobs_T=case.logprobs_T,
        )
        for begin, end in pairwise(offsets_M1.tolist())
    ]


def measure(queries: int, rounds: int) -> list[Result]:
    case = make(queries)
    peers = {"TRL TreeRow": trl_rows(case, CAP), "LightBinPack radix_merge": radix_rows(case, CAP)}
    here: dict[str, Candidate] = {name: rows.run for name, rows in peers.items() if rows is not None}
    candidates = {"ours": lambda: ours(case), **here}
    timings = packing_memory.settled(candidates, rounds)
    packing_memory.fix("recycled")
    recycled = packing_memory.settled(candidates, rounds)
    packing_memory.fix("fresh")
    made, fewest, name = ours(case), distinct_prefixes(case), f"tree {queries} x {ROLLOUTS}"
    tokens = sum(len(row["input_ids"]) for row in made)
    assert max(len(row["input_ids"]) for row in made) <= CAP
    return [
        figure(f"{name}: time", timings["ours"].seconds * 1e3, "ms"),
        figure(f"{name}: time, recycled", recycled["ours"].seconds * 1e3, "ms"),
        *(
            times(f"{name}: times {peer}", timings["ours"], timings.get(peer), "not installed", at_least=target)
            for peer, target in TARGETS.items()
        ),
        *(
            times(f"{name}: times {peer}, recycled", recycled["ours"], recycled.get(peer), "not installed")
            for peer in peers
        ),
        figure(f"{name}: tokens / distinct prefixes", tokens / fewest, "", at_most=1.1),
        figure(f"{name}: tokens / all trajectories'", tokens / len(case.tokens_T), ""),
        *(figure for peer, rows in peers.items() for figure in compared(name, peer, rows, len(made), tokens)),
    ]


def compared(name: str, peer: str, rows: Rows | None, count: int, tokens: int) -> list[Result]:
    why = None if rows else "not installed"
    return [
        figure(f"{name}: bins / {peer}'s", count / rows.count if rows else None, "", at_most=1, why=why),
        figure(f"{name}: tokens / {peer}'s", tokens / rows.tokens if rows else None, "", why=why),
    ]


def results(quick: bool) -> list[Result]:
    return measure(8, 3) if quick else measure(64, 3)
