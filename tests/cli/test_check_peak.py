"""Compare the predicted memory with what a process really has at its peak: steps of a tiny and of a larger model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

STEP = """
import json, sys
from pathlib import Path
import numpy as np
from mgrpo.engine.batch.micro_batches import pack_calls
from mgrpo.engine.cli.check.memory import training
from mgrpo.engine.cli.check.fitting import HEAP
from mgrpo.engine.cli.check.model_size import measure
from mgrpo.engine.config.schema import parse_config
from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.system.memory import peak_resident, resident
from mgrpo.engine.system.process import keep_memory
from mgrpo.engine.types import Trajectory
from mgrpo.kernels import Objective

folder, tokens, vocabulary, dtype = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
compute = {"device": "cpu", "dtype": dtype, "max_tokens": tokens}
agents = {"main": {"model": folder, "max_context": tokens // 4 + 1}}
raw = {"run_dir": "run", "environment": {"use": "a.py:A"}, "agents": agents, "compute": compute}
config = parse_config(raw)
agent = config.agents["main"]
found = training(measure("main", agent, config.compute, False), agent, config, 1, "cpu")
keep_memory()
before = resident()
policy = Policy("main", agent, config.compute)
length, number = tokens // 4, 12
sampled = np.r_[False, np.ones(length, bool)]
ids = np.random.default_rng(0).integers(1, vocabulary, (number, length + 1)).astype(np.int32)
made = [Trajectory(row, sampled, np.zeros(length + 1, np.float32), 0) for row in ids]
batches = pack_calls(made, np.ones(number), np.full(number, 1 / (number * length)), tokens)
for _ in range(2):
    policy.step(batches, Objective(sampler_cap=None))
peak = peak_resident()
print(json.dumps({"predicted": int(before + found.held + HEAP * found.passing), "peak": peak, "before": before}))
"""
MAKE = """
import json, sys
from pathlib import Path
from toy import make_model
make_model(Path(sys.argv[1]), **json.loads(sys.argv[2]))
"""
MIDDLE = {
    "num_hidden_layers": 8,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
    "initializer_range": 0.02,
}


def python(code: str, *args: Any) -> str:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("changes", "tokens", "dtype"),
    [
        pytest.param({}, 256, "float32", id="30 thousand weights"),
        pytest.param(MIDDLE, 1024, "float32", id="40 million weights"),
        pytest.param(MIDDLE, 1024, "bfloat16", id="40 million weights in bfloat16", marks=pytest.mark.nightly),
    ],
)
def test_the_peak_of_a_step_is_within_a_fifth_of_the_prediction(
    tmp_path: Path, changes: dict[str, Any], tokens: int, dtype: str, record_property: Any
):
    python(MAKE, tmp_path / "model", json.dumps(changes))
    found = json.loads(python(STEP, tmp_path / "model", tokens, changes.get("vocab_size", 257), dtype).splitlines()[-1])
    told = {name: f"{size / 2**20:.0f} MiB" for name, size in found.items()}
    record_property("measured", f"memory of a step at {tokens} tokens, {dtype}: {told}")
    assert abs(found["predicted"] - found["peak"]) <= 0.2 * found["peak"], told
