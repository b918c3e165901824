"""Causal LMs of `transformers`, run over packed tokens.

One attention function is registered for all of them. It asks a *layout*, handed down through the model's forward, how
the tokens of the flat row (1, T) attend to each other: `Packed` for training (sequences side by side, no padding), the
sampler's own layout for decoding (tokens of many calls against a key-value cache).

Legend: T tokens of the flat row, A query heads, G key-value heads, D head size, H hidden size, B sequences.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.attention.varlen import varlen_attn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import AttentionInterface

from mgrpo.engine.attention import buckets, causal_attention
from mgrpo.engine.config import AgentConfig, ComputeConfig
from mgrpo.engine.distributed import ranks

Result = TypeVar("Result")
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)  # what transformers raises for broken files


class Layout(Protocol):
    """How the tokens of one flat row attend. q (A, T, D), k and v (G, T, D) -> (T, A, D)."""

    def attend(self, layer: int, q_ATD: Tensor, k_GTD: Tensor, v_GTD: Tensor, scale: float) -> Tensor: ...


class Packed:
    """B sequences side by side, each causal in itself. cu_seqlens (B+1,) int32, from 0 to T."""

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int):
        self.cu_seqlens = cu_seqlens
        self.max_seqlen = max_seqlen
        self.buckets = [] if cu_seqlens.is_cuda else buckets(cu_seqlens.diff().tolist())

    def attend(self, layer: int, q_ATD: Tensor, k_GTD: Tensor, v_GTD: Tensor, scale: float) -> Tensor:
        if q_ATD.is_cuda:
            return self._attend_cuda(q_ATD, k_GTD, v_GTD, scale)
        repeat = q_ATD.shape[0] // k_GTD.shape[0]
        k_ATD, v_ATD = k_GTD.repeat_interleave(repeat, 0), v_GTD.repeat_interleave(repeat, 0)
        return causal_attention(q_ATD, k_ATD, v_ATD, scale, self.buckets).transpose(0, 1)

    def _attend_cuda(self, q_ATD: Tensor, k_GTD: Tensor, v_GTD: Tensor, scale: float) -> Tensor:
        out_TAD = varlen_attn(
            q_ATD.transpose(0, 1).contiguous(),
            k_GTD.transpose(0, 1).contiguous(),
            v_GTD.transpose(0, 1).contiguous(),
            self.cu_seqlens,
            self.cu_seqlens,
            self.max_seqlen,
            self.max_seqlen,
            scale=scale,
            window_size=(-1, 0),  # causal
            enable_gqa=True,
        )
        assert isinstance(out_TAD, Tensor)
        return out_TAD


class UnsupportedAttention(Exception):
    """A model asks for more than plain causal attention."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    layout: Layout,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention interface of transformers: (1, heads, T, D) in, (1, T, heads, D) out."""
    if softcap is not None or s_aux is not None:
        raise UnsupportedAttention("has attention with soft-capping or sinks")
    layer = module.layer_idx
    assert isinstance(layer, int)
    out_TAD = layout.attend(layer, query[0], key[0], value[0], scaling)
    return out_TAD.unsqueeze(0), None


AttentionInterface.register("mgrpo", _attention)


def hidden_states(model: PreTrainedModel, input_ids_T: Tensor, positions_T: Tensor, layout: Layout) -> Tensor:
    """Last hidden states (T, H) of the flat row, before the head."""
    out = model.base_model(input_ids=input_ids_T[None], position_ids=positions_T[None], use_cache=False, layout=layout)
    return out.last_hidden_state[0]


