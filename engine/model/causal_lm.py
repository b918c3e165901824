"""Load causal LMs of `transformers`, or take them over from a caller, check them, and split them over ranks.

Legend: T tokens of a flat row, A query heads, G key-value heads, D head size, H hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import AttentionInterface

from mgrpo.engine.config.schema import AgentConfig, ComputeConfig
from mgrpo.engine.hub.snapshots import folder
from mgrpo.engine.model.attention import Layout, attention, output_head, run_backbone
from mgrpo.engine.model.composite import auto_class, other_weights
from mgrpo.engine.model.directory import UNREADABLE, code_settings, refuse_foreign_code, unreadable, weight_settings
from mgrpo.engine.model.logits import keep_logit_map, logit_map
from mgrpo.engine.model.probe import check_exact, with_dropout, without_dropout
from mgrpo.engine.model.sharding import local
from mgrpo.engine.run.manifest import VERSION, verify_version
from mgrpo.engine.system.distributed import mesh, ranks

Result = TypeVar("Result")
DTYPES = (torch.bfloat16, torch.float32, torch.float64)


class Actor(nn.Module):
    """Run a causal LM's backbone and head within one forward, in which FSDP holds the whole weights of both.

    Weights on which no log-prob depends, such as a vision tower's, are frozen. buffer_bytes: as in `linear_grpo_loss`.
    """

    buffer_bytes: int | None = None

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        for param in other_weights(model, output_head(model)).values():
            param.requires_grad_(False)

    def temperature(self, temperature: float) -> float:
        """Return by what the capped head's output is divided: the policy's temperature and the model's logit scale."""
        return temperature / logit_map(self.model).scale

    @property
    def softcap(self) -> float | None:
        """The bound of the head's output, which the model caps before the temperature; None: it does not."""
        return logit_map(self.model).softcap

    def forward(
        self,
        input_ids_T: Tensor,
        positions_T: Tensor,
        layout: Layout,
        work: Callable[..., Result],
        *,
        routed: bool = False,
    ) -> Result:
        """Return work(hidden (T, H), the head's weight (V, H), its bias (V,) or None).

        routed: hand `work` the logits of each layer's router too, as a tuple of (T, experts).
        """
        options = {"output_router_logits": True} if routed else {}
        out = run_backbone(self.model, input_ids_T, positions_T, layout, **options)
        head = output_head(self.model)
        logits = (out.router_logits,) if routed else ()
        return work(out.last_hidden_state[0], head.weight, head.bias, *logits)


def load_actor(name: str, agent: AgentConfig, compute: ComputeConfig, group: ProcessGroup | None = None) -> Actor:
    """Load an agent's model onto its device, as `load_model` does, and split it over the ranks if there are several.

    After a split each rank holds its rows of every weight, in float32, as masters. A device then never holds more than
    one whole layer, but the host of each rank briefly holds the model in the compute dtype.
    """
    device = pick_device(compute)
    alone = ranks(group) == 1
    actor = Actor(load_model(name, agent, compute, device if alone else torch.device("cpu")))
    if compute.compile:
        compile_layers(actor.model)
    if not alone:
        split(actor, device, getattr(torch, compute.dtype), group)
    return actor


def split(
    actor: Actor, device: torch.device, dtype: torch.dtype, group: ProcessGroup | None, *, master: bool = True
) -> None:
    """Shard each decoder layer and the rest by FSDP2; gradients are summed over the ranks, in float32 or wider.

    master: whether the rows that a rank holds are float32 or wider too, or else in the compute dtype.
    """
    wide = torch.promote_types(dtype, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=wide, cast_forward_inputs=False)
    over = mesh(device, group)
    for module in (*decoder_layers(actor.model), actor):
        if master:
            module.to(wide)
        sharded = fully_shard(module, mesh=over, mp_policy=policy)
        assert isinstance(sharded, FSDPModule)
        sharded.set_gradient_divide_factor(1.0)  # the loss weights include the mean
        sharded.set_force_sum_reduction_for_comms(True)  # otherwise a product precedes the sum, and gloo has none


