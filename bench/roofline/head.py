"""Predict what the fused head and `grpo_loss` take on a GPU, part by part.

The chunks are cut by the functions that cut them in the kernels, so a change there changes the prediction.

Legend: N rows, L live rows, H hidden, V vocabulary; C rows of a chunk, B rows of a block of logits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mgrpo.bench.roofline.chips import KERNEL, Chip
from mgrpo.kernels.triton.buffers import MOST_BYTES, buffer_rows, tiled_slices, whole_tiles

BF16, F32 = 2, 4
# Bytes that the row kernel has on their way on a processor, by the bytes of a logit: it loads ahead.
FLYING = {F32: 64 << 10, BF16: 48 << 10}
CROWDED = 3 / 4  # share of the L2 cache beyond which the row kernel works on one row a processor instead of two
SMALL = 15  # launches of checks, metrics and the selection of live rows, as tests/rehearsal counts them

Parts = dict[str, float]  # seconds by what takes them


@dataclass(frozen=True)
class HeadCase:
    """Describe a head and how it is computed.

    buffers: bytes of both buffers. master: dW is summed in the master, which nothing scales. parts: of the vocabulary,
    by which matmuls are cut. epilogue: the matmul itself finds the statistics and writes bf16 exponentials, so that a
    pass over them alone makes the gradient.
    """

    rows: int
    width: int
    vocabulary: int
    live: float = 1.0
    buffers: int = MOST_BYTES
    master: bool = False
    parts: int = 1
    epilogue: bool = False

    @property
    def live_rows(self) -> int:
        """The rows that reach the head."""
        return round(self.rows * self.live)


def bare(chip: Chip, case: HeadCase) -> float:
    """Return the seconds of the three matmuls over all rows, each of them one call."""
    n, h, v = case.rows, case.width, case.vocabulary
    return chip.matmul(n, v, h, out=F32) + chip.matmul(n, h, v) + chip.matmul(v, h, n, out=F32)


def head(chip: Chip, case: HeadCase) -> Parts:
    """Return the seconds of each part of the loss, forward and backward."""
    found: Parts = {}

    def add(part: str, seconds: float, times: int = 1) -> None:
        found[part] = found.get(part, 0.0) + times * seconds

    h, v = case.width, case.vocabulary
    columns = -(-v // case.parts)
    room = buffer_rows(case.buffers, v, BF16)
    size = case.buffers // (BF16 * v) if case.epilogue else room.chunk
    chunks = list(tiled_slices(case.live_rows, size))
    longest = max((s.stop - s.start for s in chunks), default=0)
    for chunk in chunks:
        c = chunk.stop - chunk.start
        for block in tiled_slices(c, c if case.epilogue else whole_tiles(min(longest, room.block))):
            b = block.stop - block.start
            add("logits", chip.matmul(b, columns, h, out=BF16 if case.epilogue else F32), case.parts)
            add("rows", chip.stream(2 * BF16 * b * v) if case.epilogue else row_pass(chip, b, v, F32))
        add("dX", chip.matmul(c, h, columns), case.parts)
        add("dW", chip.matmul(columns, h, c, out=F32, add=chunk.start > 0 or case.master), case.parts)
    if case.live_rows < case.rows:
        add("select", chip.stream(2 * BF16 * case.live_rows * h) + chip.stream(BF16 * (case.rows + case.live_rows) * h))
    scaled = [2 * BF16 * case.live_rows * h, *([] if case.master else [(F32 + BF16) * v * h])]
    add("scale", sum(chip.stream(moved) for moved in scaled))
    add("small", KERNEL, SMALL)
    return found


def row_pass(chip: Chip, rows: int, vocabulary: int, itemsize: int) -> float:
    """Return the seconds of the row kernel: two reads of the logits and one write of their gradient in bf16.

    The second read finds in the L2 cache what of the rows at work fits half of it.
    """
    row = chip.processors * vocabulary * itemsize
    at_work = 2 * row if 2 * row <= CROWDED * chip.cache else row
    kept = min(1.0, chip.cache / 2 / at_work)
    return chip.rows(rows * vocabulary * (itemsize * (2 - kept) + BF16), FLYING[itemsize])


def over_bare(chip: Chip, case: HeadCase) -> float:
    """Return the loss's time over that of the three bare matmuls of all rows."""
    return total(head(chip, case)) / bare(chip, case)


def memory(case: HeadCase) -> float:
    """Return the bytes that the loss takes beside its inputs: buffers, dX, and dW if it is not the master's."""
    dweight = 0 if case.master else F32 * case.vocabulary * case.width
    return case.buffers + BF16 * case.live_rows * case.width + dweight


def quarter(chip: Chip, case: HeadCase) -> float:
    """Return the time with a quarter of the rows live over that with all."""
    return total(head(chip, replace(case, live=0.25))) / total(head(chip, replace(case, live=1.0)))


def logits_share(chip: Chip, rows: int, vocabulary: int) -> float:
    """Return the least traffic of `grpo_loss` (4 bytes an element) at the copy bandwidth over its time."""
    return chip.stream(2 * BF16 * rows * vocabulary) / (row_pass(chip, rows, vocabulary, BF16) + SMALL * KERNEL)


def total(parts: Parts) -> float:
    """Return the sum of all parts, in seconds."""
    return sum(parts.values())
