"""`mgrpo export`: an agent out of a run directory, by agent and step, with a model card."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mgrpo.engine.cli.export import export
from mgrpo.engine.config.schema import Config, dump_config
from mgrpo.engine.model.sharding import write_shards
from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.run.directory import RunDirectory, RunPaths
from toy import make_model, toy_config


def save(run: RunDirectory, config: Config, name: str, agents: list[str]) -> dict[str, Policy]:
    """Write a checkpoint of random weights, as a training does."""
    policies = {agent: Policy(agent, config.agents[agent], config.compute) for agent in agents}
    with torch.no_grad():
        for weight in (weight for policy in policies.values() for weight in policy.masters.weights.values()):
            weight.normal_()

    def write(folder: Path) -> None:
        for agent, policy in policies.items():
            policy.save_state(folder / agent)

    run.save_checkpoint(name, write, keep=9)
    return policies


@pytest.fixture
def config(tmp_path: Path) -> Config:
    make_model(tmp_path / "model")
    return toy_config(tmp_path)


@pytest.fixture
def run(config: Config) -> Iterator[RunDirectory]:
    with closing(RunDirectory(config.run_dir)) as run:
        run.write_config(dump_config(config))
        yield run


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def test_each_agent_of_the_latest_checkpoint_becomes_a_model(config: Config, run: RunDirectory) -> None:
    save(run, config, "rl-00001", ["main", "clerk"])
    policies = save(run, config, "rl-00002", ["main", "clerk"])
    said = export(run.path, None, None, None, "float32")
    assert [line.split(": ")[1].split(",")[0] for line in said.splitlines()] == [
        "main after rl-00002",
        "clerk after rl-00002",
    ]
    for name, policy in policies.items():
        found = weights_of(run.path / "export" / name)
        assert all(torch.equal(found[key], weight) for key, weight in policy.masters.weights.items())
    AutoTokenizer.from_pretrained(run.path / "export" / "main")
    card = (run.path / "export" / "main" / "README.md").read_text()
    assert "vllm" not in json.loads(card.split("```json")[1].split("```")[0])["main"]
    assert "agent `main`" in card and "rl step 2" in card and str(run.path) not in card


def test_one_agent_of_one_step_in_bf16(config: Config, run: RunDirectory, tmp_path: Path) -> None:
    policies = save(run, config, "rl-00001", ["main", "clerk"])
    save(run, config, "rl-00002", ["main", "clerk"])
    export(run.path, "clerk", 1, tmp_path / "out", "bfloat16")
    found = weights_of(tmp_path / "out")
    weights = policies["clerk"].masters.weights
    assert all(torch.equal(found[key], weight.bfloat16().float()) for key, weight in weights.items())


def test_rows_of_three_ranks_become_whole_weights(config: Config, run: RunDirectory, tmp_path: Path) -> None:
    policy = Policy("main", config.agents["main"], config.compute)
    weights = {name: torch.randn_like(weight) for name, weight in policy.masters.weights.items()}

    def write(folder: Path) -> None:
        policy.save_state(folder / "main")
        for rank in range(3):
            write_shards(
                folder / "main", "weights", {name: w.tensor_split(3)[rank] for name, w in weights.items()}, rank
            )

    run.save_checkpoint("rl-00001", write, keep=9)
    export(run.path, "main", None, tmp_path / "out", "float32")
    found = weights_of(tmp_path / "out")
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


def test_what_is_not_there_is_said(config: Config, run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a checkpoint in it"):
        export(run.path, None, None, None, "float32")
    save(run, config, "rl-00001", ["main"])
    for agent, step, dtype, message in (
        ("chef", None, "float32", "--agent: 'chef' given: expected one of"),
        ("main", 7, "float32", r"--step: 7 given: expected one of .*\['rl-00001'\]"),
        ("main", None, "int8", "--dtype: 'int8' given"),
        ("clerk", None, "float32", "--agent: 'clerk' given: expected an agent that is trained"),
    ):
        with pytest.raises(ValueError, match=message):
            export(run.path, agent, step, tmp_path / "out", dtype)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"--out: .* exists"):
        export(run.path, "main", None, tmp_path / "out", "float32")
    with pytest.raises(ValueError, match=r"RUN: .* expected a run directory"):
        export(tmp_path / "nothing", None, None, None, "float32")


def test_damage_and_a_full_disk_leave_nothing(config: Config, run: RunDirectory, tmp_path: Path, monkeypatch) -> None:
    save(run, config, "rl-00001", ["main"])

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("mgrpo.engine.model.pretrained.save_file", full)
        with pytest.raises(OSError, match="No space left"):
            export(run.path, "main", None, tmp_path / "out", "float32")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
    path = RunPaths(run.path).checkpoints / "rl-00001" / "main" / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"weights\.safetensors"):
        export(run.path, "main", None, tmp_path / "out", "float32")
