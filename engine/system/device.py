"""Send numbers to the device without waiting for it; measure how fast it computes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor


def send(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Return arrays of one dimension and one dtype as tensors on a device, by one copy that the host does not await."""
    packed = torch.tensor(np.concatenate(arrays))
    if device.type == "cuda":  # from pageable memory the host would wait for all that the GPU has to do before
        packed = packed.pin_memory().to(device, non_blocking=True)
    return list(packed.split([len(array) for array in arrays]))


@cache
def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the flop/s of large matrix products, the best of five. MFU is the share of this ceiling that is used."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return max(_rate(a, b) for _ in range(5))


def _rate(a: torch.Tensor, b: torch.Tensor) -> float:
    started = time.perf_counter()
    product = a @ b
    product[0, 0].item()  # waits for the device
    return float(2 * len(a) ** 3 / (time.perf_counter() - started))
