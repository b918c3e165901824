"""Decide which tensors the Triton kernels take; all others go through plain PyTorch, which is the definition."""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

# Tests that run under TRITON_INTERPRET=1 set this; the kernels then take CPU tensors too.
interpreted = False


def takes_kernels(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Return whether Triton handles this tensor in that dtype: on a GPU, except in float64."""
    return dtype != torch.float64 and (interpreted or (tensor.is_cuda and _has_triton()))


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def triton_module(name: str) -> Any:
    """Import and return a module of `triton/`, at first use: triton takes half a second, and a CPU does not need it."""
    return import_module(f".triton.{name}", __package__)
