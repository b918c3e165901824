"""Describe what a config would run, without loading a model: a dry run."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from mgrpo.engine.batch.advantages import estimator, objective
from mgrpo.engine.config.schema import AgentConfig, Config, VLLMConfig
from mgrpo.engine.environment.loader import load_environment
from mgrpo.engine.model.causal_lm import load_tokenizer, pick_device
from mgrpo.engine.model.directory import code_settings
from mgrpo.engine.rollout.curriculum import load_tasks
from mgrpo.engine.training.launcher import gpus

GIB = 2**30


def describe(config: Config) -> str:
    """Describe the processes, devices, work and memory of a run in lines. Raises ValueError if it could not run."""
    environment = load_environment(config.environment)
    objective(config.algorithm)
    estimator(config.algorithm)
    train, held_out = (len(load_tasks(environment, split)) for split in ("train", "held_out"))
    lines = [
        f"topology   {config.topology}: {processes(config)}",
        f"tasks      {train} to train on, {held_out} held out, {min(held_out, config.eval.questions)} per evaluation",
        f"stages     {config.warmup.steps} warm-up steps of {config.warmup.episodes} episodes, "
        f"{config.steps} rl steps of {config.queries_per_step} queries x {config.algorithm.rollouts} rollouts",
    ]
    sizes = {}
    for name, agent in config.agents.items():
        load_tokenizer(name, agent)
        sizes[name] = weights, optimizer, cache = memory(name, agent, config)
        role = "trained" if agent.train else "frozen in the rl stage"
        lines.append(
            f"{name:10} {role}: {agent.model}\n           {weights:.2f} GiB weights, {optimizer:.2f} GiB masters, "
            f"gradients and moments, at most {cache:.2f} GiB key-value cache"
        )
    what = totals(config, sizes) + f" and activations of micro-batches of {config.compute.max_tokens} tokens"
    return "\n".join([*lines, f"memory     {what}"])


def processes(config: Config) -> str:
    """Return which processes a run has, and where they compute."""
    device = pick_device(config.compute)
    if config.colocated:
        return f"one process, {device}, {torch.get_num_threads()} threads"
    cluster = config.topology == "cluster"
    parts = [f"trainer of {name}{_ranks(agent, cluster)}" for name, agent in config.agents.items()]
    parts += [f"{servers(agent.vllm)} for {name}" for name, agent in config.agents.items() if agent.vllm]
    ahead = config.sampling.max_staleness
    pace = f"sampling at most {ahead} steps ahead" if ahead else "on-policy"
    if cluster:
        return f"{', '.join(parts)}, any number of rollout workers; {pace}"
    cards = f"{count} GPUs between them" if (count := len(gpus(config))) else str(device)
    return f"{', '.join(parts)}, {config.sampling.workers} x rollout worker, a launcher; {cards}; {pace}"


def _ranks(agent: AgentConfig, cluster: bool) -> str:
    if cluster:
        return " (as many ranks as torchrun starts)"
    return f" ({agent.ranks} ranks)" if agent.ranks > 1 else ""


def servers(vllm: VLLMConfig) -> str:
    """Return an agent's servers in words."""
    if vllm.urls:
        return f"vLLM at {' and '.join(vllm.urls)}"
    size = vllm.tensor_parallel * vllm.data_parallel
    return f"{vllm.servers} x vLLM server" + (f" of {size} GPUs" if size > 1 else "")


def totals(config: Config, sizes: dict[str, tuple[float, float, float]]) -> str:
    """Return the memory that each process needs, in words. sizes: what `memory` returns for each agent.

    A worker holds the weights and the cache of every agent that no server samples, a trainer those of its own agent.
    The memory of vLLM servers, by default most of their GPUs, is not included.
    """
    if config.colocated:
        return f"about {sum(map(sum, sizes.values())):.1f} GiB"
    trainers = {name: weights + optimizer for name, (weights, optimizer, _) in sizes.items()}
    held = [sizes[name] for name, agent in config.agents.items() if agent.vllm is None]
    worker = sum(weights + cache for weights, _, cache in held)
    parts = [f"{size:.1f} GiB for the trainer of {name}" for name, size in trainers.items()]
    parts.append(f"{worker:.1f} GiB for each rollout worker")
    if config.topology == "local":
        parts.append(f"{sum(trainers.values()) + config.sampling.workers * worker:.1f} GiB in all")
    return "about " + ", ".join(parts)


def memory(name: str, agent: AgentConfig, config: Config) -> tuple[float, float, float]:
    """Return the GiB of an agent's weights, of its masters, gradients and moments, and of a full key-value cache.

    Raises ValueError, naming the agent's model, if its config says nothing of attention heads.
    """
    model_config = AutoConfig.from_pretrained(agent.model, **code_settings(agent))
    per_token = cached_numbers(model_config)
    if per_token is None:
        raise ValueError(
            f"agents.{name}.model: {agent.model} is of type {model_config.model_type!r}, whose config has no number of "
            "layers and attention heads: expected a causal LM with attention"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=agent.trust_remote_code)
    parameters = sum(param.numel() for param in model.parameters())
    width = getattr(torch, config.compute.dtype).itemsize
    masters = 16 if width < 4 else 12
    cache = config.compute.concurrency * agent.max_context * per_token * width
    return parameters * width / GIB, parameters * masters / GIB, cache / GIB


def cached_numbers(config: PretrainedConfig) -> int | None:
    """Return how many numbers the keys and values of one token are at most, in all layers.

    Models without grouped queries, such as GPT-2, name no key-value heads: each head has its own. Multi-head latent
    attention is cached as the heads attend to it. Layers without attention are counted as if they had it. None if the
    config does not say.
    """
    text = config.get_text_config()
    layers, heads = (getattr(text, name, None) for name in ("num_hidden_layers", "num_attention_heads"))
    if not layers or not heads:
        return None
    if getattr(text, "kv_lora_rank", None):
        return int(layers * heads * (text.qk_nope_head_dim + text.qk_rope_head_dim + text.v_head_dim))
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return int(2 * layers * (getattr(text, "num_key_value_heads", None) or heads) * head_dim)
