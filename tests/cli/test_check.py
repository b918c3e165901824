"""Test the dry run, and the evaluation of a decoupled run, whose agents each have their own checkpoints."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from transformers import AutoConfig, GPT2Config, MambaConfig

from mgrpo.engine.cli import check, evaluate
from mgrpo.engine.config.schema import VLLMConfig
from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.run.directory import RunDirectory
from mgrpo.engine.training.leader import CheckpointInfo
from mgrpo.engine.training.trainer import AgentTrainer
from toy import make_model, toy_config


def save(policy: Policy, run: Path, steps: list[int]) -> None:
    """Write checkpoints as the agent's trainer does, later ones with other weights."""
    own = RunDirectory(run / "agents" / policy.name)
    for step in steps:

        def write(folder: Path, step: int = step) -> None:
            saved = CheckpointInfo(stage="rl", step=step, policy=policy.save_state(folder / policy.name))
            (folder / "state.json").write_bytes(msgspec.json.encode(saved))

        own.save_checkpoint(f"rl-{step:05d}", write, keep=9)
        for weight in policy.masters.weights.values():
            weight.data.add_(1.0)
    own.close()


def test_an_agents_servers_are_told_and_its_weights_are_not_the_workers(tmp_path: Path):
    make_model(tmp_path / "model")
    config = toy_config(tmp_path, topology="local")
    sizes = dict.fromkeys(config.agents, (1.0, 3.0, 0.5))
    assert "1.5 GiB" not in check.totals(config, sizes) and "3.0 GiB for each rollout worker" in check.totals(
        config, sizes
    )
    for vllm, told in (
        (VLLMConfig(servers=2, tensor_parallel=4), "2 x vLLM server of 4 GPUs for main"),
        (VLLMConfig(urls=["http://a:1", "http://b:2"]), "vLLM at http://a:1 and http://b:2 for main"),
    ):
        main = msgspec.structs.replace(config.agents["main"], vllm=vllm)
        served = msgspec.structs.replace(config, agents={**config.agents, "main": main})
        assert told in check.processes(served)
        assert "1.5 GiB for each rollout worker" in check.totals(served, sizes)


SHAPE = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32, "vocab_size": 257}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": None, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}


@pytest.mark.parametrize(
    ("model_type", "changes", "numbers"),
    [
        ("llama", {"num_key_value_heads": 2}, 3 * 2 * 2 * 8),
        ("qwen3", {"num_key_value_heads": 2, "head_dim": 16}, 3 * 2 * 2 * 16),
        ("gpt2", {}, 3 * 2 * 4 * 8),  # it names no key-value heads
        ("gpt_neox", {}, 3 * 2 * 4 * 8),
        ("opt", {}, 3 * 2 * 4 * 8),
        ("bloom", {}, 3 * 2 * 4 * 8),
        ("falcon", {}, 3 * 2 * 4 * 8),  # at most: it may share one head
        ("deepseek_v3", {"num_key_value_heads": 4, **LATENT}, 3 * 4 * (6 + 4 + 5)),
    ],
)
def test_the_cache_of_every_kind_of_attention_is_counted(model_type, changes, numbers):
    assert check.cached_numbers(AutoConfig.for_model(model_type, **SHAPE | changes)) == numbers


def test_a_config_without_attention_heads_has_no_cache_to_count():
    assert check.cached_numbers(MambaConfig(hidden_size=32, num_hidden_layers=3)) is None


def test_a_model_without_key_value_heads_in_its_config_is_described(tmp_path: Path):
    make_model(tmp_path / "model")
    config = toy_config(tmp_path)
    GPT2Config(vocab_size=257, n_embd=32, n_layer=3, n_head=4, n_positions=256).save_pretrained(tmp_path / "model")
    described = check.describe(config)
    assert "GiB key-value cache" in described
    _, _, cache = check.memory("main", config.agents["main"], config)
    tokens = config.compute.concurrency * config.agents["main"].max_context
    assert cache == tokens * 3 * 2 * 4 * 8 * 4 / 2**30
    MambaConfig(vocab_size=257, hidden_size=32, num_hidden_layers=3).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"agents\.main\.model: .* is of type 'mamba', whose config has no number of"):
        check.describe(config)


def test_the_last_checkpoint_of_each_agent_is_evaluated(tmp_path: Path):
    make_model(tmp_path / "model")
    config, run = toy_config(tmp_path), tmp_path / "run"
    policies = {name: Policy(name, agent, config.compute) for name, agent in config.agents.items()}
    save(policies["main"], run, [2, 10])
    with pytest.raises(ValueError, match="expected a checkpoint of agent 'clerk' in it"):
        evaluate.evaluate(config, run)
    save(policies["clerk"], run, [4])
    told = evaluate.evaluate(config, run)
    assert told.startswith(f"{run}: main rl step 10, clerk rl step 4: held-out accuracy ")
    assert "on 10 questions" in told


@pytest.mark.parametrize("key", ["objective", "advantage"])
def test_a_function_of_the_users_that_is_not_there_is_told_before_anything_runs(tmp_path: Path, key: str):
    make_model(tmp_path / "model")
    config = toy_config(tmp_path, algorithm={"rollouts": 4, key: "nowhere.py:f"})
    with pytest.raises(ValueError, match=rf"algorithm\.{key}: nowhere\.py is not a file"):
        check.describe(config)
    policy = Policy("main", config.agents["main"], config.compute)
    with pytest.raises(ValueError, match=rf"algorithm\.{key}: nowhere\.py is not a file"):
        AgentTrainer(config, policy, str(tmp_path))
