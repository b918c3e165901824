"""Describe a set of weights by their dtypes and shapes, and compare two such descriptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# Of each weight, by name, its dtype without "torch." and its shape. JSON carries it, but turns the pairs into lists.
Manifest = Mapping[str, tuple[str, Sequence[int]]]


def manifest_of(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Manifest:
    """Describe tensors, as if they were of `dtype` if one is given."""
    return {name: (str(dtype or t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors.items()}


def misfit(expected: Manifest, given: Manifest) -> str:
    """Return "" if both are the same, otherwise a sentence about the first weight, by name, that differs."""
    for name in sorted(expected.keys() | given.keys()):
        wanted, found = _spell(expected, name, "no such weight"), _spell(given, name, "missing")
        if wanted != found:
            return f"weight {name!r} is {found}: expected {wanted}, as in the model"
    return ""


def _spell(manifest: Manifest, name: str, absent: str) -> str:
    if name not in manifest:
        return absent
    dtype, shape = manifest[name]
    return f"{dtype} {list(shape)}"
