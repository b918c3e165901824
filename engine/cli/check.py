"""What a config would run, and what a checkpoint is worth: the commands that train nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mgrpo.engine.batch.advantages import estimator
from mgrpo.engine.batch.objective import objective
from mgrpo.engine.config.schema import AgentConfig, Config, VLLMConfig
from mgrpo.engine.model.causal_lm import load_tokenizer, pick_device
from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.rollout.curriculum import accuracy, eval_jobs, load_tasks
from mgrpo.engine.rollout.episodes import Episodes, load_environment
from mgrpo.engine.run.directory import RunDirectory, latest_of
from mgrpo.engine.system.process import keep_memory
from mgrpo.engine.training.colocated import restore
from mgrpo.engine.training.launcher import gpus
from mgrpo.engine.training.leader import read_checkpoint_info

GIB = 2**30


def describe(config: Config) -> str:
    """Processes, devices, work and memory of a run, in plain lines. Raises ValueError for what could not run."""
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
        sizes[name] = weights, optimizer, cache = memory(agent, config)
        role = "trained" if agent.train else "frozen in the rl stage"
        lines.append(
            f"{name:10} {role}: {agent.model}\n           {weights:.2f} GiB weights, {optimizer:.2f} GiB masters, "
            f"gradients and moments, at most {cache:.2f} GiB key-value cache"
        )
    what = totals(config, sizes) + f" and activations of micro-batches of {config.compute.max_tokens} tokens"
    return "\n".join([*lines, f"memory     {what}"])


def processes(config: Config) -> str:
    """Which processes a run has, and where they compute."""
    device = pick_device(config.compute)
    if config.topology == "colocated":
        return f"one process, {device}, {torch.get_num_threads()} threads"
    trainers = [
        f"trainer of {name}" + (f" ({agent.ranks} ranks)" if agent.ranks > 1 else "")
        for name, agent in config.agents.items()
    ]
    trainers += [f"{servers(agent.vllm)} for {name}" for name, agent in config.agents.items() if agent.vllm]
    ahead = config.sampling.max_staleness
    pace = f"sampling at most {ahead} steps ahead" if ahead else "on-policy"
    if config.topology == "cluster":
        trainers[: len(config.agents)] = [
            f"trainer of {name} (as many ranks as torchrun starts)" for name in config.agents
        ]
        return f"{', '.join(trainers)}, any number of rollout workers; {pace}"
    cards = f"{count} GPUs between them" if (count := len(gpus(config))) else str(device)
    return f"{', '.join(trainers)}, {config.sampling.workers} x rollout worker, a launcher; {cards}; {pace}"


def servers(vllm: VLLMConfig) -> str:
    """An agent's servers, in words."""
    if vllm.urls:
        return f"vLLM at {' and '.join(vllm.urls)}"
    size = vllm.tensor_parallel * vllm.data_parallel
    return f"{vllm.servers} x vLLM server" + (f" of {size} GPUs" if size > 1 else "")


def totals(config: Config, sizes: dict[str, tuple[float, float, float]]) -> str:
    """sizes: of each agent, as `memory`. A worker holds weights and cache of every agent that no server samples, a
    trainer its own agent's. What vLLM servers take, most of their GPUs unless told otherwise, is not in it."""
    if config.topology == "colocated":
        return f"about {sum(map(sum, sizes.values())):.1f} GiB"
    trainers = {name: weights + optimizer for name, (weights, optimizer, _) in sizes.items()}
    held = [sizes[name] for name, agent in config.agents.items() if agent.vllm is None]
    worker = sum(weights + cache for weights, _, cache in held)
    parts = [f"{size:.1f} GiB for the trainer of {name}" for name, size in trainers.items()]
    parts.append(f"{worker:.1f} GiB for each rollout worker")
    if config.topology == "local":
        parts.append(f"{sum(trainers.values()) + config.sampling.workers * worker:.1f} GiB in all")
    return "about " + ", ".join(parts)


def memory(agent: AgentConfig, config: Config) -> tuple[float, float, float]:
    """GiB of an agent's model, of its fp32 master weights, gradients and moments, and of a full key-value cache."""
    model_config = AutoConfig.from_pretrained(agent.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    parameters = sum(param.numel() for param in model.parameters())
    width = getattr(torch, config.compute.dtype).itemsize
    head_dim = getattr(model_config, "head_dim", None) or model_config.hidden_size // model_config.num_attention_heads
    per_token = 2 * model_config.num_hidden_layers * model_config.num_key_value_heads * head_dim * width
    masters = 16 if width < 4 else 12
    cache = config.compute.concurrency * agent.max_context * per_token
    return parameters * width / GIB, parameters * masters / GIB, cache / GIB


def evaluate(config: Config, checkpoint: Path) -> str:
    """Held-out accuracy of a checkpoint, or of the last one of each agent of a decoupled run. In a sentence."""
    keep_memory()
    if not checkpoint.is_dir():
        raise ValueError(f"--checkpoint: {checkpoint} is no directory, expected one of a run's checkpoints/")
    environment = load_environment(config.environment)
    policies = {name: Policy(name, agent, config.compute) for name, agent in config.agents.items()}
    told = _restore(policies, checkpoint)
    samplers = {name: policy.sampler() for name, policy in policies.items()}
    jobs = eval_jobs(load_tasks(environment, "held_out"), config)
    row = accuracy(Episodes(config, environment, dict(samplers)).run(jobs))
    return (
        f"{checkpoint}: {told}: held-out accuracy {row['eval/held_out_accuracy']:.1%} "
        f"(95 % interval {row['eval/low']:.1%} to {row['eval/high']:.1%}) on {row['eval/questions']} questions, "
        f"{row['eval/failed']} of them failed or unscored"
    )


def _restore(policies: dict[str, Policy], checkpoint: Path) -> str:
    """Says what was loaded."""
    if not (checkpoint / "agents").is_dir():
        stage, step = restore(policies, RunDirectory.open_checkpoint(checkpoint))
        return f"{stage} step {step}"
    told = []
    for name, policy in policies.items():
        folder = latest_of(checkpoint / "agents" / name / "checkpoints")
        if folder is None:
            raise ValueError(f"--checkpoint: {checkpoint} given: expected a checkpoint of agent {name!r} in it")
        saved = read_checkpoint_info(folder)
        policy.load_state(folder / name)
        told.append(f"{name} {saved.stage} step {saved.step}")
    return ", ".join(told)
