"""Keep the state of recurrent layers apart: short convolutions, linear attention and state-space models of hybrids.

Such a layer, here called a *mixer*, carries a state from token to token, so that in a flat row it would run from one
sequence into the next. All mixers of `transformers` have the same forward, `(hidden_states, cache, attention_mask)`.
`follow_layouts` lets it ask the layout that is passed down to the attention too: `Packed` for training, or the
sampler's, which keeps each call's state in its cache. A forward without a layout works as before.

Legend: T tokens of the flat row, H hidden size, B sequences, L tokens of the longest.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mgrpo.engine.model.attention import Layout, Mixer, UnsupportedAttentionError

# Functions of transformers whose kernels take the bounds of packed sequences, as `cu_seqlens` or `seq_idx`; and the
# package that has these kernels, as it is imported.
BOUNDED = {
    **dict.fromkeys(("causal_conv1d_fn", "causal_conv1d_update"), "causal_conv1d"),
    **dict.fromkeys(("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"), "fla"),
    **dict.fromkeys(("mamba2_chunk_scan", "mamba2_split_conv1d_scan_combined"), "mamba_ssm"),
    "mamba2_selective_state_update": "mamba_ssm",
}
PACKAGES = {"causal_conv1d": "causal-conv1d", "fla": "flash-linear-attention", "mamba_ssm": "mamba-ssm"}
FOLLOWS = "mgrpo_follows_layouts"  # attribute of a forward that does


def follow_layouts(model: nn.Module) -> None:
    """Let the mixers of this model, and of all others of their classes, follow a layout if their forward gets one."""
    for kind in mixer_kinds(model):
        if not getattr(kind.forward, FOLLOWS, False):
            _run_plain_on_cpu(kind)
            kind.forward = _following(kind.forward)


def missing_packages(model: nn.Module) -> list[str]:
    """Return the packages that are not here, but whose kernels keep packed sequences apart in a model's mixers."""
    bounded = [names for kind in mixer_kinds(model) if (names := functions(kind)) <= BOUNDED.keys()]
    needed = {BOUNDED[name] for names in bounded for name in names}
    return sorted(PACKAGES[package] for package in needed if not _installed(package))


def mixer_kinds(model: nn.Module) -> list[type[nn.Module]]:
    """Return the classes of a model's mixers: those with a convolution over tokens and a cache for its state."""
    kinds = {type(module): module for module in model.modules()}
    return [kind for kind, module in kinds.items() if _convolves(module) and _has_state(kind)]


def functions(kind: type[nn.Module]) -> set[str]:
    """Return the names of the functions with kernels that a mixer calls: those that transformers has wrapped."""
    forward = inspect.unwrap(kind.forward)
    return {name for name in forward.__code__.co_names if hasattr(forward.__globals__.get(name), "__wrapped__")}


def _convolves(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Conv1d) for child in module.children())


def _has_state(kind: type[nn.Module]) -> bool:
    names = inspect.signature(kind.forward).parameters
    return {"hidden_states", "cache"} <= names.keys() and "position_embeddings" not in names


def _following(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def follow(self: nn.Module, hidden_states: Tensor, *args: Any, layout: Layout | None = None, **kwargs: Any) -> Any:
        if layout is None:
            return forward(self, hidden_states, *args, **kwargs)
        return _mix(layout, self, functools.partial(forward, self), hidden_states, kwargs)

    setattr(follow, FOLLOWS, True)
    return follow


@torch.compiler.disable
def _mix(
    layout: Layout, module: nn.Module, forward: Callable[..., Any], hidden_1TH: Tensor, kwargs: dict[str, Any]
) -> Tensor:
    layer = module.layer_idx
    assert isinstance(layer, int)
    kwargs.pop("position_ids", None)  # of the row; a state has no positions
    if given := {name for name, value in kwargs.items() if "mask" in name and value is not None}:
        raise UnsupportedAttentionError(f"hands its recurrent layers {', '.join(sorted(given))}")
    run = functools.partial(forward, **kwargs)
    return layout.mix(Mixer(layer, run, functions(type(module)) <= BOUNDED.keys()), hidden_1TH)


def _run_plain_on_cpu(kind: type[nn.Module]) -> None:
    """Let the mixer's functions run as torch on a CPU, where the packages' kernels, if there are any, cannot."""
    if not any(map(_installed, PACKAGES)):
        return
    space = inspect.unwrap(kind.forward).__globals__
    for name in functions(kind):
        if not hasattr(space[name], FOLLOWS):
            space[name] = _by_device(space[name])


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _by_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    plain = inspect.unwrap(kernel)
    names = inspect.signature(plain).parameters

    @functools.wraps(kernel)
    def call(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        if first.device.type != "cpu":
            return kernel(first, *args, **kwargs)
        return plain(first, *args, **{name: value for name, value in kwargs.items() if name in names})

    setattr(call, FOLLOWS, True)
    return call
