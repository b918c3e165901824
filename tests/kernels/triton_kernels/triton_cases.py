"""Help the Triton tests: choose where the kernels run, and move cases there.

The same tests run compiled on a GPU (`pytest -m gpu`) and, without one, under Triton's interpreter on CPU tensors. The
interpreter must be chosen before triton is imported, which torch does on many occasions: hence the separate process
that `test_triton.py` starts.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mgrpo.kernels import dispatch
from numerics import FLOOR, error, tell_worst

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


def skip_unless_kernels_run() -> None:
    """Skip the calling module if there is neither a GPU nor the interpreter."""
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("needs a GPU, or the interpreter: see test_triton.py", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def kernels_take_the_tensors() -> Iterator[None]:
    """Make the kernels take CPU tensors too, in every test module that imports this fixture."""
    dispatch.interpreted = INTERPRETED
    yield
    dispatch.interpreted = False


def placed(args: Any, dtype: torch.dtype | None = None) -> Any:
    """Move every tensor of a dict, list or tuple, or a single one, to the device; floats to the dtype, if given."""
    if isinstance(args, dict):
        return {name: placed(value, dtype) for name, value in args.items()}
    if isinstance(args, list | tuple):
        return type(args)(placed(value, dtype) for value in args)
    if not isinstance(args, Tensor):
        return args
    return args.to(DEVICE, dtype if dtype and args.is_floating_point() else args.dtype).detach()


def as_good(got: Tensor, plain: Tensor, truth: Tensor, size: float = 0.0) -> bool:
    """Return `numerics.within_rule`, with the floor a share of `size` if the truth happens to cancel to less than that.

    The interpreter truncates float32 to bfloat16, where a GPU rounds to nearest.
    """
    cut = 2**-7 if INTERPRETED and got.dtype == torch.bfloat16 else 0
    cancelled = max(1.0, size / max(1e-30, float(truth.abs().max()))) if truth.numel() else 1.0
    good = error(got, truth) <= 2 * error(plain, truth) + FLOOR[got.dtype] * cancelled + cut
    return good or tell_worst(got, plain, truth)
