"""Write a model's directory as transformers and vLLM read it, from weights that come one after the other.

Everything but the weights (config, tokenizer, chat template) is copied from the directory that the model was loaded
from. The weights get the names that they have there, which for some kinds (experts, parts of composite models) are not
those of the modules in memory. What a trainer does not hold, such as buffers, is copied too.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from errno import EDQUOT, EFBIG, ENOSPC
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from mgrpo.engine.config.schema import AgentConfig
from mgrpo.engine.model.composite import auto_class
from mgrpo.engine.model.directory import code_settings
from mgrpo.engine.run.manifest import VERSION
from mgrpo.engine.run.tensor_file import write_hashed
from mgrpo.engine.run.weights import Published
from mgrpo.engine.system.files import fsync

SHARD = 5 << 30  # bytes of a file of weights, as transformers writes them
INDEX = "model.safetensors.index.json"
OWN = ("README.md", VERSION)  # about the model that it was: not copied
FULL = (ENOSPC, EDQUOT, EFBIG)  # what the system says when a disk, or a share of it, is full
WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx|ot)(\.index\.json)?")
LAYER = re.compile(r".*?\.\d+(?=\.)")  # the part of a weight's name that says in which layer it is
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Read = Callable[[str], Tensor]


def base_name(agent: AgentConfig) -> str:
    """Return by what name others know the model that an agent began as: its id on a hub, or its directory's name."""
    return agent.model if agent.on_hub else Path(agent.model).name


def require_dtype(key: str, dtype: str) -> None:
    """Raise ValueError naming the key if there is no such dtype of weights."""
    if dtype not in DTYPES:
        raise ValueError(f"{key}: {dtype!r} given: expected one of {list(DTYPES)}")


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yield an empty directory that gets the name `out` at the end; after an error nothing is left of it.

    Raises ValueError if `out` is there already; OSError naming it if the disk is full.
    """
    if out.exists():
        raise ValueError(f"{out} exists: expected the name of a new directory")
    aside = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(aside, ignore_errors=True)  # left by a process that was killed
    try:
        aside.mkdir(parents=True)
        yield aside
        for path in (*aside.iterdir(), aside):
            fsync(path)
        aside.rename(out)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(error.errno, f"cannot write the model: {error.strerror}", str(out)) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_pretrained(
    out: Path,
    base: Path,
    agent: AgentConfig,
    names: Sequence[str],
    read: Read,
    dtype: str,
    shard_bytes: int = SHARD,
) -> list[Published]:
    """Fill the empty directory `out` with a model that `from_pretrained` and vLLM load; return the files of weights.

    base: the directory from which the model was loaded, under the agent's settings. names: of its parameters in memory,
    a tied head left out. read: returns a whole parameter by its name, on the CPU; it is called in `reading_order`, and
    at most `shard_bytes` are held at a time, or two layers if that is more. dtype: a key of DTYPES. Raises ValueError
    if the directory is now another model's, or names its weights as transformers would not write them; OSError if they
    do not fit the disk.
    """
    settings = code_settings(agent)
    config = AutoConfig.from_pretrained(base, **settings)
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(config).from_config(config, trust_remote_code=settings["trust_remote_code"])
    if odd := sorted(set(names) ^ set(dict(model.named_parameters()))):
        raise ValueError(f"{base}: expected the model that was trained, they differ in the weight {odd[0]!r}")
    for path in base.iterdir():
        if path.is_file() and not WEIGHTS.fullmatch(path.name) and path.name not in OWN:
            shutil.copyfile(path, out / path.name)
    files = _trained_files(out, model, read, dtype, shard_bytes)
    _add_untrained(files, base, model)
    return files.close()


def write_made(
    out: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    read: Read,
    dtype: str,
    shard_bytes: int = SHARD,
) -> list[Published]:
    """Fill the empty directory `out` as `write_pretrained` does, from a model that a caller made."""
    for part in (model.config, model.generation_config, tokenizer):
        if part is not None:
            part.save_pretrained(out)
    files = _trained_files(out, model, read, dtype, shard_bytes)
    saved = model.state_dict().keys()
    buffers = {name: buffer.cpu() for name, buffer in model.named_buffers() if name in saved}
    for name, buffer in revert_weight_conversion(model, buffers).items():
        files.add(name, buffer)
    return files.close()


def reading_order(names: Iterable[str]) -> list[str]:
    """Return the order in which the parameters are read: layer after layer."""
    return sorted(names, key=_layer)


def _trained_files(out: Path, model: PreTrainedModel, read: Read, dtype: str, shard_bytes: int) -> _Files:
    """Write the parameters under the names that they have in a directory, reading one layer at a time."""
    params = dict(model.named_parameters())
    _require_room(out, sum(param.numel() for param in params.values()) * DTYPES[dtype].itemsize)
    _set_dtype(out / "config.json", dtype)
    files = _Files(out, shard_bytes)
    for _, layer in groupby(reading_order(params), key=_layer):
        names = list(layer)
        files.make_room(2 * 4 * sum(params[name].numel() for name in names))  # in float32, and once more to convert
        for name, tensor in revert_weight_conversion(
            model, {name: read(name).to(DTYPES[dtype]) for name in names}
        ).items():
            files.add(name, tensor)
    return files


def _require_room(out: Path, size: int) -> None:
    free = shutil.disk_usage(out).free
    if free < size:
        raise OSError(ENOSPC, f"cannot write the model: it takes {size:,} bytes, {free:,} are free", str(out.parent))


def _layer(name: str) -> str:
    found = LAYER.match(name)
    return found[0] if found else name


def _add_untrained(files: _Files, base: Path, model: PreTrainedModel) -> None:
    """Add what base has and the trainer does not hold: buffers, layers that no forward uses. A tied head is left out.

    Raises ValueError if a weight was written that base has not under this name.
    """
    found = {name: path for path in sorted(base.glob("*.safetensors")) for name in _names(path)}
    if not found:
        return  # pickles only: they are not read here
    if strange := sorted(files.where.keys() - found.keys() - _tied(model)):
        raise ValueError(f"{base}: has no weights named {strange[:3]}: expected those of the model that was trained")
    for name in sorted(found.keys() - files.where.keys() - _tied(model)):
        with safe_open(found[name], "pt") as file:
            files.add(name, file.get_tensor(name))


def _tied(model: PreTrainedModel) -> set[str]:
    """Return the weights that are others under a second name, as a directory names them."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return set(revert_weight_conversion(model, {name: torch.empty(0) for name in tied}))


