"""Publish weights, from a trainer to the samplers of its agent, as one safetensors file per version, and check them.

Unlike the library's writer, we write the format ourselves (the length of the header, a JSON header, the bytes of the
tensors), tensor by tensor, directly from the CPU's memory, so that one thread hashes the bytes while another writes
them, and no further copy is made. A file gets its name only when it is whole: on a file system it is written aside,
forced to the disk and renamed; in an object store it is one upload. The library reads it, after its size and SHA-256
have been compared with those in the store.

The *probe*: trainer and sampler both compute the log-probs of a prompt that follows from the run's seed. Weights that
arrived incomplete, stale or in the wrong places show as a gap that rounding cannot explain.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from mgrpo.engine.run.tensor_file import Forced, header, tensor_bytes
from mgrpo.engine.run.trajectories import below, listing
from mgrpo.engine.system.files import replacing, write_all
from mgrpo.engine.system.remote import file_system, reaching

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NEWEST = 2  # newest files of an agent, always kept: a worker may still be reading the one before the newest
PROBE_TOKENS = 32
PROBE_SEED = 1 << 34  # separates the probe from everything else that is drawn from the run's seed


class GapError(RuntimeError):
    """Report that a sampler's log-probs are not those of the trainer whose weights it loaded."""


class DamagedWeightsError(ValueError):
    """Report that a file does not hold the bytes that were published: torn, altered, or not yet visible as a whole."""


class Published(NamedTuple):
    """Identify a published file. file: relative to the root; checksum: SHA-256 of its bytes, in hex; size: in bytes."""

    file: str
    checksum: str
    size: int


def publish_weights(root: str, agent: str, version: int, tensors: Mapping[str, Tensor]) -> Published:
    """Write `<root>/<agent>/v<version>-<8 hex>.safetensors`, whole or not at all.

    root: local path or fsspec URL. tensors: unsharded, of float32, bfloat16 or float16; copied first if they are not
    contiguous or not on the CPU. Raises ValueError for another dtype; OSError naming the file if it cannot be written:
    then there is no file.
    """
    fs, directory = file_system(root)
    name = f"{agent}/v{version}-{secrets.token_hex(4)}.safetensors"
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"weights: {key!r} is {tensor.dtype}: expected one of {list(DTYPES)}")
    parts = [header(tensors), *map(tensor_bytes, tensors.values())]
    try:
        fs.makedirs(f"{directory}/{agent}", exist_ok=True)
        with ThreadPoolExecutor(1) as hasher, _whole_file(fs, f"{directory}/{name}") as file:
            checksum = hasher.submit(_sha256, parts)
            for part in parts:
                write_all(file, part)
    except OSError as error:
        raise OSError(error.errno, f"cannot write weights: {error.strerror or error}", f"{root}/{name}") from error
    return Published(name, checksum.result(), sum(map(len, parts)))


def checksum_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the checksum of the file that `publish_weights` would write."""
    return _sha256([header(tensors), *map(tensor_bytes, tensors.values())])


def load_weights(root: str, file: str, checksum: str, size: int) -> dict[str, Tensor]:
    """Load the tensors of a published file, on the CPU.

    Raises DamagedWeightsError if the file has another size or checksum, or is not in the safetensors format;
    FileNotFoundError if it is gone; ValueError if it is outside the root.
    """
    fs, directory = file_system(root)
    data = fs.cat_file(below(directory, file))
    if len(data) != size:
        raise DamagedWeightsError(f"weights {file}: expected {size} bytes, it has {len(data)}")
    found = _sha256([data])
    if found != checksum:
        raise DamagedWeightsError(f"weights {file}: expected SHA-256 {checksum}, it has {found}")
    try:
        return load(data)
    except SafetensorError as error:
        raise DamagedWeightsError(f"weights {file}: not in the safetensors format: {error}") from error


def remove_old(root: str, agent: str, named: Collection[str]) -> list[str]:
    """Delete an agent's files, except those `named` and the NEWEST ones, and return the deleted files.

    Files that a killed writer left are deleted too, so only the one trainer that acts for the agent may call this.
    """
    fs, directory = file_system(root)
    written = {path: fs.modified(path) for path in listing(fs, f"{directory}/{agent}")}
    whole = [path for path in written if re.fullmatch(r"v\d+-[0-9a-f]{8}\.safetensors", os.path.basename(path))]
    kept = set(sorted(whole, key=lambda path: written[path])[-NEWEST:]) | {f"{directory}/{name}" for name in named}
    old = sorted(written.keys() - kept)
    for path in old:
        fs.rm_file(path)
    return [f"{agent}/{os.path.basename(path)}" for path in old]


def probe_tokens(seed: int, vocabulary: int, context: int) -> list[int]:
    """Draw the prompt of the probe: PROBE_TOKENS ids below `vocabulary`, but at most `context`."""
    return np.random.default_rng([seed, PROBE_SEED]).integers(vocabulary, size=min(PROBE_TOKENS, context)).tolist()


def check_probe(agent: str, version: int, trainer: Sequence[float], sampler: Sequence[float], limit: float) -> float:
    """Return the mean absolute difference of two lists of log-probs, in nats. Raises GapError if it exceeds `limit`."""
    assert len(trainer) == len(sampler) > 0, (len(trainer), len(sampler))
    gap = float(np.abs(np.subtract(trainer, sampler)).mean())
    if not gap <= limit:  # also true if the gap is NaN
        raise GapError(
            f"agents.{agent}: with version {version} of the weights the sampler's log-probs differ from the trainer's "
            f"by {gap:.3g} nats a token: expected at most sampling.max_gap = {limit}"
        )
    return gap


def _sha256(parts: Iterable[bytes | memoryview]) -> str:
    """Return the SHA-256 of all parts together, in hex. Other threads can run while it is computed."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part)
    return hashed.hexdigest()


@contextmanager
def _whole_file(fs: Any, path: str) -> Iterator[Any]:
    """Open a file for writing, which appears under its name only if everything succeeded."""
    if not isinstance(fs, LocalFileSystem):
        with reaching(path), fs.transaction, fs.open(path, "wb") as file:
            yield file
        return
    with replacing(Path(path)) as aside, open(aside, "wb", buffering=0) as file:
        with Forced(file) as forced:
            yield forced
        os.fsync(file)
