"""Define the prefix trees that ours are compared with: TRL's TreeRow and LightBinPack's radix_merge.

TRL's module is loaded by itself because its package imports a trainer, which the trees do not need. Rows are opened as
TRL's token-budget batcher does for one process: a sample joins the open row if the row says that it fits, otherwise the
row is closed. radix_merge does the same internally.

Legend: N trajectories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from mgrpo.bench.harness import Candidate
from mgrpo.bench.packing.peers import lightbinpack
from mgrpo.bench.packing.tree_case import Case

MOST_MERGED = 64  # radix_merge marks the members of a row in 64 bits
WORDS = (
    "tree's peers: TreeRow packs the same columns, but its labels belong to tokens, where ours has prediction rows; "
    "radix_merge returns Python lists: a row's groups, two totals, its tokens flattened, and for each token a 64-bit "
    "mask of the members that have it; no positions, no attention paths, no prediction rows"
)


@dataclass(frozen=True)
class Rows:
    """Hold the number of a peer's rows, the number of their tokens, and the call to be timed."""

    count: int
    tokens: int
    run: Candidate


def tree_row() -> type[Any] | None:
    """Load TRL's TreeRow; return None if TRL is not installed."""
    trl = find_spec("trl")
    if trl is None or trl.origin is None:
        return None
    spec = spec_from_file_location("trl_packing", Path(trl.origin).parent / "experimental/async_grpo/packing.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TreeRow


def samples_of(case: Case) -> list[dict[str, Any]]:
    """Return the trajectories in TRL's form."""
    return [
        {
            "input_ids": torch.from_numpy(case.tokens_T[begin:end]),
            "completion_mask": torch.from_numpy(case.sampled_T[begin:end]).long(),
            "old_log_probs": torch.from_numpy(case.logprobs_T[begin:end]),
            "advantage": float(case.advantages_N[n]),
            "group_id": int(case.groups_N[n]),
        }
        for n, (begin, end) in enumerate(pairwise(case.offsets_N1.tolist()))
    ]


def trl_rows(case: Case, cap: int) -> Rows | None:
    """Return TRL's rows.  The timed call packs rows of known samples; it does not search for samples that fit."""
    row_type = tree_row()
    if row_type is None:
        return None
    rows = [row_type()]
    for sample in samples_of(case):
        if not rows[-1].fits(sample, cap):
            rows.append(row_type())
        rows[-1].add(sample)
    members, tokens = [row.samples for row in rows], sum(len(row.tokens) for row in rows)
    return Rows(len(rows), tokens, lambda: [_build_and_pack(row_type, samples) for samples in members])


def _build_and_pack(row_type: type[Any], samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    row = row_type()
    for sample in samples:
        row.add(sample)
    return row.pack()


def radix_rows(case: Case, cap: int) -> Rows | None:
    """Return LightBinPack's rows, timed as a whole."""
    peer = lightbinpack()
    if peer is None:
        return None
    bounds = pairwise(case.offsets_N1.tolist())
    each_alone = [[case.tokens_T[begin:end].tolist()] for begin, end in bounds]
    merge = peer.radix_merge

    def run() -> Any:
        return merge(each_alone, min_prefix_match=0, max_length=cap, max_count=MOST_MERGED)

    made = run()
    return Rows(len(made[0]), sum(made[1]), run)
