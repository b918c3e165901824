"""Measure how fast the device computes."""

from __future__ import annotations

import time
from functools import cache

import torch


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
