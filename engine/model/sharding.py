"""Write tensors that ranks hold by rows as safetensors, and read what any number of ranks wrote.

Every rank writes its rows to its own file, `weights.safetensors`, `weights-1.safetensors`, …. One after the other they
are the whole tensor, so the file of a single rank is an ordinary one. Numbers (0-dim) are only in the first file.

torch.distributed.checkpoint is not used because it unpickles: its file reader a checkpoint's metadata, its planner what
the ranks send each other. Rows in the order of ranks need neither metadata nor a plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from mgrpo.engine.run.tensor_file import write_tensors


def local(tensor: Tensor) -> Tensor:
    """Return the rows that this rank holds of a tensor, not copied; all of them if it is not split."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def write_shards(folder: Path, stem: str, tensors: Mapping[str, Tensor], rank: int) -> None:
    """Write this rank's rows of each tensor: DTensors split by rows, or plain tensors if there is one rank.

    The SHA-256 of the file is written beside it.
    """
    mine = {name: local(t.detach()).contiguous() for name, t in tensors.items() if t.ndim or rank == 0}
    write_tensors(_file(folder, stem, rank), mine)


class Shards:
    """Read what `write_shards` wrote. shapes: the shapes of the whole tensors, by name.

    Raises ValueError naming the file if there is none, or one is no whole safetensors file.
    """

    def __init__(self, folder: Path, stem: str):
        paths = list(takewhile(Path.exists, (_file(folder, stem, number) for number in count())))
        if not paths:
            raise ValueError(f"{_file(folder, stem, 0)} is missing: expected the {stem} that were saved")
        self._paths, self._files = paths, [_open(path) for path in paths]
        self._parts: dict[str, list[Any]] = {}
        for file in self._files:
            for name in sorted(file.keys()):
                self._parts.setdefault(name, []).append(file.get_slice(name))
        self.shapes = {name: self._shape(parts) for name, parts in self._parts.items()}

    @torch.no_grad()
    def read_into(self, target: Tensor, name: str) -> None:
        """Fill the rows of the target that this rank holds, reading no others; the whole shapes must be equal."""
        assert self.shapes[name] == tuple(target.shape), name
        mine = local(target)
        if not target.ndim:
            mine.copy_(self._files[0].get_tensor(name))
            return
        first = _first_row(target)
        start = 0
        for part in self._parts[name]:
            stop = start + part.get_shape()[0]
            low, high = max(first, start), min(first + len(mine), stop)
            if low < high:
                mine[low - first : high - first].copy_(part[low - start : high - start])
            start = stop

    def read(self, name: str) -> Tensor:
        """Return a whole tensor, on the CPU.

        The files are opened anew, since all that is ever read of a file that stays open counts as this process's
        memory: the library maps it.
        """
        first, *others = self._paths[: len(self._parts[name])]
        rows = _open(first).get_tensor(name)
        if not others:
            return rows
        whole = rows.new_empty(self.shapes[name])
        start = len(rows)
        whole[:start] = rows
        for path in others:
            rows = _open(path).get_tensor(name)
            whole[start : start + len(rows)] = rows
            start += len(rows)
        return whole

    @staticmethod
    def _shape(parts: list[Any]) -> tuple[int, ...]:
        first = parts[0].get_shape()
        return (sum(part.get_shape()[0] for part in parts), *first[1:]) if first else ()


def _open(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: expected a whole safetensors file: {error}") from error


def _file(folder: Path, stem: str, number: int) -> Path:
    return folder / (f"{stem}-{number}.safetensors" if number else f"{stem}.safetensors")


def _first_row(tensor: Tensor) -> int:
    """Return the first row that this rank holds. Ranks hold equal runs of rows, the last ones shorter or empty."""
    if not isinstance(tensor, DTensor):
        return 0
    ranks = tensor.device_mesh
    run = -(-tensor.shape[0] // ranks.size())
    first = min(ranks.get_local_rank() * run, tensor.shape[0])
    assert len(tensor.to_local()) == min(run, tensor.shape[0] - first), "not split by rows"
    return first
