"""Write tensors as a safetensors file, tensor by tensor, while other threads hash the bytes and force them to the disk.

The library's writer cannot say what it wrote; to hash its file afterwards would take about as long as to write it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from mgrpo.engine.run.checksums import SIDECAR
from mgrpo.engine.system.files import write_all

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
FORCE = 32 << 20  # bytes written before they are forced to the disk


class Forced:
    """Write to a file, and force its bytes to the disk meanwhile, so that little is left to wait for at the end."""

    def __init__(self, file: io.FileIO) -> None:
        self.file, self.waiting = file, 0
        self.disk, self.forced = ThreadPoolExecutor(1), list[Future[None]]()

    def __enter__(self) -> Forced:
        return self

    def write(self, data: memoryview | bytes) -> int:
        """Write to the file, and begin to force what was written if that is much by now."""
        written = self.file.write(data)
        self.waiting += written
        if self.waiting >= FORCE:
            self.forced.append(self.disk.submit(os.fsync, self.file))
            self.waiting = 0
        return written

    def __exit__(self, *_: object) -> None:
        self.disk.shutdown()
        for forced in self.forced:  # the system reports an error once: the last fsync may not get it
            forced.result()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, and its SHA-256 into a file beside it.

    Raises ValueError for a dtype that is not in DTYPES; OSError if the disk is full.
    """
    checksum = write_hashed(path, tensors)
    path.with_name(path.name + SIDECAR).write_text(f"{checksum}  {path.name}\n")


def write_hashed(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file and return the SHA-256 of its bytes, in hex. Tensors on the CPU are not copied.

    metadata: of the file, for its header. Raises ValueError for a dtype that is not in DTYPES; OSError if the disk is
    full.
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])))  # so all are aligned
    digest = hashlib.sha256()
    with ThreadPoolExecutor(1) as hasher, path.open("wb", buffering=0) as file, Forced(file) as forced:
        for data in chain([header(ordered, (",", ":"), metadata)], map(tensor_bytes, ordered.values())):
            hashed = hasher.submit(digest.update, data)
            write_all(forced, data)
            hashed.result()
    return digest.hexdigest()


def header(
    tensors: Mapping[str, Tensor],
    separators: tuple[str, str] = (", ", ": "),
    metadata: Mapping[str, str] | None = None,
) -> memoryview:
    """Return the header: its length in 8 bytes, then JSON, padded with spaces to a multiple of 8 bytes.

    separators: of the JSON; (",", ":") as the library writes it. metadata: texts by name that readers may ask for.
    Raises ValueError for a dtype that is not in DTYPES.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"weights: {name!r} is {tensor.dtype}: expected one of {list(DTYPES)}")
        end = begin + tensor.numel() * tensor.itemsize
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=separators).encode()
    text += b" " * (-len(text) % 8)
    return memoryview(len(text).to_bytes(8, "little") + text)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, not copied if it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
