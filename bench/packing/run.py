"""`mgrpo bench packing`: the packer against its peers from PyPI, in turns, in one run.

Every ratio is of times taken in the same rounds. The peers' versions, the inputs and what is counted are printed in
words before the table. A full run also measures how the time grows, and draws it.
"""

from __future__ import annotations

from mgrpo.bench.harness import report
from mgrpo.bench.packing import fill as packing_fill
from mgrpo.bench.packing import growth, tree_peers
from mgrpo.bench.packing import memory as packing_memory
from mgrpo.bench.packing import plan as packing_plan
from mgrpo.bench.packing import tree_case as packing_tree_case
from mgrpo.bench.packing import trees as packing_tree
from mgrpo.bench.packing.peers import versions

WORDS = (
    packing_memory.WORDS,
    packing_plan.WORDS,
    packing_fill.WORDS,
    packing_fill.COLLATOR_WORDS,
    packing_tree_case.WORDS,
    tree_peers.WORDS,
)


def main(quick: bool) -> None:
    packing_memory.fix("fresh")
    print("\n".join((f"peers: {versions()}", *WORDS)), flush=True)
    measured = [*packing_plan.results(quick), *packing_fill.results(quick), *packing_tree.results(quick)]
    report("packing", measured if quick else [*measured, *growth.results()])
