"""mgrpo bench packing."""

from __future__ import annotations

from mgrpo.bench import packing_plan
from mgrpo.bench.harness import report
from mgrpo.bench.packing_peers import versions


def main(quick: bool) -> None:
    print(f"peers: {versions()}")
    report("packing", packing_plan.results(quick))
