"""Test a trainer with vLLM servers: weights are sent when they moved, and again to a server that was away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from mgrpo.engine.config.schema import VLLMConfig
from mgrpo.engine.inference.vllm import endpoints
from mgrpo.engine.inference.vllm.auth import TOKEN
from mgrpo.engine.inference.vllm.endpoints import Endpoints, announce, find, transfer_kind
from mgrpo.engine.run.weights import Published
from mgrpo.engine.store import Group
from mgrpo.engine.training import decoupled as agent_module
from mgrpo.engine.training.decoupled import AgentProcess
from mgrpo.engine.training.leader import StepGroups
from mgrpo.engine.types import WeightsVersion
from toy import make_model, toy_config

FILE = Published("main/v0.safetensors", "", 0)
URLS = ["http://127.0.0.1:1", "http://127.0.0.1:2"]


class Transfer:
    """Stand in for the real transfer and note what it is given."""

    def __init__(self, urls: list[str], token: str, kind: str, manifest: Any):
        self.urls, self.token, self.kind, self.manifest = urls, token, kind, manifest
        self.updates: list[WeightsVersion] = []
        self.names: list[str] = []
        self.asleep = False
        self.away: list[str] = []

    def update(self, tensors: Iterator[tuple[str, torch.Tensor]], version: WeightsVersion) -> list[str]:
        self.updates.append(version)
        self.names = [name for name, tensor in tensors if list(tensor.shape) == self.manifest[name][1]]
        assert all(name in self.manifest for name in self.names)
        self.asleep = False
        return self.urls

    def behind(self) -> list[str]:
        return [self.away.pop()] if self.away else []

    def sleep(self) -> None:
        self.asleep = True


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AgentProcess:
    make_model(tmp_path / "model")
    config = toy_config(tmp_path, topology="local")
    main = msgspec.structs.replace(config.agents["main"], vllm=VLLMConfig(urls=URLS))
    config = msgspec.structs.replace(config, agents={**config.agents, "main": main})
    monkeypatch.setenv(TOKEN, "secret")
    monkeypatch.setattr(agent_module, "Transfer", Transfer)
    monkeypatch.setattr(agent_module, "ASK", 0.0)
    return AgentProcess(config, "main", NoGroups())  # type: ignore[arg-type]


class NoGroups:
    """Stand in for rank 0's leader: there is nothing to train on for so many polls."""

    empty = 3

    def next_groups(self, step: int) -> StepGroups:
        self.empty -= 1
        return StepGroups() if self.empty >= 0 else StepGroups([Group(0, "a", 0, [], [])])


def test_weights_go_to_the_servers_when_they_moved_and_only_then(process: AgentProcess):
    transfer: Any = process.servers.transfer  # type: ignore[union-attr]
    assert (transfer.urls, transfer.token, transfer.kind) == (URLS, "secret", "tcp")
    process.published = 0, FILE
    process._push(0)
    process._push(1)  # no optimizer step was made
    process.policy.version = 1
    process._push(2)  # one was made, and moved nothing: the same version was published again
    process.published = 1, FILE
    process._push(3)
    assert transfer.updates == [WeightsVersion(0, 0), WeightsVersion(1, 3)]
    assert transfer.names == [name for name, _ in process.policy.full_weights()] == list(transfer.manifest)


def test_a_server_that_came_back_gets_the_weights_while_the_trainer_waits_for_groups(process: AgentProcess):
    transfer: Any = process.servers.transfer  # type: ignore[union-attr]
    process.published = 0, FILE
    process._push(5)
    transfer.away = [URLS[1]]
    assert process._wait_for_groups(6).groups
    assert transfer.updates == [WeightsVersion(0, 5)] * 2, "under the same version that the other servers have"


def test_on_a_shared_gpu_the_servers_sleep_while_it_trains(process: AgentProcess):
    transfer: Any = process.servers.transfer  # type: ignore[union-attr]
    process.servers.sleep()  # type: ignore[union-attr]
    assert not transfer.asleep
    transfer.kind = "ipc"
    process.servers.sleep()  # type: ignore[union-attr]
    assert transfer.asleep


def test_without_the_token_or_a_place_it_does_not_begin(process: AgentProcess, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(TOKEN)
    with pytest.raises(ValueError, match=r"MGRPO_SERVER_TOKEN is not set: .* agents\.main were started with"):
        agent_module.Servers(process.config, "main", process.policy)


# ---- finding the servers


def test_what_a_launcher_announces_is_found_but_what_the_config_names_comes_first(monkeypatch: pytest.MonkeyPatch):
    agent = msgspec.structs.replace(toy_config(Path("/nowhere")).agents["main"], vllm=VLLMConfig())
    monkeypatch.delenv(endpoints.SERVERS, raising=False)
    with pytest.raises(ValueError, match=r"agents\.main\.vllm\.urls: \[\] given: expected the servers' URLs"):
        find("main", agent)
    servers = {"main": Endpoints(URLS, "ipc"), "clerk": Endpoints(URLS[:1], "tcp")}
    for key, value in announce(servers).items():
        monkeypatch.setenv(key, value)
    assert find("main", agent) == servers["main"] and announce({}) == {}
    for chosen, kind in (("auto", "tcp"), ("nccl", "nccl")):
        own = msgspec.structs.replace(agent, vllm=VLLMConfig(urls=["http://own:1"], transfer=chosen))
        assert find("main", own) == Endpoints(["http://own:1"], kind)


@pytest.mark.parametrize(
    ("chosen", "trainer", "servers", "kind"),
    [
        ("auto", set(), set(), "tcp"),
        ("auto", {"0"}, set(), "tcp"),
        ("auto", {"0"}, {"1"}, "nccl"),
        ("auto", {"0", "1"}, {"1"}, "ipc"),
        ("tcp", {"0"}, {"0"}, "tcp"),
    ],
)
def test_the_way_of_the_weights(chosen, trainer, servers, kind):
    assert transfer_kind(chosen, trainer, servers) == kind
