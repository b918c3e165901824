"""Describe GPUs by a few numbers, each with its source, and predict what one matmul or one pass over memory takes.

A matmul takes the longer of two times, and a part of the shorter. The tensor cores work tile by tile: whole waves of
tiles over the processors, and each tile waits once for its first operands and once for its results. Memory moves every
operand once, as if the tiles' order reused all of them in the L2 cache. Everything else is a pass over memory.

Legend: M, N rows and columns of a product, K the length of its sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

TILE = (128, 256)  # of a product, by one processor at a time: what cuBLAS takes for large bf16 matmuls on an H100
SPLITS = (1, 2, 3, 4, 6, 8)  # parts of K that different processors may sum, where there are too few tiles
# Seconds that a tile waits. OpenXLA's table of measured matmuls (xla/service/gpu/model/matmul_interpolator_data.h)
# gives it for an H100: 2048 x 4096 products, four at a time, ran at 607 TFLOP/s with K = 512 and at 752 with K = 2048.
FILL = 1.6e-6
# Share of the shorter of a matmul's two times that the longer one does not hide. Assumed; of all numbers here the one
# that `bench/gpu.sh check` will change most ("matmuls").
EXPOSED = 0.1
# Share of the memory's nominal bandwidth that a good pass reaches: quack's row kernels, 3.0 TB/s of an H100's 3.35.
STREAM = 0.9
# Seconds from the end of one kernel to the full speed of the next, and that the host needs for one in eager torch.
# Assumed: 2 us and 5 us are usual figures of torch's profiler.
KERNEL, HOST = 2e-6, 5e-6


@dataclass(frozen=True)
class Chip:
    """Hold one GPU: sustained bf16 flop/s between the waits, nominal bytes/s, bytes of L2, processors, s of a load.

    attention: flop/s of flash attention's forward and backward as torch has them.
    """

    name: str
    rate: float
    bandwidth: float
    cache: int
    processors: int
    latency: float
    attention: tuple[float, float]

    def stream(self, moved: float) -> float:
        """Return the seconds of a pass that moves so many bytes with enough of them on their way."""
        return KERNEL + moved / (STREAM * self.bandwidth)

    def rows(self, moved: float, flying: int) -> float:
        """Return the seconds of a pass whose processors each have so many bytes on their way (Little's law)."""
        return KERNEL + moved / min(STREAM * self.bandwidth, self.processors * flying / self.latency)

    def matmul(self, m: int, n: int, k: int, *, out: int = 2, add: bool = False) -> float:
        """Return the seconds of a bf16 product of which `out` bytes an element are written, and read too with `add`."""
        return KERNEL + min(self._split(m, n, k, out * (2 if add else 1), parts) for parts in SPLITS)

    def _split(self, m: int, n: int, k: int, out: int, parts: int) -> float:
        """Return the seconds if K is cut into parts, whose sums are written in float32 and then added."""
        (short, long), (high, wide) = TILE, sorted((m, n))
        tiles = math.ceil(high / short) * math.ceil(wide / long) * parts
        tile = 2 * short * long * math.ceil(k / parts) / (self.rate / self.processors) + FILL
        moved = 2 * k * (m + n) + m * n * (out + (8 * parts if parts > 1 else 0))
        times = math.ceil(tiles / self.processors) * tile, moved / (STREAM * self.bandwidth)
        return max(times) + EXPOSED * min(times)


# Rates: an H100's three bare matmuls of the head at N=8192 H=4096 V=151936 sustain 728 TFLOP/s with cuBLAS, waits
# included; in OpenXLA's table, short runs of 4096 x 4096 products reach 783 on an H100 and 1417 on a B200 (K = 4096;
# 1278 with K = 2048). An H200 has an H100's processors; quack's chunked loss reports 730 to 810 on it.
# Bandwidth, L2 and processors: NVIDIA's data sheets. Latency: 0.7 us for an H100's memory under load, assumed, and 0.9
# for a B200's, whose two dies share it. Attention: FlashAttention-2, which torch has, reaches 35 % of an H100's 989
# TFLOP/s (FlashAttention-3, arXiv 2407.08608), its backward a fifth less; on a B200 assumed the same per processor.
H100 = Chip("H100 SXM", 760e12, 3.35e12, 50 << 20, 132, 0.7e-6, (350e12, 280e12))
H200 = Chip("H200", 790e12, 4.8e12, 50 << 20, 132, 0.7e-6, (350e12, 280e12))
B200 = Chip("B200", 1590e12, 8.0e12, 126 << 20, 148, 0.9e-6, (390e12, 310e12))
CHIPS = (H100, H200, B200)
