"""`mgrpo bench packing`: compares the packer with its peers from PyPI, in turns, in one run.

Every ratio is of times taken in the same rounds. The peers' versions, the inputs and what is counted are printed before
the table. A full run also measures how the time grows, and draws it.
"""

from __future__ import annotations

from mgrpo.bench.harness import report
from mgrpo.bench.packing import fill, growth, memory, plan, tree_case, tree_peers, trees
from mgrpo.bench.packing.peers import versions

WORDS = (
    memory.WORDS,
    plan.WORDS,
    fill.WORDS,
    fill.COLLATOR_WORDS,
    tree_case.WORDS,
    tree_peers.WORDS,
)


def main(quick: bool) -> None:
    """Measure plan, fill and trees, and print the results."""
    memory.fix("fresh")
    print("\n".join((f"peers: {versions()}", *WORDS)), flush=True)
    measured = [*plan.results(quick), *fill.results(quick), *trees.results(quick)]
    report("packing", measured if quick else [*measured, *growth.results()])