class Actor(nn.Module):
    """A causal LM whose backbone and head run within one forward: there FSDP holds the weights of both whole."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids_T: Tensor,
        positions_T: Tensor,
        layout: Layout,
        work: Callable[[Tensor, Tensor, Tensor | None], Result],
    ) -> Result:
        """work(hidden (T, H), the head's weight (V, H), its bias (V,) or None)"""
        hidden_TH = hidden_states(self.model, input_ids_T, positions_T, layout)
        head = self.model.get_output_embeddings()
        return work(hidden_TH, head.weight, head.bias)


def load_actor(name: str, agent: AgentConfig, compute: ComputeConfig, *, master: bool = True) -> Actor:
    """An agent's model on its device, as `load_model` makes it; split over the ranks if there are several.

    Split, each rank holds its rows of every weight, in float32 as a master, else in the compute dtype. A device then
    never holds more than one layer whole, but each rank's host for a moment the model in the compute dtype.
    """
    device = pick_device(compute)
    alone = ranks() == 1
    actor = Actor(load_model(name, agent, compute, device if alone else torch.device("cpu")))
    if compute.compile:
        compile_layers(actor.model)
    if not alone:
        _split(actor, device, getattr(torch, compute.dtype), master)
    return actor


def _split(actor: Actor, device: torch.device, dtype: torch.dtype, master: bool) -> None:
    """FSDP2 of each decoder layer and of the rest; gradients are sums over the ranks, in float32."""
    mesh = init_device_mesh(device.type, (ranks(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*decoder_layers(actor.model), actor):
        if master:
            module.float()
        sharded = fully_shard(module, mesh=mesh, mp_policy=policy)
        assert isinstance(sharded, FSDPModule)
        sharded.set_gradient_divide_factor(1.0)  # the mean is in the loss weights
        sharded.set_force_sum_reduction_for_comms(True)  # else a product before the sum, which gloo has not


def compile_layers(model: PreTrainedModel) -> None:
    """torch.compile of each decoder layer, for any number of tokens; attention, which reads lengths, stays as it is."""
    AttentionInterface.register("mgrpo", torch.compiler.disable(_attention))
    for layer in decoder_layers(model):
        layer.compile(dynamic=True)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def pick_device(compute: ComputeConfig) -> torch.device:
    """The device of a run. Raises ValueError if it is not there."""
    name = compute.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"config: compute.device: {name!r} given: expected a device of torch or 'auto'") from error
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"config: compute.device: {name!r} given: expected a device that is here, no CUDA GPU found")
    if compute.compile and not name.startswith("cuda"):
        raise ValueError(f"config: compute.compile: true given: expected false on {name!r}, it is for GPUs")
    if compute.compile and compute.activation_checkpointing:  # attention's graph break keeps a checkpoint uncompiled
        raise ValueError("config: compute.compile: true given: expected false with activation_checkpointing = true")
    return torch.device(name)


def load_tokenizer(name: str, agent: AgentConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of an agent, checked against its model's config (nothing big is loaded)."""
    config = read_model_config(name, agent)
    try:
        tokenizer = AutoTokenizer.from_pretrained(agent.model)
    except UNREADABLE as error:
        raise ValueError(f"agents.{name}.model: {agent.model} has no readable tokenizer: {error}") from error
    if len(tokenizer) > config["vocab_size"]:
        raise ValueError(
            f"agents.{name}.model: the tokenizer of {agent.model} has {len(tokenizer)} tokens, "
            f"its model a vocabulary of {config['vocab_size']}: expected a tokenizer that fits the model"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"agents.{name}.model: the tokenizer of {agent.model} has no end-of-sequence token")
    return tokenizer


def read_model_config(name: str, agent: AgentConfig) -> dict[str, Any]:
    """config.json of an agent's model directory, with the checks that need no weights."""
    path = Path(agent.model) / "config.json"
    if not path.is_file():
        raise ValueError(f"agents.{name}.model: {agent.model} given: expected a directory with a config.json in it")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"agents.{name}.model: {path} is no JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("vocab_size"), int):
        raise ValueError(f"agents.{name}.model: {path} has no vocab_size: expected the config of a causal LM")
    context = config.get("max_position_embeddings", config.get("n_positions"))
    if context is not None and agent.max_context > context:
        raise ValueError(
            f"agents.{name}.max_context: {agent.max_context} given: expected at most the model's {context}"
        )
    window = config.get("sliding_window")
    if window and config.get("use_sliding_window", True) and agent.max_context > window:
        raise ValueError(
            f"agents.{name}.max_context: {agent.max_context} given: expected at most {window}, "
            f"the model's sliding window, beyond which its attention is not supported"
        )
    return config


def load_model(
    name: str, agent: AgentConfig, compute: ComputeConfig, device: torch.device | None = None
) -> PreTrainedModel:
    """The causal LM of an agent on a device (None: the run's), in the compute dtype, attention replaced by ours."""
    device = device or pick_device(compute)
    read_model_config(name, agent)
    try:
        config = AutoConfig.from_pretrained(agent.model)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            agent.model,
            config=config,
            dtype=getattr(torch, compute.dtype),
            attn_implementation="mgrpo",
            output_loading_info=True,
        )
    except (*UNREADABLE, RuntimeError, SafetensorError) as error:
        raise ValueError(f"agents.{name}.model: {agent.model} has no readable weights: {error}") from error
    model: PreTrainedModel = loaded[0]
    loading: dict[str, Any] = loaded[1]
    if loading["missing_keys"]:  # else they would be drawn at random
        raise ValueError(f"agents.{name}.model: {agent.model} lacks the weights {sorted(loading['missing_keys'])}")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # the trainer must see the distribution that the sampler saw
    nn.Module.to(model, device)
    model.train(compute.activation_checkpointing)  # transformers checkpoints in train mode only
    if compute.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _probe(name, model)
    return model


class _Watched(Packed):
    """Counts the layers that attend through us."""

    layers = 0

    def attend(self, layer: int, q_ATD: Tensor, k_GTD: Tensor, v_GTD: Tensor, scale: float) -> Tensor:
        self.layers += 1
        return super().attend(layer, q_ATD, k_GTD, v_GTD, scale)


@torch.no_grad()
def _probe(name: str, model: PreTrainedModel) -> None:
    """Some models scale or cap their logits, or attend in other ways: compare four tokens' logits, and refuse those."""
    ids_T = torch.arange(1, 5, device=model.device) % model.config.vocab_size
    positions_T = torch.arange(4, device=model.device)
    layout = _Watched(torch.tensor([0, 4], dtype=torch.int32, device=model.device), 4)
    what = f"agents.{name}.model: {type(model).__name__}"
    try:
        out = model(input_ids=ids_T[None], position_ids=positions_T[None], use_cache=False, layout=layout)
        if layout.layers < model.config.num_hidden_layers:
            raise UnsupportedAttention("has layers without plain attention")
    except (UnsupportedAttention, TypeError) as error:
        raise ValueError(f"{what} {error}: expected plain causal attention in every layer") from error
    head = model.get_output_embeddings()
    ours_TV = F.linear(hidden_states(model, ids_T, positions_T, layout), head.weight, head.bias)
    if not torch.allclose(ours_TV, out.logits[0], rtol=1e-2, atol=1e-2):
        raise ValueError(
            f"{what} changes its logits after the head (scaling or soft-capping), "
            "expected a model whose logits are head(hidden states)"
        )
