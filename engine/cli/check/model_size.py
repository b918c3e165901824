"""Measure what a model needs, without its weights: it runs on torch's fake tensors, which have shapes but no memory.

Counted are the parameters, the bytes that autograd keeps for the backward of a micro-batch (each storage once, however
many operations keep it), and the numbers that a token leaves in the key-value cache. A layout of our own stands in for
the attention and keeps what the real one keeps. Few tokens are enough: from two lengths follows what any length needs.

Legend: T tokens of the flat row, A query heads, G key-value heads, D head size, E that of the values, H hidden size.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from mgrpo.engine.config.schema import AgentConfig, ComputeConfig
from mgrpo.engine.hub.snapshots import folder
from mgrpo.engine.model.attention import Rule, hidden_states, output_head
from mgrpo.engine.model.causal_lm import Actor, decoder_layers
from mgrpo.engine.model.composite import auto_class
from mgrpo.engine.model.directory import UNREADABLE, code_settings, unreadable
from mgrpo.engine.model.probe import without_dropout

SHORT, LONG = 64, 128  # tokens of the two forwards
BLOCK = 128  # queries whose scores the backward of the attention on a CPU holds at a time
WIDE = 4  # bytes of a float32


@dataclass(frozen=True)
class Passing:
    """Hold the bytes that a micro-batch needs for a while.

    saved: kept for the backward; checkpointed: the same with activation checkpointing. work: what the backward of one
    layer needs beside that. widest: the largest tensor within a layer.
    """

    saved: int
    checkpointed: int
    work: int
    widest: int


@dataclass(frozen=True)
class ModelSize:
    """Hold what one model needs; all numbers but those of `passing` are elements.

    parameters: all of them; trained: those with a gradient; largest: of one parameter. widest_layer, all_layers: the
    parameters of the widest decoder layer, and of all of them. vocabulary, hidden: of the head. tied: the head is the
    embedding. cached: keys and values of one token, by layer.
    """

    parameters: int
    trained: int
    largest: int
    widest_layer: int
    all_layers: int
    vocabulary: int
    hidden: int
    tied: bool
    cached: tuple[int, ...]
    passing: Passing


def measure(name: str, agent: AgentConfig, compute: ComputeConfig, on_gpu: bool) -> ModelSize:
    """Return the size of an agent's model at micro-batches of compute.max_tokens.

    Raises ValueError, naming the agent's model, if its config describes no model that can be made.
    """
    path = folder(name, agent)
    try:
        config = AutoConfig.from_pretrained(path, **code_settings(agent))
        dtype = getattr(torch, compute.dtype)
        return size_of(config, dtype, compute.max_tokens, on_gpu=on_gpu, trust=agent.trust_remote_code)
    except UNREADABLE as error:
        raise unreadable(name, agent, "config", error) from error


def size_of(
    config: PreTrainedConfig, dtype: torch.dtype, tokens: int, *, on_gpu: bool = False, trust: bool = False
) -> ModelSize:
    """Return the size of the model that a config describes, at micro-batches of that many tokens."""
    with FakeTensorMode():
        model = _made(config, dtype, trust)
        params, layers = dict(model.named_parameters()), decoder_layers(model)
        per_layer = [sum(param.numel() for param in layer.parameters()) for layer in layers]
        head, embeddings = output_head(model), model.get_input_embeddings()
        counted = _counted(config, model, on_gpu, trust)
    return ModelSize(
        parameters=sum(param.numel() for param in params.values()),
        trained=sum(param.numel() for param in params.values() if param.requires_grad),
        largest=max(param.numel() for param in params.values()),
        widest_layer=max(per_layer, default=0),
        all_layers=sum(per_layer),
        vocabulary=head.weight.shape[0],
        hidden=head.weight.shape[1],
        tied=head.weight is embeddings.weight,
        cached=tuple(counted[0].layout.cached.values()),
        passing=_passing(*counted, tokens),
    )


def _made(config: PreTrainedConfig, dtype: torch.dtype, trust: bool) -> PreTrainedModel:
    model: PreTrainedModel = auto_class(config).from_config(
        copy.deepcopy(config), dtype=dtype, attn_implementation="mgrpo", trust_remote_code=trust
    )
    without_dropout(model)
    return Actor(model).model  # an Actor freezes what is not trained


def _counted(config: PreTrainedConfig, model: PreTrainedModel, on_gpu: bool, trust: bool) -> tuple[_Run, _Run, int]:
    """Return two forwards, and by what to multiply their bytes.

    Some operations of mixtures of experts have no fake form in float32: those are counted in bfloat16, twice.
    """
    noisy = logging.getLogger("torch._subclasses.fake_tensor")
    level, times = noisy.level, 1
    noisy.setLevel(logging.CRITICAL)  # it logs what is tried in vain
    try:
        return _Run(model, SHORT, on_gpu), _Run(model, LONG, on_gpu), times
    except RuntimeError:
        times = model.dtype.itemsize // torch.bfloat16.itemsize
        narrow = _made(config, torch.bfloat16, trust)
        return _Run(narrow, SHORT, on_gpu), _Run(narrow, LONG, on_gpu), times
    finally:
        noisy.setLevel(level)


def _passing(short: _Run, long: _Run, times: int, tokens: int) -> Passing:
    """Return what that many tokens need: a constant and a share for each token."""

    def at(name: str) -> int:
        low, high = getattr(short, name), getattr(long, name)
        return int(times * (high + (high - low) * (tokens - LONG) / (LONG - SHORT)))

    return Passing(*(max(0, at(name)) for name in ("saved", "checkpointed", "work", "widest")))


class _Keep(torch.autograd.Function):
    """Keep some tensors for the backward, as the attention does, and return the first one."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *kept: Tensor) -> Tensor:
        ctx.save_for_backward(out, *kept)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AssertionError("only the forward is counted")


