"""Write a model's directory as transformers and vLLM read it, from weights that come one after the other.

Everything but the weights (config, tokenizer, chat template) is copied from the directory that the model was loaded
from. The weights get the names that they have there, which for some kinds (experts, parts of composite models) are not
those of the modules in memory. What a trainer does not hold, such as buffers, is copied too.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from mgrpo.engine.config.schema import AgentConfig
from mgrpo.engine.model.composite import auto_class
from mgrpo.engine.model.directory import code_settings

SHARD = 5 << 30  # bytes of a file of weights, as transformers writes them
WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx|ot)(\.index\.json)?")
LAYER = re.compile(r".*?\.\d+(?=\.)")  # the part of a weight's name that says in which layer it is
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Read = Callable[[str], Tensor]


def write_pretrained(
    out: Path, agent: AgentConfig, names: Sequence[str], read: Read, dtype: str, shard_bytes: int = SHARD
) -> int:
    """Fill the empty directory `out` with a model that `from_pretrained` and vLLM load; return the bytes of weights.

    agent: says from which directory the model was loaded. names: of its parameters in memory, a tied head left out.
    read: returns a whole parameter by its name, on the CPU; at most one file's worth of them is held at a time. dtype:
    "float32", "bfloat16" or "float16". Raises ValueError if the directory is now another model's, or names its
    weights as transformers would not write them.
    """
    base, settings = Path(agent.model), code_settings(agent)
    config = AutoConfig.from_pretrained(base, **settings)
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(config).from_config(config, trust_remote_code=settings["trust_remote_code"])
    if odd := sorted(set(names) ^ set(dict(model.named_parameters()))):
        raise ValueError(f"{base}: expected the model that was trained, they differ in the weight {odd[0]!r}")
    for path in base.iterdir():
        if path.is_file() and not WEIGHTS.fullmatch(path.name) and path.name != "README.md":
            shutil.copyfile(path, out / path.name)
    _set_dtype(out / "config.json", dtype)
    files = _Files(out, shard_bytes)
    for name, tensor in _converted(model, names, read, DTYPES[dtype]):
        files.add(name, tensor)
    _add_untrained(files, base, model)
    return files.close()


def _converted(
    model: PreTrainedModel, names: Sequence[str], read: Read, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights under the names that they have in a directory, reading one layer at a time."""
    for _, layer in groupby(sorted(names, key=_layer), key=_layer):
        yield from revert_weight_conversion(model, {name: read(name).to(dtype) for name in layer}).items()


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
        self._last = 1

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a weight; what is held is written first if it would grow beyond a file's size."""
        if self._held and _bytes(self._held) + _bytes({name: tensor}) > self.limit:
            self._write()
            self._last += 1
        self._held[name] = tensor.contiguous()
        self.where[name] = self._last
        self.size += _bytes({name: tensor})

    def close(self) -> int:
        """Write the rest, give the files their names, write the index if there are several; return all bytes."""
        self._write()
        for number in range(1, self._last + 1):
            self._aside(number).rename(self.out / self._name(number))
        if self._last > 1:
            weight_map = {name: self._name(number) for name, number in sorted(self.where.items())}
            index = {"metadata": {"total_size": self.size}, "weight_map": weight_map}
            (self.out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        return self.size

    def _write(self) -> None:
        save_file(self._held, self._aside(self._last), metadata={"format": "pt"})
        self._held = {}

    def _aside(self, number: int) -> Path:
        return self.out / f".tmp-{number}"

    def _name(self, number: int) -> str:
        return "model.safetensors" if self._last == 1 else f"model-{number:05}-of-{self._last:05}.safetensors"


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
