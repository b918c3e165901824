"""An agent that three ranks trained is exported, and vLLM and transformers answer alike from the directory."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mgrpo.engine.cli.export import export
from mgrpo.engine.config.schema import dump_config
from mgrpo.engine.model.sharding import write_shards
from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.run.directory import RunDirectory
from toy import make_model, toy_config

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")
from vllm_servers import RunningServer, running, scores

pytestmark = pytest.mark.vllm

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}  # heads of 32
GAP = 1e-4  # nats, of any token: vLLM adds in another order


def test_vllm_answers_from_the_export_of_three_ranks(tmp_path: Path, record_property) -> None:
    make_model(tmp_path / "model", **SIZES)
    config = toy_config(tmp_path)
    policy = Policy("main", config.agents["main"], config.compute)
    with torch.no_grad():
        for weight in policy.masters.trained:
            weight.add_(torch.randn_like(weight), alpha=0.05)

    def rows_of_three(folder: Path) -> None:
        policy.save_state(folder / "main")
        for rank in range(3):
            rows = {name: weight.tensor_split(3)[rank] for name, weight in policy.masters.weights.items()}
            write_shards(folder / "main", "weights", rows, rank)

    with closing(RunDirectory(config.run_dir)) as run:
        run.write_config(dump_config(config))
        run.save_checkpoint("rl-00001", rows_of_three, keep=1)
        export(run.path, "main", None, tmp_path / "out", "float32")
    tokens = np.random.default_rng(0).integers(1, 257, size=40).tolist()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        logprobs = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    expected = logprobs.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()
    server = RunningServer(tmp_path / "out", "float32", tmp_path / "log.txt")
    with running(server):
        gap = float(np.abs(np.array(scores(server.url, tokens)) - expected).max())
    record_property("measured", f"vLLM against transformers from an exported directory: at most {gap:.2g} nats apart")
    assert gap < GAP
