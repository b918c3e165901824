"""Scale a gradient and round it to its tensor's dtype in place, so that no second copy of it is ever in memory.

Unlike the usual `(gradient * scale).to(dtype)`, the result fills the front of the gradient's own storage. The price:
that storage lives as long as the result, and where a bfloat16 gradient is made of a float32 one it is twice as large.
"""

import torch
from torch import Tensor

from .dispatch import takes_kernels, triton_module

# Elements scaled first: enough to fill a GPU, few enough for a temporary tensor.
AT_ONCE = 1 << 22


@torch.no_grad()
def scale_in_place(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient * scale, rounded once to `dtype`, which must be no wider than the gradient's; overwrite that.

    gradient: contiguous, unless it keeps its dtype. scale: 0-dim, on the same device; the host does not wait for its
    value. On a GPU a scale of 1 leaves a contiguous gradient that keeps its dtype untouched: the kernel reads it.
    """
    keeps, contiguous = dtype == gradient.dtype, gradient.is_contiguous()
    if keeps and contiguous and takes_kernels(gradient, dtype):
        triton_module("scale").scale(gradient, scale)
        return gradient
    if keeps and not contiguous:
        return torch.mul(gradient, scale.reshape([1] * gradient.ndim), out=gradient)
    wide_X = gradient.view(-1)
    narrow_X = wide_X.view(dtype)[: len(wide_X)]
    scale_1 = scale.reshape(1)  # a 0-dim tensor would be rounded to the gradient's dtype first
    narrow_X[:AT_ONCE] = wide_X[:AT_ONCE] * scale_1  # only here may the result overlap what is still to be read
    start = AT_ONCE
    while start < len(wide_X):
        # What is written up to here lies in front of what is read from here on. A GPU has no temporary tensor for this.
        part = slice(start, start + (start if gradient.is_cuda else AT_ONCE))
        torch.mul(wide_X[part], scale_1, out=narrow_X[part])
        start = part.stop
    return narrow_X.view(gradient.shape)
