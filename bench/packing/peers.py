"""Define the packers that ours is compared with, each called in its cheapest form; None if it is not installed.

LightBinPack and the flattening collator of transformers take lists, all others numpy arrays or tensors. A peer's input
is made before timing starts; converting it further counts as the peer's time. The peers are not modified, and none of
their answers is used as ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DataCollatorWithFlattening

from mgrpo.bench.harness import Candidate

PEERS = ("lightbinpack", "seqpacker", "transformers", "trl")


def versions() -> str:
    """Return the peers' names and versions."""
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
    """Return each peer's best-fit decreasing. `ogbfd` also assigns the bins to `ranks`; the others do not."""
    lengths = lengths_N.tolist()
    planners: dict[str, Candidate | None] = dict.fromkeys(("LightBinPack ogbfd", "LightBinPack obfd", "seqpacker obfd"))
    if (lbp := lightbinpack()) is not None:
        planners["LightBinPack ogbfd"] = lambda: lbp.ogbfd(lengths, cap, ranks)
        planners["LightBinPack obfd"] = lambda: lbp.obfd(lengths, cap)
    if (sp := seqpacker()) is not None:
        planners["seqpacker obfd"] = lambda: sp.Packer(cap, strategy="obfd").pack_flat(lengths_N)
    return planners


def numpy_columns(
    tokens: Sequence[NDArray[np.int64]],
    sampled: Sequence[NDArray[np.bool_]],
    rows_N: NDArray[np.int64],
    advantages_N: NDArray[np.float32],
    weights_N: NDArray[np.float32],
) -> dict[str, NDArray]:
    """Make the columns of `fill` with numpy's concatenate and repeat."""
    counting = np.arange(rows_N.max())
    mask_P = np.concatenate([s[1 : n + 1] for s, n in zip(sampled, rows_N, strict=True)])
    weights_P = np.repeat(weights_N, rows_N)
    weights_P *= mask_P
    return {
        "input_ids": np.concatenate([t[:n] for t, n in zip(tokens, rows_N, strict=True)]),
        "positions": np.concatenate([counting[:n] for n in rows_N]),
        "targets": np.concatenate([t[1 : n + 1] for t, n in zip(tokens, rows_N, strict=True)]),
        "action_mask": mask_P,
        "weights": weights_P,
        "advantages": np.repeat(advantages_N, rows_N),
        "segment_ids": np.repeat(np.arange(len(rows_N), dtype=np.int32), rows_N),
    }


def torch_columns(
    tokens: Sequence[torch.Tensor],
    sampled: Sequence[torch.Tensor],
    rows_N: torch.Tensor,
    advantages_N: torch.Tensor,
    weights_N: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Make the columns of `fill` with torch's cat and repeat_interleave."""
    rows = rows_N.tolist()
    counting = torch.arange(max(rows))
    mask_P = torch.cat([s[1 : n + 1] for s, n in zip(sampled, rows, strict=True)])
    return {
        "input_ids": torch.cat([t[:n] for t, n in zip(tokens, rows, strict=True)]),
        "positions": torch.cat([counting[:n] for n in rows]),
        "targets": torch.cat([t[1 : n + 1] for t, n in zip(tokens, rows, strict=True)]),
        "action_mask": mask_P,
        "weights": weights_N.repeat_interleave(rows_N).mul_(mask_P),
        "advantages": advantages_N.repeat_interleave(rows_N),
        "segment_ids": torch.arange(len(rows), dtype=torch.int32).repeat_interleave(rows_N),
    }


def flattening_collator(trajectories: Sequence[Sequence[int]]) -> Candidate:
    """Return a call that makes input_ids, labels, position_ids and cu_seqlens from one list of ints per trajectory."""
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    features = [{"input_ids": tokens} for tokens in trajectories]
    return lambda: collate(features)
