"""A gradient scaled and rounded to its tensor's dtype where it lies, so that no second copy of it is ever in memory.

Departs from the usual `(gradient * scale).to(dtype)` in that the result fills the front of the gradient's own storage.
The price: that storage, twice as large as a bfloat16 gradient made of a float32 one, lives as long as the gradient.
"""

import torch
from torch import Tensor

# Elements at a time: enough to fill a GPU, few enough for a temporary.
AT_ONCE = 1 << 22


@torch.no_grad()
def scale_in_place(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * scale in a dtype that is no wider than the gradient's, rounded once; the gradient is spent.

    gradient contiguous; scale 0-dim, on the same device, where it stays: the host waits for nothing.
    """
    wide_X = gradient.view(-1)
    narrow_X = wide_X.view(dtype)[: len(wide_X)]
    scale_1 = scale.reshape(1)  # of 0 dimensions it would be rounded to the gradient's dtype first
    for start in range(0, len(wide_X), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        if start == 0:  # the only part whose result may lie on what has yet to be read of it
            narrow_X[part] = wide_X[part] * scale_1
        else:
            torch.mul(wide_X[part], scale_1, out=narrow_X[part])
    return narrow_X.view(gradient.shape)
