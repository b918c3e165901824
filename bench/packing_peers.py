"""The packers that ours is measured against, each called in its cheapest form; a peer that is not installed is None.

LightBinPack takes and gives lists and builds its own from them, seqpacker takes and gives numpy arrays: the lists and
arrays are made before the clock starts. Nothing of a peer is changed, and no answer of its is used as ours.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from mgrpo.bench.harness import Candidate

PEERS = ("lightbinpack", "seqpacker", "transformers", "trl")


def versions() -> str:
    return ", ".join(f"{peer} {_version(peer)}" for peer in PEERS)


def _version(peer: str) -> str:
    try:
        return version(peer)
    except PackageNotFoundError:
        return "(not installed)"


def lightbinpack() -> ModuleType | None:
    try:
        import lightbinpack
    except ImportError:
        return None
    return lightbinpack


def seqpacker() -> ModuleType | None:
    try:
        import seqpacker
    except ImportError:
        return None
    return seqpacker


def planners(lengths_N: NDArray[np.int64], cap: int, ranks: int) -> dict[str, Candidate | None]:
    """Best-fit decreasing of each peer. `ogbfd` also deals the bins to `ranks`, the others leave that to do."""
    lengths = lengths_N.tolist()
    planners: dict[str, Candidate | None] = dict.fromkeys(("LightBinPack ogbfd", "LightBinPack obfd", "seqpacker obfd"))
    if (lbp := lightbinpack()) is not None:
        planners["LightBinPack ogbfd"] = lambda: lbp.ogbfd(lengths, cap, ranks)
        planners["LightBinPack obfd"] = lambda: lbp.obfd(lengths, cap)
    if (sp := seqpacker()) is not None:
        planners["seqpacker obfd"] = lambda: sp.Packer(cap, strategy="obfd").pack_flat(lengths_N)
    return planners
