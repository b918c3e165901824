"""Count what a model's layers launch beside their matmuls and attention, by running one of them without numbers.

Tensors are torch's fake ones, which have shapes only; every operation is taken for one kernel that reads its inputs and
writes its outputs once. This is how eager torch runs on a GPU.

Legend: T tokens, A query heads, G key-value heads, D head size, I intermediate size, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from mgrpo.bench.step.models import Sizes
from mgrpo.engine.model.attention import hidden_states

MATMULS = ("mm", "addmm", "bmm", "baddbmm")
FREE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "_unsafe_view")


@dataclass(frozen=True)
class Passes:
    """Hold a number of kernels that only move memory, and the bytes that they move."""

    launches: float = 0
    moved: float = 0

    def __sub__(self, other: Passes) -> Passes:
        """Return what this has more."""
        return Passes(self.launches - other.launches, self.moved - other.moved)

    def times(self, factor: float) -> Passes:
        """Return as many of each."""
        return Passes(factor * self.launches, factor * self.moved)


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found = Passes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        aliases = [value.alias_info for value in func._schema.returns]
        view = any(info is not None and not info.is_write for info in aliases)
        if func.namespace == "aten" and not view and name not in FREE and name not in MATMULS:
            moved = sum(map(_bytes, _tensors((args, kwargs, out))))
            self.found = Passes(self.found.launches + 1, self.found.moved + moved)
        return out


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's own elements; those that `expand` repeats count once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.itemsize if tensor.numel() else 0


class _Attention(torch.autograd.Function):
    """Stand in for attention, which is counted by its flop."""

    @staticmethod
    def forward(ctx: Any, q_TAD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        ctx.save_for_backward(q_TAD, k_TGD, v_TGD)
        return q_TAD.new_empty(*q_TAD.shape[:2], v_TGD.shape[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return tuple(kept.new_empty(kept.shape) for kept in ctx.saved_tensors)


class _NoAttention:
    """Stand in for the layout of a micro-batch."""

    def attend(self, layer: int, q_ATD: Tensor, k_GTD: Tensor, v_GTD: Tensor, rule: Any) -> Tensor:
        out: Tensor = _Attention.apply(*(x.transpose(0, 1) for x in (q_ATD, k_GTD, v_GTD)))
        return out


def eager_layer(sizes: Sizes, tokens: int) -> Passes:
    """Return the passes over memory of one layer as transformers writes it, forward and backward."""
    one, two = (_backbone(tuple((sizes | {"num_hidden_layers": layers}).items()), tokens) for layers in (1, 2))
    return two - one


@cache
def _backbone(sizes: tuple[tuple[str, Any], ...], tokens: int) -> Passes:
    config = AutoConfig.for_model(**dict(sizes))
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="mgrpo")
        ids_T = torch.zeros(tokens, dtype=torch.long)
        with _Counting() as counting:
            hidden_TH = hidden_states(model, ids_T, torch.zeros_like(ids_T), _NoAttention())  # type: ignore[arg-type]
            hidden_TH.backward(torch.empty_like(hidden_TH))
    return counting.found


def fused_layer(sizes: Sizes, tokens: int) -> Passes:
    """Return the least passes of a Qwen3 layer: each norm, RoPE, SwiGLU and sum one kernel each way, in bf16.

    Bytes an element: a norm moves 4 forward (read, write) and 6 backward (input, gradient, result), RoPE 4 and 4,
    SwiGLU 6 and 10, a sum 6, and 6 again where its gradients meet. A norm's backward has a second kernel.
    """
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    heads = (sizes["num_attention_heads"] + sizes["num_key_value_heads"]) * sizes["head_dim"]
    moved = 2 * 10 * hidden + 10 * heads + 8 * heads + 16 * inner + 2 * 12 * hidden
    return Passes(launches=8 + 12, moved=float(tokens * moved))
