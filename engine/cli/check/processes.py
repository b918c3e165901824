"""Say which processes a run has, and on which device each computes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice

import torch

from mgrpo.engine.config.schema import AgentConfig, Config, VLLMConfig
from mgrpo.engine.model.causal_lm import pick_device
from mgrpo.engine.system.words import counted
from mgrpo.engine.training.launcher import gpus


@dataclass(frozen=True)
class Process:
    """Describe a process. device: where it computes. trains, samples: the agents that it trains and samples itself."""

    name: str
    device: str
    trains: tuple[str, ...] = ()
    samples: tuple[str, ...] = ()
    ranks: int = 1


def device_of(config: Config, elsewhere: bool) -> torch.device:
    """Return the device of a run. elsewhere: on another machine, whose GPUs this one need not have.

    Raises ValueError as `pick_device` does.
    """
    if elsewhere and config.compute.device.split(":")[0] in ("auto", "cuda"):
        return torch.device("cuda" if config.compute.device == "auto" else config.compute.device)
    return pick_device(config.compute)


def placed(config: Config, device: torch.device) -> list[Process]:
    """Return the processes of a run that this machine starts, or one of each kind of a cluster's.

    GPUs are dealt as the launcher does: trainers first, then servers, then workers.
    """
    agents, own = config.agents, str(device)
    inside = tuple(name for name, agent in agents.items() if agent.vllm is None)
    if config.colocated:
        return [Process("the run", own, tuple(agents), tuple(agents))]
    if config.topology == "cluster":
        found = [Process("trainer", f"{own} of a rank of {name}", (name,), (), agents[name].ranks) for name in agents]
        return [*found, Process("worker", f"{own} of a rollout worker", (), inside)]
    cards = cycle([f"cuda:{card}" for card in gpus(config)] if device.type == "cuda" and gpus(config) else [own])
    found = []
    for name, agent in agents.items():
        given = list(islice(cards, agent.ranks))
        found += [Process(f"trainer of {name}", card, (name,), (), agent.ranks) for card in given]
    for agent in agents.values():
        if agent.vllm and not agent.vllm.urls and not agent.vllm.gpus:
            list(islice(cards, agent.vllm.servers * agent.vllm.tensor_parallel * agent.vllm.data_parallel))
    alone = not inside  # a worker that samples nothing itself gets no GPU
    found += [Process(f"worker {i}", own if alone else next(cards), (), inside) for i in range(config.sampling.workers)]
    return found


def processes(config: Config, device: torch.device) -> str:
    """Return which processes a run has, and where they compute, in words."""
    if config.colocated:
        return f"one process, {device}, {counted(torch.get_num_threads(), 'thread')}"
    cluster = config.topology == "cluster"
    parts = [f"trainer of {name}{_ranks(agent, cluster)}" for name, agent in config.agents.items()]
    parts += [f"{servers(agent.vllm)} for {name}" for name, agent in config.agents.items() if agent.vllm]
    ahead = config.sampling.max_staleness
    pace = f"sampling at most {counted(ahead, 'step')} ahead" if ahead else "on-policy"
    if cluster:
        return f"{', '.join(parts)}, any number of rollout workers; {pace}"
    cards = f"{counted(count, 'GPU')} between them" if (count := len(gpus(config))) else str(device)
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