def compile_layers(model: PreTrainedModel) -> None:
    """Compile each decoder layer for any number of tokens, except attention, which reads lengths."""
    AttentionInterface.register("mgrpo", torch.compiler.disable(attention))
    for layer in decoder_layers(model):
        layer.compile(dynamic=True)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the layers that transformers can checkpoint, in order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def pick_device(compute: ComputeConfig) -> torch.device:
    """Return the device of a run. Raises ValueError if it does not exist here, or does not go with other settings."""
    name = compute.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"config: compute.device: {name!r} given: expected a device of torch or 'auto'") from error
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"config: compute.device: {name!r} given: expected a device of this machine, which has no CUDA GPU"
        )
    if compute.compile and not name.startswith("cuda"):
        raise ValueError(f"config: compute.compile: true given: expected false on {name!r}, compiling is for GPUs")
    if compute.compile and compute.activation_checkpointing:  # a checkpoint with attention in it is not compiled
        raise ValueError("config: compute.compile: true given: expected false with activation_checkpointing = true")
    return torch.device(name)


def load_tokenizer(name: str, agent: AgentConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of an agent and check it against its model's config (no weights are loaded).

    Raises ValueError if it cannot be read or does not fit the model.
    """
    config = read_model_config(name, agent)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder(name, agent), **code_settings(agent))
    except UNREADABLE as error:
        raise unreadable(name, agent, "tokenizer", error) from error
    if len(tokenizer) > config["vocab_size"]:
        raise ValueError(
            f"agents.{name}.model: the tokenizer of {agent.model} has {len(tokenizer)} tokens, "
            f"its model a vocabulary of {config['vocab_size']}: expected a tokenizer that fits the model"
        )
    if (highest := max(tokenizer.get_vocab().values(), default=0)) >= config["vocab_size"]:
        raise ValueError(
            f"agents.{name}.model: the tokenizer of {agent.model} has a token of id {highest}, its model a vocabulary "
            f"of {config['vocab_size']}: expected ids below that"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"agents.{name}.model: the tokenizer of {agent.model} has no end-of-sequence token")
    return tokenizer


def read_model_config(name: str, agent: AgentConfig) -> dict[str, Any]:
    """Return config.json of an agent's model directory, after the checks that need no weights.

    Of a model that also sees or hears, it is the part about its text model.

    Raises ValueError if it is missing, not a causal LM's, or made for a shorter context than the agent's, or names code
    that lies elsewhere.
    """
    path = folder(name, agent) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"agents.{name}.model: {agent.model} given: expected a directory with a config.json in it, or the id of a "
            "model on a hub, such as 'Qwen/Qwen3-0.6B'"
        )
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # also if it is no UTF-8, or nested too deep
        raise ValueError(f"agents.{name}.model: {path} is not valid JSON: {error}") from error
    if isinstance(config, dict) and isinstance(config.get("text_config"), dict):
        config = _text_config(name, agent)
    if not isinstance(config, dict) or not isinstance(config.get("vocab_size"), int):
        raise ValueError(f"agents.{name}.model: {path} has no vocab_size: expected the config of a causal LM")
    context = config.get("max_position_embeddings", config.get("n_positions"))
    if context is not None and agent.max_context > context:
        raise ValueError(
            f"agents.{name}.max_context: {agent.max_context} given: expected at most the model's {context}"
        )
    refuse_foreign_code(name, agent)
    return config


def _text_config(name: str, agent: AgentConfig) -> dict[str, Any]:
    """Return what a composite config says of its text model, with the values that its file leaves out."""
    try:
        config = AutoConfig.from_pretrained(folder(name, agent), **code_settings(agent))
        found: dict[str, Any] = config.get_text_config().to_dict()
    except UNREADABLE as error:
        raise unreadable(name, agent, "config", error) from error
    return found


def load_model(
    name: str, agent: AgentConfig, compute: ComputeConfig, device: torch.device | None = None
) -> PreTrainedModel:
    """Load the causal LM of an agent onto a device (None: the run's), in the compute dtype, with our attention.

    Raises ValueError if its weights cannot be read or are incomplete, or the model is of a kind that is not supported.
    """
    device = device or pick_device(compute)
    read_model_config(name, agent)
    path = folder(name, agent, weights=True)
    if (path / VERSION).is_file():  # an export: weights with a wrong byte would load all the same
        verify_version(path)
    try:
        config = AutoConfig.from_pretrained(path, **code_settings(agent))
        loaded: Any = auto_class(config).from_pretrained(
            path,
            config=config,
            dtype=getattr(torch, compute.dtype),
            attn_implementation="mgrpo",
            output_loading_info=True,
            **weight_settings(agent),
        )
    except UNREADABLE as error:
        raise unreadable(name, agent, "weights", error) from error
    model: PreTrainedModel = loaded[0]
    loading: dict[str, Any] = loaded[1]
    if loading["missing_keys"]:  # transformers would fill them with random numbers
        raise ValueError(f"agents.{name}.model: {agent.model} lacks the weights {sorted(loading['missing_keys'])}")
    _require_finite(name, agent, model)
    without_dropout(model)
    nn.Module.to(model, device)
    model.train(compute.activation_checkpointing)  # transformers checkpoints in train mode only
    if compute.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    whose, training = f"agents.{name}.model", compute.activation_checkpointing
    keep_logit_map(model, check_exact(whose, model, training=training, longest=agent.max_context))
    return model


def _require_finite(name: str, agent: AgentConfig, model: PreTrainedModel) -> None:
    """Raise ValueError naming a weight that has a NaN or an infinity, with which every result would be NaN."""
    for weight, param in model.named_parameters():
        if param.numel() and not torch.isfinite(param.sum(dtype=torch.float32)) and not torch.isfinite(param).all():
            raise ValueError(
                f"agents.{name}.model: {agent.model}: {weight} has a NaN or an infinity: expected finite numbers"
            )


def take_over(model: PreTrainedModel, compute: ComputeConfig, group: ProcessGroup | None) -> tuple[Actor, torch.dtype]:
    """Prepare a caller's causal LM in place, split it over the ranks if there are several; return it and its dtype.

    Only the device and compile of compute are used; device "auto" leaves the model where it is. Raises ValueError as
    `lay_out` does, or if the model is already sharded or in an unsupported dtype.
    """
    _require_model(model)
    if any(isinstance(param, DTensor) for param in model.parameters()):
        raise ValueError("model: a sharded model given: expected a whole one on every rank, the policy shards it")
    if model.dtype not in DTYPES:
        raise ValueError(f"model: a model in {model.dtype} given: expected one of {DTYPES}")
    lay_out(model)
    device, dtype = model.device if compute.device == "auto" else pick_device(compute), model.dtype
    actor = Actor(model)
    if compute.compile:
        compile_layers(model)
    if ranks(group) == 1:
        nn.Module.to(model, device)
    else:
        split(actor, device, dtype, group)
    return actor, dtype


def lay_out(model: PreTrainedModel) -> None:
    """Let a caller's model run over flat rows: its attention follows a layout if there is one, without dropout.

    Everything else works as before. Raises ValueError if the model is wrapped, has no head, or is of a kind that
    `load_model` refuses; its attention is then what it was.
    """
    _require_model(model)
    before, dropout = model.config._attn_implementation, without_dropout(model)
    model.set_attn_implementation("mgrpo")
    try:
        keep_logit_map(model, check_exact("model", model))
    except ValueError:
        model.set_attn_implementation(before)
        with_dropout(dropout)
        raise


def _require_model(model: object) -> None:
    if not isinstance(model, PreTrainedModel):
        kind = type(model).__name__
        raise ValueError(f"model: {kind} given: expected a PreTrainedModel of transformers, not wrapped")


@torch.no_grad()
def frozen_copy(
    actor: Actor, masters: Mapping[str, Tensor], compute: ComputeConfig, dtype: torch.dtype, group: ProcessGroup | None
) -> Actor:
    """Return a frozen copy of the model as it is now, in the compute dtype; each of several ranks holds its rows."""
    alone = ranks(group) == 1
    kept = copy.deepcopy(actor) if alone else Actor(_blank(actor.model, dtype))
    kept.buffer_bytes = actor.buffer_bytes
    if compute.compile:  # a copy is not compiled
        compile_layers(kept.model)
    if not alone:
        split(kept, actor.model.device, dtype, group, master=False)
        for param, weight in zip(kept.parameters(), masters.values(), strict=True):
            local(param).copy_(local(weight))
        buffers = dict(kept.named_buffers())
        for name, value in actor.named_buffers():  # of routers, say, which no parameter holds
            buffers[name].copy_(value)
    return kept.requires_grad_(False)


def _blank(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return another model of the same kind, on the CPU, without initialised weights."""
    with no_init_weights():
        made: PreTrainedModel = type(model)._from_config(model.config, dtype=dtype, attn_implementation="mgrpo")
    made.tie_weights()
    keep_logit_map(made, logit_map(model))
    without_dropout(made)
    return made.eval()
