# mypy: allow-untyped-defs, allow-incomplete-defs
"""Multiply a gradient by a number on the GPU, in place and in one launch, which touches nothing if the number is 1."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a program and of a step of it: 16 bytes a thread and step in bf16, and few programs where nothing is done.
EACH, BLOCK, WARPS = 1 << 16, 2048, 8


@triton.jit
def scale_kernel(values_X, factor, count, EACH: tl.constexpr, BLOCK: tl.constexpr):
    """Multiply EACH values by the number at `factor`, in float32, and round once."""
    by = tl.load(factor).to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * EACH
    for step in range(0, tl.where(by == 1, 0, EACH), BLOCK):
        at_B = first + step + tl.arange(0, BLOCK)
        value_B = tl.load(values_X + at_B, mask=at_B < count).to(tl.float32)
        tl.store(values_X + at_B, (value_B * by).to(values_X.dtype.element_ty), mask=at_B < count)


def scale(values_X: Tensor, factor: Tensor) -> None:
    """Multiply contiguous values by a 0-dim number on their device; the host does not wait for it."""
    count = values_X.numel()
    if count:
        with torch.cuda.device_of(values_X):
            scale_kernel[(triton.cdiv(count, EACH),)](
                values_X, factor, count, EACH=EACH, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True
            )
