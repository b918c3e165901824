"""mgrpo bench packing."""

from __future__ import annotations

from mgrpo.bench import packing_fill, packing_plan
from mgrpo.bench.harness import report
from mgrpo.bench.packing_peers import versions


def main(quick: bool) -> None:
    print(f"peers: {versions()}")
    for words in (packing_plan.WORDS, packing_fill.WORDS, packing_fill.COLLATOR_WORDS):
        print(words)
    report("packing", [*packing_plan.results(quick), *packing_fill.results(quick)])
