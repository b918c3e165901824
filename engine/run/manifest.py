"""Describe one version of an agent's weights: what it is, and of which files it consists.

One manifest serves every way to publish a version: a whole model or an adapter to one, in one file or in shards, each
of which is a `Published` file. What a running training publishes is a single one, which its store keeps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from mgrpo.engine.run.checksums import sha256_of
from mgrpo.engine.run.weights import Published
from mgrpo.engine.system.files import fsync

VERSION = "mgrpo.json"  # the manifest's file, beside the shards


class VersionManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Name a version: `agent` after `step` optimizer steps of a stage, and the shards that hold its weights.

    kind: "model" for whole weights, "adapter" for what is added to those of `base`. base: the model that it began as.
    stage: "warmup" or "rl"; "" for a policy without a run. dtype: of the weights, without "torch.".
    """

    kind: Literal["model", "adapter"]
    agent: str
    stage: str
    step: int
    base: str
    dtype: str
    shards: list[Published]  # in JSON each is [file, SHA-256, bytes]

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards)


def write_manifest(folder: Path, manifest: VersionManifest) -> None:
    """Write the manifest beside the shards, and force it to the disk."""
    (folder / VERSION).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")
    fsync(folder / VERSION)


def read_manifest(folder: Path) -> VersionManifest:
    """Read what `write_manifest` wrote. Raises ValueError naming the file if it is missing or damaged."""
    file = folder / VERSION
    try:
        return msgspec.json.decode(file.read_bytes(), type=VersionManifest)
    except FileNotFoundError:
        raise ValueError(f"{file} is missing: expected a directory that `mgrpo export` wrote") from None
    except msgspec.DecodeError as error:
        raise ValueError(f"{file} is damaged, or of another version of mgrpo: {error}") from error


def verify_version(folder: Path) -> VersionManifest:
    """Compare the shards of a folder with its manifest, which is returned.

    Raises ValueError naming the file if one is missing, has another size or SHA-256, or lies outside of the folder.
    """
    manifest = read_manifest(folder)
    files = [folder / shard.file for shard in manifest.shards]
    for file, shard in zip(files, manifest.shards, strict=True):
        if Path(shard.file).name != shard.file:
            raise ValueError(f"{folder / VERSION}: shard {shard.file!r} given: expected a file in that folder")
        size = file.stat().st_size if file.is_file() else None
        if size != shard.size:
            has = "it is missing" if size is None else f"it has {size}"
            raise ValueError(f"{file}: expected {shard.size} bytes, {has}")
    for shard, found in zip(manifest.shards, sha256_of(files), strict=True):
        if found != shard.checksum:
            raise ValueError(f"{folder / shard.file} is damaged: expected SHA-256 {shard.checksum}, it has {found}")
    return manifest
