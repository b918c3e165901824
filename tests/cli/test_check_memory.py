"""Test what the dry run says about memory: its exact parts against a real policy, and its advice if it is too much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM

from mgrpo.engine.batch.micro_batches import pack_calls
from mgrpo.engine.cli.check import fitting, memory
from mgrpo.engine.cli.check.describe import describe, report
from mgrpo.engine.cli.check.model_size import measure, size_of
from mgrpo.engine.config.schema import Config, parse_config
from mgrpo.engine.inference.kv_cache import KVCache
from mgrpo.engine.policy import forward
from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.system.memory import machine_memory, resident
from mgrpo.engine.types import Trajectory
from mgrpo.kernels import Objective
from toy import make_model, raw_config

SHAPE = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32, "vocab_size": 257}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": None, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
TOKENS = 96


def config_of(folder: Path, **compute: Any) -> Config:
    raw = raw_config(folder)
    raw["compute"] = {"dtype": "float32", "max_tokens": TOKENS, "device": "cpu"} | compute
    raw["algorithm"] |= {"kl_coef": 0.1}
    return parse_config(raw)


def batches(count: int) -> list[Any]:
    """Return micro-batches of two sequences each."""
    drawn, number, length = np.random.default_rng(0), 2 * count, TOKENS // 2
    tokens = drawn.integers(1, 257, (number, length + 1)).astype(np.int32)
    sampled = np.r_[False, np.ones(length, bool)]
    made = [Trajectory(row, sampled, np.zeros(length + 1, np.float32), 0) for row in tokens]
    return pack_calls(made, np.ones(number), np.full(number, 1.0 / (number * length)), TOKENS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tie", [True, False])
def test_weights_masters_moments_gradients_and_reference_are_those_of_a_policy(tmp_path: Path, dtype: str, tie: bool):
    make_model(tmp_path / "model", tie=tie)
    config = config_of(tmp_path, dtype=dtype)
    agent = config.agents["main"]
    policy = Policy("main", agent, config.compute)
    policy.keep_reference()
    policy.step(batches(2), Objective(sampler_cap=None))
    policy.forward_backward(batches(2), Objective(sampler_cap=None))
    weights, masters = policy.masters.params, policy.masters.weights

    def size(tensors: Any) -> int:
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors)

    found = memory.training(measure("main", agent, config.compute, False), agent, config, 1, "cpu")
    assert found.weights == size(weights.values())
    assert found.masters == size(masters[name] for name in masters if masters[name] is not weights[name])
    states = [value for state in policy.optimizer.state.values() for value in state.values() if value.ndim]
    assert found.moments == size(states)
    assert found.gradients == size(weight.grad for weight in policy.masters.trained)
    assert policy.reference is not None and found.reference == size(policy.reference.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_that_autograd_keeps(tmp_path: Path, checkpointing: bool):
    make_model(tmp_path / "model")
    config = config_of(tmp_path, activation_checkpointing=checkpointing)
    policy = Policy("main", config.agents["main"], config.compute)
    params = {param.untyped_storage().data_ptr() for param in policy.model.parameters()}
    kept: dict[int, tuple[int, Any]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in params:
            kept[storage.data_ptr()] = storage.nbytes(), storage
        return tensor

    batch = next(policy._prefetched(batches(1)))
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.actor(batch.input_ids_P, batch.positions_P, forward.layout(batch), lambda hidden, *_: hidden)
    passing = measure("main", config.agents["main"], config.compute, False).passing
    found = sum(size for size, _ in kept.values())
    if checkpointing:  # the layers' inputs, which the checkpoint itself keeps, and the layer that is computed again
        assert found < passing.checkpointed < passing.saved
    else:
        assert abs(passing.saved - found) <= 0.02 * found


@pytest.mark.parametrize(
    ("model_type", "changes", "numbers"),
    [
        ("llama", {"num_key_value_heads": 2}, 3 * 2 * 2 * 8),
        ("qwen3", {"num_key_value_heads": 2, "head_dim": 16}, 3 * 2 * 2 * 16),
        ("gpt2", {}, 3 * 2 * 4 * 8),  # it names no key-value heads
        ("gpt_neox", {}, 3 * 2 * 4 * 8),
        ("opt", {}, 3 * 2 * 4 * 8),
        ("mixtral", {"num_key_value_heads": 2, "intermediate_size": 48}, 3 * 2 * 2 * 8),
        ("deepseek_v3", {"num_key_value_heads": 4, **LATENT}, 3 * 4 * (6 + 4 + 5)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_of_every_kind_of_attention_is_counted(
    model_type: str, changes: dict[str, Any], numbers: int, dtype: torch.dtype
):
    config = AutoConfig.for_model(model_type, **SHAPE | changes)
    size = size_of(config, dtype, 64)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config)
    assert sum(size.cached) == numbers
    assert size.parameters == size.trained == sum(param.numel() for param in made.parameters())
    assert size.passing.saved > size.passing.checkpointed > 0


def test_the_cache_has_the_predicted_size_once_it_is_full(tmp_path: Path):
    make_model(tmp_path / "model")
    config = config_of(tmp_path, concurrency=5)
    agent = config.agents["main"]
    cache = KVCache(config.compute.concurrency, agent.max_context)
    cache.reserve(agent.max_context)
    for layer in range(2):
        cache.layer(layer, torch.zeros(2, 1, 8), torch.zeros(2, 1, 8))
    held = sum(x.numel() * x.itemsize for layer in cache.layers.values() for x in layer)
    assert memory.sampling(measure("main", agent, config.compute, False), agent, config, 1).cache == held


def test_ranks_hold_rows_of_masters_and_moments_and_whole_gradients(tmp_path: Path):
    make_model(tmp_path / "model")
    config = config_of(tmp_path, dtype="bfloat16")
    agent, size = config.agents["main"], measure("main", config.agents["main"], config.compute, False)
    alone, four = (memory.training(size, agent, config, ranks, "cpu") for ranks in (1, 4))
    assert four.masters == -(-alone.masters // 4) and four.moments == 8 * -(-size.trained // 4)
    assert four.gradients > alone.gradients
    assert four.weights < alone.weights or size.widest_layer * 2 >= size.all_layers


# ---- what does not fit


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 * 2**30), ("1.5 GiB", 3 * 2**29), ("16GB", 16 * 10**9), ("512MiB", 2**29)],
)
def test_sizes_are_read(text: str, size: int):
    assert fitting.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "80", "0GiB", "-3GiB", "many", "80Gi", "nan", "1e9GiB"])
def test_other_sizes_are_refused_by_the_option(text: str):
    with pytest.raises(ValueError, match=r"--device-memory: .* given: expected a size such as 80GiB"):
        fitting.parse_size(text)


@pytest.mark.parametrize(
    ("compute", "free", "told"),
    [
        ({"max_tokens": 4_000_000}, "1.9GiB", "lower compute.max_tokens = 4000000"),
        (
            {"max_tokens": 40_000_000, "activation_checkpointing": True},
            "1.9GiB",
            "lower compute.max_tokens = 40000000 (",
        ),
        ({"concurrency": 2_000_000}, "1.9GiB", "lower compute.concurrency"),
        ({}, "1KiB", "take a smaller agents.main.model, or a device with more memory"),
    ],
)
def test_a_run_that_cannot_fit_says_which_key_to_lower(tmp_path: Path, compute: dict[str, Any], free: str, told: str):
    make_model(tmp_path / "model")
    config = config_of(tmp_path, **compute)
    _, found = describe(config, device_memory=free)
    problem = next(fault for fault in found.faults if fault.startswith("memory: cpu has"))
    assert told in problem and "the run needs about" in problem


def test_a_gpu_elsewhere_is_described_where_there_is_none(tmp_path: Path):
    make_model(tmp_path / "model")
    config = config_of(tmp_path, device="cuda")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"compute\.device: 'cuda' given"):
            report(config, asks=False, device_memory=None, patience=5.0)
    told = report(config, asks=False, device_memory="80GiB", patience=5.0)
    assert "memory     cuda: about" in told and "of 80.00 GiB at the peak" in told


def test_processes_of_a_local_run_on_a_cpu_share_its_memory(tmp_path: Path):
    make_model(tmp_path / "model")
    config = config_of(tmp_path)
    local = msgspec.structs.replace(config, topology="local", run_dir=str(tmp_path / "local"))
    several = msgspec.structs.replace(local, sampling=msgspec.structs.replace(config.sampling, workers=3))

    def need(config: Config) -> float:
        told, _ = describe(config)
        line = next(line for line in told.splitlines() if line.startswith("memory"))
        return float(line.split("about ")[1].split(" ")[0])

    assert need(config) < need(local) < need(several)


def test_a_clusters_processes_are_told_one_by_one(tmp_path: Path):
    make_model(tmp_path / "model")
    told, _ = describe(msgspec.structs.replace(config_of(tmp_path), topology="cluster"), device_memory="1GiB")
    lines = [line.split(":")[0].split(maxsplit=1)[1] for line in told.splitlines() if line.startswith("memory")]
    assert (
        len(lines) == 3 and any("a rank of clerk" in line for line in lines) and any("worker" in line for line in lines)
    )


def test_this_machines_memory_and_that_of_its_control_group_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    total, free = machine_memory()
    assert 0 < free <= total and 0 < resident() < total
    group = tmp_path / "a" / "b"
    group.mkdir(parents=True)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "a" / "memory.max").write_text(f"{2**28}\n")
    (tmp_path / "a" / "memory.current").write_text(f"{2**27}\n")
    real = Path.read_text

    def read(path: Path, *args: Any, **kwargs: Any) -> str:
        return "0::/a/b\n" if str(path) == "/proc/self/cgroup" else real(path, *args, **kwargs)

    monkeypatch.setattr("mgrpo.engine.system.memory.CGROUPS", tmp_path)
    monkeypatch.setattr(Path, "read_text", read)
    assert machine_memory() == (2**28, 2**28 - 2**27)