def _names(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


class _Files:
    """Write weights to files of a bounded size, and the index that says where each of them lies."""

    def __init__(self, out: Path, limit: int) -> None:
        self.out, self.limit, self.size = out, limit, 0
        self.where: dict[str, int] = {}  # the number of the file, from 1, by name
        self._held: dict[str, Tensor] = {}
        self._sums: list[str] = []  # SHA-256 of each file that was written

    def make_room(self, size: int) -> None:
        """Write what is held if it would be more than a file together with so many more bytes."""
        if self._held and _bytes(self._held) + size > self.limit:
            self._write()

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a weight; what is held is written first if it would grow beyond a file's size."""
        self.make_room(_bytes({name: tensor}))
        self._held[name] = tensor.contiguous()
        self.where[name] = len(self._sums) + 1
        self.size += _bytes({name: tensor})

    def close(self) -> list[Published]:
        """Write the rest, give the files their names, write the index if there are several; return the files."""
        self._write()
        files = [self.out / self._name(number) for number in range(1, len(self._sums) + 1)]
        for number, file in enumerate(files, 1):
            self._aside(number).rename(file)
        if len(files) > 1:
            weight_map = {name: files[number - 1].name for name, number in sorted(self.where.items())}
            _write_json(self.out / INDEX, {"metadata": {"total_size": self.size}, "weight_map": weight_map})
        return [Published(file.name, found, file.stat().st_size) for file, found in zip(files, self._sums, strict=True)]

    def _write(self) -> None:
        self._sums.append(write_hashed(self._aside(len(self._sums) + 1), self._held, {"format": "pt"}))
        self._held = {}

    def _aside(self, number: int) -> Path:
        return self.out / f".tmp-{number}"

    def _name(self, number: int) -> str:
        last = len(self._sums)
        return "model.safetensors" if last == 1 else f"model-{number:05}-of-{last:05}.safetensors"


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())


def _set_dtype(path: Path, dtype: str) -> None:
    """Say in a config, and in those of its parts, in which dtype the weights are."""
    config = json.loads(path.read_text())
    for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = dtype
    if "dtype" not in config and "torch_dtype" not in config:
        config["dtype"] = dtype
    _write_json(path, config)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
