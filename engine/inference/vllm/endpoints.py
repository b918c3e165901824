"""Find an agent's servers, and the way new weights reach them, for the launcher, trainers and workers.

The launcher of a local run starts servers at free ports and passes their URLs on in the environment. In other runs the
config names them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import msgspec

from mgrpo.engine.config.schema import AgentConfig

SERVERS = "MGRPO_SERVERS"  # environment variable with the Endpoints of each agent, as JSON


class Endpoints(msgspec.Struct, frozen=True):
    """Hold the URLs of all servers of an agent. transfer: "tcp", "nccl" or "ipc"."""

    urls: list[str]
    transfer: str


def transfer_kind(chosen: str, trainer: set[str], servers: set[str]) -> str:
    """Return how weights get from a trainer's GPUs to those of its servers. An empty set stands for CPUs."""
    if chosen != "auto":
        return chosen
    if not trainer or not servers:
        return "tcp"
    return "ipc" if trainer & servers else "nccl"


def announce(endpoints: Mapping[str, Endpoints]) -> dict[str, str]:
    """Return the environment variables that tell `find` where servers are."""
    return {SERVERS: msgspec.json.encode(endpoints).decode()} if endpoints else {}


def find(name: str, agent: AgentConfig) -> Endpoints:
    """Return an agent's servers. Raises ValueError if neither the config nor a launcher names them."""
    assert agent.vllm is not None
    if agent.vllm.urls:
        chosen = agent.vllm.transfer
        return Endpoints(agent.vllm.urls, "tcp" if chosen == "auto" else chosen)
    endpoints = msgspec.json.decode(os.environ.get(SERVERS, "{}"), type=dict[str, Endpoints])
    if name not in endpoints:
        raise ValueError(f"agents.{name}.vllm.urls: [] given: expected the servers' URLs, or {SERVERS} from a launcher")
    return endpoints[name]
