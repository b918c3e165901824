"""Run code for a GPU without one: CUDA tensors that have no numbers, on a GPU that does nothing (null_gpu.c).

torch computes shapes, dtypes and devices only (FakeTensorMode). A Triton kernel is not run either: its launch is
recorded after its arguments are checked. Where the host would read a number, the rehearsal answers and counts.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

Answer = Callable[[Tensor], Any]  # the list or number that the host reads
GPU = torch.device("cuda", 0)
# Operations that launch nothing although they are no views.
FREE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "record_stream")
READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero")


def skip_unless_rehearsed() -> None:
    """Skip the calling module unless torch is a CUDA build on the GPU that does nothing: `make gpu-rehearsal`."""
    if os.environ.get("MGRPO_REHEARSAL") != "1":
        pytest.skip("needs the CUDA build of torch: make gpu-rehearsal", allow_module_level=True)
    assert torch.cuda.get_device_name() == "a rehearsed H200"


@dataclass
class Rehearsal:
    """Hold what happened: launches of each operation and Triton kernel by name, the host's reads and its waits.

    waits: copies between the host and the GPU that the host awaits, by where they go.
    """

    answer: Answer
    launches: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    reads: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """The number of launches of both kinds."""
        return self.launches.total() + self.kernels.total()

    @property
    def small(self) -> int:
        """The number of launches that are neither matmuls nor passes over logits by our kernels."""
        return sum(n for name, n in self.launches.items() if name not in ("mm", "addmm"))


class WatchedDispatch(TorchDispatchMode):
    """Count launches, and answer what the host reads."""

    def __init__(self, rehearsal: Rehearsal):
        super().__init__()
        self.rehearsal = rehearsal

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        on_gpu = any(x.is_cuda for x in tensors)
        if func._overloadname == "dtype_out" and name == "aten::addmm":  # which has no fake form in torch 2.11
            out = _checked_addmm(*args, **kwargs)
            self.rehearsal.launches["addmm"] += 1
            return out
        if name in READS and on_gpu:
            self.rehearsal.reads.append(name.removeprefix("aten::"))
            if name == "aten::nonzero":
                return args[0].new_empty(self.rehearsal.answer(args[0]), args[0].ndim, dtype=torch.int64)
            return self.rehearsal.answer(args[0])
        if name == "aten::_pin_memory":  # which has no fake form
            pinned = args[0].clone()
            pinned.is_rehearsed_as_pinned = True
            return pinned
        if (awaited := _awaited(name, args, kwargs)) is not None:
            self.rehearsal.waits.append(f"a copy to {awaited}")
        out = func(*args, **kwargs)
        if not name.startswith("aten::"):
            return out
        made = out if isinstance(out, Tensor) else tensors[0] if tensors else None
        if on_gpu or (isinstance(made, Tensor) and made.is_cuda):
            self._count(func)
        return out

    def _count(self, func: Any) -> None:
        base = func._schema.name.removeprefix("aten::")
        returned = [value.alias_info for value in func._schema.returns]
        view = any(info is not None and not info.is_write for info in returned)
        if not view and base not in FREE:
            self.rehearsal.launches[base] += 1


def _awaited(name: str, args: Any, kwargs: Any) -> str | None:
    """Return where a copy between the host and the GPU goes if the host waits for it: cpu or cuda."""
    if name == "aten::_to_copy":
        source, target = args[0].device, torch.device(kwargs.get("device") or args[0].device)
        waits = not (kwargs.get("non_blocking") and _free_to_copy(args[0]))
    elif name == "aten::copy_":
        target, source = args[0].device, args[1].device
        waits = not ((args[2] if len(args) > 2 else kwargs.get("non_blocking")) and _free_to_copy(args[1]))
    else:
        return None
    return target.type if waits and source.type != target.type else None


def _free_to_copy(source: Tensor) -> bool:
    """Return whether the host need not wait for a copy of a tensor: not for one from its own pageable memory."""
    return source.is_cuda or getattr(source, "is_rehearsed_as_pinned", False)


def _checked_addmm(
    added: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor, beta: float = 1, alpha: float = 1
) -> Tensor:
    """Check the arguments of a matmul that sums in a wider dtype, and return where it writes."""
    assert a.shape[1] == b.shape[0] and added.shape == out.shape == (a.shape[0], b.shape[1])
    assert a.dtype == b.dtype and added.dtype == out.dtype == out_dtype == torch.float32
    assert a.is_cuda and b.is_cuda and out.is_cuda and alpha == 1 and beta in (0, 1)
    return out


@contextmanager
def rehearse(answer: Answer = lambda read: 0) -> Iterator[Rehearsal]:
    """Run the block's CUDA work without numbers. answer: what the host reads of a tensor, by `tolist`, `item`, ….

    Tensors that the block makes on the CPU have no numbers either.
    """
    from triton.runtime.jit import JITFunction

    rehearsal = Rehearsal(answer)

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in list(kwargs) if name not in kernel.arg_names}
        assert options.keys() <= {"num_warps", "num_stages", "enable_fp_fusion"}, options
        bound = kernel.signature.bind(*args, **kwargs).arguments
        assert len(bound) == len(kernel.arg_names) and all(size > 0 for size in grid), (kernel.__name__, grid)
        assert all(value.is_cuda for value in bound.values() if isinstance(value, Tensor)), kernel.__name__
        rehearsal.kernels[kernel.__name__] += 1

    def tolist(read: FakeTensor) -> Any:
        rehearsal.reads.append("tolist" if read.is_cuda else "tolist of a CPU tensor")
        return rehearsal.answer(read)

    def tensor(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        """Make a tensor of numbers, which for a GPU is a copy that no mode sees."""
        made = make(*args, device=device, **kwargs)
        if made.is_cuda:
            rehearsal.waits.append("a copy to cuda")
        return made

    make = torch.tensor
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(JITFunction, "run", run)
        patch.setattr(FakeTensor, "tolist", tolist)
        patch.setattr(torch, "tensor", tensor)
        patch.setattr(masking_utils, "is_tracing", lambda *_: False)  # it reads what it leaves alone without numbers
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=False))
        stack.enter_context(WatchedDispatch(rehearsal))
        yield rehearsal
