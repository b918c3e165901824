"""Test the dry run, and the evaluation of a decoupled run, whose agents each have their own checkpoints."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from mgrpo.engine.cli.check import describe, processes
from mgrpo.engine.config.schema import VLLMConfig
from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.training.launcher import tasks_of
from mgrpo.engine.training.trainer import AgentTrainer
from toy import make_model, toy_config

CPU = torch.device("cpu")


def test_an_agents_servers_are_told(tmp_path: Path):
    make_model(tmp_path / "model")
    config = toy_config(tmp_path, topology="local")
    for vllm, told in (
        (VLLMConfig(servers=2, tensor_parallel=4), "2 x vLLM server of 4 GPUs for main"),
        (VLLMConfig(urls=["http://a:1", "http://b:2"]), "vLLM at http://a:1 and http://b:2 for main"),
    ):
        main = msgspec.structs.replace(config.agents["main"], vllm=vllm)
        served = msgspec.structs.replace(config, agents={**config.agents, "main": main})
        assert told in processes.processes(served, CPU)
        worker = processes.placed(served, CPU)[-1]
        assert worker.samples == ("clerk",)


def test_processes_stand_on_the_gpus_that_the_launcher_gives_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    monkeypatch.setattr("mgrpo.engine.inference.vllm.api.installed", lambda: "0.32.0")
    make_model(tmp_path / "model")
    config = toy_config(
        tmp_path, topology="local", compute={"device": "auto"}, sampling={"workers": 2}, algorithm={"sampler_cap": 2.0}
    )
    served = msgspec.structs.replace(config.agents["main"], ranks=2, vllm=VLLMConfig(servers=1))
    config = msgspec.structs.replace(config, agents={**config.agents, "main": served})
    found = [process.device for process in processes.placed(config, torch.device("cuda"))]
    started = []
    for spec in tasks_of(config, tmp_path / "config.json", tmp_path):
        environments = [*spec.environments(0)] if hasattr(spec, "environments") else []
        if not spec.name.startswith("server"):
            started += [environment["CUDA_VISIBLE_DEVICES"] for environment in environments]
    assert found[:2] == ["cuda:3", "cuda:5"] and len(found) == 5
    ranks = [card for cards in started[:2] for card in cards.split(",")][:2]
    assert [device.removeprefix("cuda:") for device in found] == [*ranks, *started[2:]]


@pytest.mark.parametrize("key", ["objective", "advantage"])
def test_a_function_of_the_users_that_is_not_there_is_told_before_anything_runs(tmp_path: Path, key: str):
    make_model(tmp_path / "model")
    config = toy_config(tmp_path, algorithm={"rollouts": 4, key: "nowhere.py:f"})
    with pytest.raises(ValueError, match=rf"algorithm\.{key}: nowhere\.py is not a file"):
        describe.describe(config)
    policy = Policy("main", config.agents["main"], config.compute)
    with pytest.raises(ValueError, match=rf"algorithm\.{key}: nowhere\.py is not a file"):
        AgentTrainer(config, policy, str(tmp_path))
