"""Decide how many rows of logits and of their gradient the fused head holds on a GPU at a time.

A second buffer twice as large halves the passes over dW, each of which reads and writes all of it in float32. So the
buffers follow the memory that is free, up to where `mgrpo bench roofline` sees nothing more to gain. Unlike the usual
fixed chunk they then depend on the machine, and so does the order of dW's float32 sums, by rounding alone. With torch's
deterministic algorithms, and on ranks that share a vocabulary and must cut alike, the buffers have their least size.

This module needs no triton.
"""

import math
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch

from ..linear_head import HeadPlan, slices

# Bytes of float32 logits and of bf16 gradients, at least: 256 and 768 rows of a vocabulary of 151936. With the float32
# dW of a width of 4096 and dX of 8192 rows that is just below 3 GB.
LOGITS_BYTES = 5 << 25
GRADIENT_BYTES = 15 << 24
LEAST_BYTES = LOGITS_BYTES + GRADIENT_BYTES
# With this, the head of 8192 rows above takes two passes over dW, in 5.6 GB.
MOST_BYTES = 7 * LEAST_BYTES
# The part of the free memory to take: other micro-batches keep more activations than the one at which it is measured.
SHARE = 1 / 4
# Rows of a matmul's tile: a slice with one row more costs as much as one of two tiles.
TILE_ROWS = 128


class BufferRows(NamedTuple):
    """Say how many rows the buffers hold: chunks of the gradient, and the blocks of logits that they are made of."""

    chunk: int
    block: int


def whole_tiles(rows: int) -> int:
    """Round the rows down to whole tiles of a matmul, unless there is no room for one."""
    return rows // TILE_ROWS * TILE_ROWS or max(1, rows)


def tiled_slices(total: int, size: int) -> Iterator[slice]:
    """Cut range(total) into slices of at most `size`: of about equal length, and of whole tiles except the last."""
    size = whole_tiles(size)
    even = math.ceil(total / max(1, math.ceil(total / size)))
    return slices(total, min(size, max(1, math.ceil(even / TILE_ROWS)) * TILE_ROWS))


def buffer_rows(size: int, vocabulary: int, itemsize: int) -> BufferRows:
    """Divide `size` bytes over both buffers in the proportion of their least sizes.

    vocabulary: columns of both. itemsize: bytes of an element of the gradient.
    """
    gradient = size * GRADIENT_BYTES // LEAST_BYTES
    return BufferRows(gradient // (vocabulary * itemsize), (size - gradient) // (4 * vocabulary))


def plan_buffers(plan: HeadPlan, vocabulary: int, device: torch.device) -> BufferRows:
    """Return the rows of the buffers for a sweep of the plan over logits with so many columns on the widest rank."""
    size = buffer_bytes(plan, vocabulary, device)
    rows = buffer_rows(size, vocabulary, plan.matmul_dtype.itemsize)
    return BufferRows(plan.chunk_rows or rows.chunk, rows.block)


def buffer_bytes(plan: HeadPlan, vocabulary: int, device: torch.device) -> int:
    """Return the bytes of both buffers: the plan's cap, or less if that much is not free, or fixed."""
    fixed = plan.shard is not None or torch.are_deterministic_algorithms_enabled() or device.type != "cuda"
    size = LEAST_BYTES if fixed else _sized(free_once(device, vocabulary, plan.matmul_dtype))
    return size if plan.buffer_bytes is None else min(size, plan.buffer_bytes)


def _sized(free: int) -> int:
    return max(LEAST_BYTES, min(MOST_BYTES, int(SHARE * free)))


@cache
def free_once(device: torch.device, vocabulary: int, dtype: torch.dtype) -> int:
    """Return the bytes that torch could still give out, measured at the first call for each head.

    Measuring again would make a step's rounding depend on what else is in memory, and would ask the driver every time.
    """
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + unused)
