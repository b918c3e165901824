"""Where an agent's servers are and how new weights get there: what launcher, trainers and workers must agree on.

The launcher of a local run starts servers at ports that are free, and says in the environment where; elsewhere the
config names them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import msgspec

from mgrpo.engine.config.schema import AgentConfig

PLACES = "MGRPO_SERVERS"  # of the environment: of each agent its Place, as JSON


class Place(msgspec.Struct, frozen=True):
    """urls: of all its servers. transfer: "tcp", "nccl" or "ipc"."""

    urls: list[str]
    transfer: str


def transfer_kind(chosen: str, trainer: set[str], servers: set[str]) -> str:
    """How weights get from a trainer's GPUs to those of its servers. Empty sets: they compute on CPUs."""
    if chosen != "auto":
        return chosen
    if not trainer or not servers:
        return "tcp"
    return "ipc" if trainer & servers else "nccl"


def announce(places: Mapping[str, Place]) -> dict[str, str]:
    """The environment in which `find` finds them."""
    return {PLACES: msgspec.json.encode(places).decode()} if places else {}


def find(name: str, agent: AgentConfig) -> Place:
    """Raises ValueError if neither the config nor a launcher says where its servers are."""
    assert agent.vllm is not None
    if agent.vllm.urls:
        chosen = agent.vllm.transfer
        return Place(agent.vllm.urls, "tcp" if chosen == "auto" else chosen)
    places = msgspec.json.decode(os.environ.get(PLACES, "{}"), type=dict[str, Place])
    if name not in places:
        raise ValueError(f"agents.{name}.vllm.urls: [] given: expected the servers' URLs, or a launcher's {PLACES}")
    return places[name]