@dataclass
class CountingLayout:
    """Stand in for `Packed`. cached: numbers that a token leaves in each layer. work: bytes of the widest backward."""

    on_gpu: bool
    cached: dict[int, int] = field(default_factory=dict)
    work: int = 0
    mixed: dict[Any, int] = field(default_factory=dict)

    def attend(self, layer: int, q_ATD: Tensor, k_GTD: Tensor, v_GTE: Tensor, rule: Rule) -> Tensor:
        """Return a tensor of the output's shape (T, A, E), and keep what the backward would read."""
        heads, tokens, size = q_ATD.shape
        own = v_GTE.shape[2]
        self.cached[layer] = k_GTD.shape[0] * size + v_GTE.shape[0] * own
        if self.on_gpu:
            return self._fused(q_ATD, k_GTD, v_GTE)
        repeat = heads // k_GTD.shape[0]
        repeated = [x.repeat_interleave(repeat, 0) for x in (k_GTD, v_GTE)]
        padded = heads * tokens * (2 * (size + own) * q_ATD.itemsize + (size + own) * WIDE)
        scores = heads * tokens * BLOCK * (2 * WIDE + 2 * q_ATD.itemsize)
        self.work = max(self.work, 2 * padded + scores)
        return _Keep.apply(q_ATD.new_empty(heads, tokens, own), q_ATD, *repeated).transpose(0, 1).contiguous()

    def _fused(self, q_ATD: Tensor, k_GTD: Tensor, v_GTE: Tensor) -> Tensor:
        heads, tokens, size = q_ATD.shape
        kept = [x.transpose(0, 1).clone() for x in (q_ATD, k_GTD)]
        kept.append(q_ATD.new_empty(tokens, v_GTE.shape[0], size))
        kept.append(q_ATD.new_empty(heads, tokens, dtype=torch.float32))  # the logarithm of each query's sum
        self.work = max(self.work, 3 * heads * tokens * size * WIDE)
        return _Keep.apply(q_ATD.new_empty(tokens, heads, size), *kept)[:, :, : v_GTE.shape[2]].contiguous()

    def mix(self, mixer: Any, hidden_1TH: Tensor) -> Tensor:
        """Run a recurrent layer over the whole row."""
        out: Tensor = mixer.run(hidden_1TH)
        return out


class _Run:
    """Run a backbone's forward on fake tensors and count the bytes that it keeps, as `Passing` names them."""

    def __init__(self, model: PreTrainedModel, tokens: int, on_gpu: bool) -> None:
        self.layout, self.layer = CountingLayout(on_gpu), -1
        self.kept: dict[int, dict[int, int]] = {}  # by layer (-1: none), the bytes of each storage that it keeps
        self.alive: list[Any] = []  # storages, so that no two have the same address
        self.params = {param.untyped_storage()._cdata for param in model.parameters()}
        layers = decoder_layers(model)
        with self._following(layers), saved_tensors_hooks(self._keep, lambda kept: kept):
            ids_T = torch.zeros(tokens, dtype=torch.long)
            out_TH = hidden_states(model, ids_T, torch.zeros_like(ids_T), self.layout)
        seen: dict[int, int] = {}
        for found in self.kept.values():
            seen |= found
        outside = self.kept.pop(-1, {})
        own = [{at: size for at, size in found.items() if at not in outside} for found in self.kept.values()]
        inputs = out_TH.numel() * out_TH.itemsize * len(layers)
        self.saved = sum(seen.values())
        self.checkpointed = inputs + sum(outside.values()) + max((sum(found.values()) for found in own), default=0)
        self.widest = max((size for found in own for size in found.values()), default=0)
        self.work = self.layout.work + 4 * self.widest

    @contextmanager
    def _following(self, layers: list[nn.Module]) -> Iterator[None]:
        """Know in which layer the forward is."""

        def now(number: int) -> Any:
            return lambda *_: setattr(self, "layer", number)

        hooks = [layer.register_forward_pre_hook(now(i)) for i, layer in enumerate(layers)]
        hooks += [layer.register_forward_hook(now(-1)) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.params:
            self.alive.append(storage)
            self.kept.setdefault(self.layer, {})[storage._cdata] = storage.nbytes()
        return tensor
