"""`mgrpo export`: an agent out of a run directory, by agent and step, with a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mgrpo.engine.cli.export import export
from mgrpo.engine.config.schema import Config, dump_config
from mgrpo.engine.model.sharding import Shards, write_shards
from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.run.directory import RunDirectory, RunPaths
from mgrpo.engine.run.manifest import verify_version
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
    manifest = verify_version(run.path / "export" / "main")
    assert (manifest.kind, manifest.agent, manifest.stage, manifest.step) == ("model", "main", "rl", 2)
    assert (manifest.base, manifest.dtype, len(manifest.shards)) == ("model", "float32", 1)


def test_the_card_has_the_curves_as_a_figure_and_in_numbers(config: Config, run: RunDirectory) -> None:
    for step in range(40):
        run.log_metrics({"stage": "rl", "step": step, "main/reward_mean": step / 40, "time/step": 1.0})
    run.log_metrics({"stage": "rl", "step": 0, "eval/held_out_accuracy": 0.25, "eval/questions": 4})
    save(run, config, "rl-00039", ["main"])
    export(run.path, "main", None, None, "float32")
    folder = run.path / "export"
    card = (folder / "main" / "README.md").read_text()
    table = [line for line in card.splitlines() if line.startswith("| ")]
    assert table[0] == "| rl step | eval/held_out_accuracy | main/reward_mean | clerk/reward_mean |"
    assert table[2] == "| 0 | 0.25 | 0 |  |" and table[-1] == "| 39 |  | 0.975 |  |" and len(table) == 2 + 12
    assert "![Curves of the run](curves.png)" in card
    assert (run.path / "export" / "main" / "curves.png").stat().st_size > 1000


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
    with pytest.raises(ValueError, match=r"--push: 'lab/a' given for several agents: expected --agent too"):
        export(run.path, None, None, None, "float32", "lab/a")
    with pytest.raises(ValueError, match=r"RUN: .* expected a run directory"):
        export(tmp_path / "nothing", None, None, None, "float32")


def test_damage_and_a_full_disk_leave_nothing(config: Config, run: RunDirectory, tmp_path: Path, monkeypatch) -> None:
    save(run, config, "rl-00001", ["main"])

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("mgrpo.engine.model.pretrained.write_hashed", full)
        with pytest.raises(OSError, match=r"cannot write the model: No space left.*out"):
            export(run.path, "main", None, tmp_path / "out", "float32")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
    path = RunPaths(run.path).checkpoints / "rl-00001" / "main" / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"weights\.safetensors"):
        export(run.path, "main", None, tmp_path / "out", "float32")


def test_an_export_is_pushed_when_it_is_whole(
    config: Config, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(run, config, "rl-00001", ["main"])
    pushed: list[tuple[str, list[str]]] = []

    def push(folder: Path, name: str) -> str:
        verify_version(folder)
        pushed.append((name, sorted(path.name for path in folder.iterdir())))
        return f"{name}: uploaded"

    monkeypatch.setattr("mgrpo.engine.cli.export.push_directory", push)
    said = export(run.path, "main", None, None, "bfloat16", "lab/planner")
    assert said.splitlines()[1] == "lab/planner: uploaded"
    ((name, files),) = pushed
    assert name == "lab/planner"
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors", "mgrpo.json"} <= set(files)


def test_a_damaged_shard_is_named(config: Config, run: RunDirectory) -> None:
    save(run, config, "rl-00001", ["main"])
    export(run.path, "main", None, None, "bfloat16")
    path = run.path / "export" / "main" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: expected SHA-256"):
        Policy.of(path.parent, max_context=64)
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors: expected \d+ bytes, it has \d+"):
        verify_version(path.parent)
    path.unlink()
    with pytest.raises(ValueError, match="it is missing"):
        verify_version(path.parent)


def test_a_checkpoint_that_is_pruned_meanwhile_is_said(config: Config, run: RunDirectory, monkeypatch) -> None:
    save(run, config, "rl-00001", ["main"])
    read = Shards.read

    def read_and_prune(self: Shards, name: str) -> torch.Tensor:
        whole = read(self, name).clone()
        shutil.rmtree(run.checkpoints, ignore_errors=True)
        return whole

    monkeypatch.setattr(Shards, "read", read_and_prune)
    with pytest.raises(ValueError, match="rl-00001 was deleted meanwhile"):
        export(run.path, "main", None, None, "bfloat16")
    assert not list((run.path / "export").iterdir())
