"""Write files of checkpoints in three ways, each of which reports a full disk by another error."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file


def write_torch(folder: Path) -> None:
    """Write 800 kB by torch.save."""
    torch.save(torch.zeros(200_000), folder / "optimizer.pt")


def write_safetensors(folder: Path) -> None:
    """Write 800 kB by safetensors."""
    save_file({"weight": torch.zeros(200_000)}, folder / "model.safetensors")


def write_plain(folder: Path) -> None:
    """Write 800 kB by Python."""
    (folder / "model.bin").write_bytes(b"x" * 800_000)
