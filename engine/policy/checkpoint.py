"""Save a policy's state in a folder, and load it: master weights, moments, the KL's reference and a small index.

Each rank writes its rows. The index, `policy.json`, is written last, so a folder without one is incomplete. A state
written by any number of ranks can be read by any other number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from mgrpo.engine.model.pretrained import Read, new_directory, reading_order
from mgrpo.engine.model.sharding import Shards, write_shards
from mgrpo.engine.run.checksums import verify_sidecars
from mgrpo.engine.run.manifest import VersionManifest, write_manifest
from mgrpo.engine.system import distributed

INDEX = "policy.json"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of every weight from its first step on


class Index(msgspec.Struct, frozen=True):
    """Describe a saved state.

    version: the number of optimizer steps that led to the weights. reference: whether the KL's reference is included.
    moments: whether the optimizer had any, which it has not before its first step; None: not known, saved by 0.1.0.
    """

    version: int
    reference: bool
    moments: bool | None = None


def write_state(
    folder: str | Path | None, tensors: Mapping[str, Mapping[str, Tensor]], index: Index, group: ProcessGroup | None
) -> None:
    """Write this rank's rows of every group of tensors, by the stem of its files; rank 0 then writes the index.

    Rank 0 makes the folder, which must not exist yet and which all ranks must see. No rank returns before all have
    written their rows. Raises OSError or SafetensorError on every rank if any could not write.
    """
    rank = distributed.rank(group)
    assert rank or folder is not None
    folder = Path(distributed.broadcast(str(folder), str, group))
    failure: Exception | None = None
    try:
        if rank == 0:
            folder.mkdir()
    except OSError as error:
        failure = error
    distributed.require_success(f"{folder}", failure, group)
    try:
        for stem, named in tensors.items():
            write_shards(folder, stem, named, rank)
    except (OSError, SafetensorError) as error:
        failure = error
    distributed.require_success(f"{folder}", failure, group)
    if rank == 0:
        (folder / INDEX).write_bytes(msgspec.json.encode(index))


def write_whole(
    folder: str | Path,
    weights: Mapping[str, Tensor],
    fill: Callable[[Path, Read], VersionManifest],
    group: ProcessGroup | None,
) -> VersionManifest:
    """Write a new folder that holds whole weights, as one version; return its manifest, which is written too.

    fill: writes the weights into an empty directory, which becomes rank 0's folder, and asks for each one by its name,
    in `reading_order`. Raises what fill raises of OSError and ValueError on every rank; nothing is then left.
    """
    order = iter(reading_order(weights))
    failure: Exception | None = None
    manifest = None
    try:
        if distributed.rank(group) == 0:
            with new_directory(Path(folder)) as out:
                manifest = fill(out, lambda name: _gathered(weights[next(order)]))
                write_manifest(out, manifest)
    except (OSError, ValueError) as error:
        failure = error
    for name in order:  # the other ranks gather each weight with rank 0, and rank 0 those that it did not come to
        _gathered(weights[name])
    distributed.require_success(f"{folder}", failure, group)
    written: VersionManifest = distributed.broadcast(manifest, VersionManifest, group)
    return written


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor; a collective if ranks hold it by rows."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def _gathered(weight: Tensor) -> Tensor:
    return whole(weight.detach()).cpu()


def read_index(folder: Path, group: ProcessGroup | None) -> Index:
    """Return the index, as rank 0 reads it. Raises ValueError on every rank if it is missing or damaged."""
    path = folder / INDEX
    found = path.read_text() if distributed.rank(group) == 0 and path.is_file() else ""
    try:
        return msgspec.json.decode(distributed.broadcast(found, str, group), type=Index)
    except msgspec.DecodeError as error:
        raise ValueError(f"{folder}: expected a policy's state with a valid {INDEX}: {error}") from error


def check_files(folder: Path, group: ProcessGroup | None) -> None:
    """Compare the files of a state with the SHA-256 beside each; every rank reads its share.

    Raises ValueError on every rank, naming the file, if one is damaged.
    """
    rank, ranks = distributed.rank(group), distributed.ranks(group)
    failure: Exception | None = None
    try:
        verify_sidecars(sorted(folder.glob("*.safetensors"))[rank::ranks])
    except ValueError as error:
        failure = error
    if damage := list(filter(None, distributed.gather(str(failure or ""), str, group))):
        raise ValueError(damage[0])


def read_into(target: Mapping[str, Any], folder: Path, stem: str) -> None:
    """Fill the rows that this rank holds. Raises ValueError, with nothing changed, if they belong to another model."""
    shards = Shards(folder, stem)
    shapes = {name: tuple(value.shape) for name, value in target.items()}
    if shapes != shards.shapes:
        odd = sorted(set(shapes.items()) ^ set(shards.shapes.items()))[0][0]
        raise ValueError(
            f"{folder}: weight {odd!r} has shape {shards.shapes.get(odd)}, expected {shapes.get(odd)}: "
            "made by another model"
        )
    for name, value in target.items():
        shards.read_into(value, name)


def read_moments(
    optimizer: torch.optim.Optimizer, weights: Mapping[str, Tensor], folder: Path, expected: bool | None
) -> None:
    """Load what `moments` returned, into an optimizer that has no moments yet.

    expected: whether there must be any; None: it is not known. Raises ValueError, with nothing changed, unless there
    are all moments of all weights that are trained, or none at all.
    """
    shards = Shards(folder, "moments")
    if shards.shapes or expected:
        _check_moments(shards.shapes, _moment_shapes(optimizer, weights), folder)
    for key_name, shape in shards.shapes.items():
        key, _, name = key_name.partition("/")
        weight = weights[name].detach()
        moment = torch.zeros_like(weight) if shape else torch.zeros((), device=weight.device)
        shards.read_into(moment, key_name)
        optimizer.state[weights[name]][key] = moment


def _moment_shapes(optimizer: torch.optim.Optimizer, weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    trained = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items() if id(weight) in trained}
    return {f"{key}/{name}": () if key == "step" else shape for name, shape in shapes.items() for key in MOMENTS}


def _check_moments(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    if odd := sorted(set(found.items()) ^ set(expected.items())):
        name = odd[0][0]
        raise ValueError(
            f"{folder}: moment {name!r} has shape {found.get(name)}, expected {expected.get(name)}: "
            "not whole, or made by another model"
        )


def moments(optimizer: torch.optim.Optimizer, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the optimizer's state of each weight, by "<key>/<name>"."""
    state = optimizer.state
    return {f"{key}/{name}": value for name, weight in weights.items() for key, value in state.get(weight, {}).items()}
