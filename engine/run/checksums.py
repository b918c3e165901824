"""Seal a folder with a manifest of its files, their sizes and their SHA-256, and verify the folder against it.

Files of tensors have their SHA-256 beside them (run/tensor_file), computed while they were written. Other files are
hashed while the files are forced to the disk.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from mgrpo.engine.system.files import fsync

SIDECAR = ".sha256"  # added to a file's name: the file beside it that holds its SHA-256, as sha256sum prints it
MANIFEST = "manifest.json"


class FolderManifest(msgspec.Struct, forbid_unknown_fields=True):
    """List the files of a folder by their path in it: their sizes in bytes, and their SHA-256 in hex.

    sha256: None in a folder that version 0.1.0 has sealed, of which only the sizes are known.
    """

    files: dict[str, int]
    sha256: dict[str, str] | None = None


def seal(folder: Path) -> None:
    """Add the manifest, and force every file and directory to the disk."""
    manifest = folder / MANIFEST
    assert not manifest.exists()
    files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
    with _hashers() as pool:
        hashes = pool.map(_known_or_hashed, files.values())
        for file in files.values():
            fsync(file)
        sha256 = dict(zip(files, hashes, strict=True))
    found = FolderManifest({name: file.stat().st_size for name, file in files.items()}, sha256)
    manifest.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1))
    for entry in [manifest, *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        fsync(entry)


def verify(folder: Path) -> None:
    """Compare the files of a folder with its manifest.

    Raises ValueError, which calls the folder a checkpoint and names the file, if one is missing or has another size or
    SHA-256, or if the manifest itself is missing or damaged.
    """
    manifest = _read(folder)
    for name, expected in manifest.files.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != expected:
            found = "it is missing" if size is None else f"it has {size}"
            raise ValueError(f"checkpoint {folder}: expected {name} to have {expected} bytes, {found}")
    if manifest.sha256 is not None:
        _compare(folder, manifest.files, manifest.sha256)


def verify_sidecars(files: Iterable[Path]) -> None:
    """Compare files of tensors with the SHA-256 beside each, where there is one. Raises ValueError naming the file."""
    known = {file: beside for file in files if (beside := _sidecar(file)).is_file()}
    found = dict(zip(known, sha256_of(known), strict=True))
    for file, beside in known.items():
        expected = beside.read_text().partition(" ")[0]
        if found[file] != expected:
            raise ValueError(f"{file} is damaged: expected SHA-256 {expected}, it has {found[file]}")


def sha256_of(files: Iterable[Path]) -> list[str]:
    """Return the SHA-256 of each file, in hex; several are hashed at a time."""
    with _hashers() as pool:
        return list(pool.map(_sha256, files))


def _compare(folder: Path, names: Iterable[str], expected: dict[str, str]) -> None:
    found = dict(zip(names, sha256_of([folder / name for name in names]), strict=True))
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"checkpoint {folder}: {name} is damaged: expected SHA-256 {expected.get(name)}, "
                f"it has {found.get(name)}"
            )


def _read(folder: Path) -> FolderManifest:
    file = folder / MANIFEST
    try:
        return msgspec.json.decode(file.read_bytes(), type=FolderManifest)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"checkpoint {folder}: expected a whole checkpoint, {MANIFEST} is missing") from None
    except msgspec.DecodeError as error:
        size = file.stat().st_size
        raise ValueError(f"checkpoint {folder}: {MANIFEST} is damaged ({size} bytes): {error}") from error


def _hashers() -> ThreadPoolExecutor:
    """Return threads to hash files with; hashing leaves Python's lock to others."""
    return ThreadPoolExecutor(os.cpu_count(), "sha256")


def _known_or_hashed(path: Path) -> str:
    """Return a file's SHA-256, as its writer computed it or as it is now."""
    beside = _sidecar(path)
    return beside.read_text().split()[0] if beside.is_file() else _sha256(path)


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + SIDECAR)


def _sha256(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
