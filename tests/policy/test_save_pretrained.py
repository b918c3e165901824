"""`Policy.save_pretrained`: transformers loads what any number of ranks hold, and computes the same log-probs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mgrpo.engine.config.schema import ComputeConfig
from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.run.manifest import verify_version
from mgrpo.engine.system import distributed
from ranks import run_ranks
from toy import make_model

TOKENS = [1, 9, 200, 31, 4, 4, 77, 0, 133]
PLAIN = ComputeConfig(device="cpu", dtype="float32")


def moved(policy: Policy) -> Policy:
    """Move the weights as a training does: alike on all ranks, though each holds other rows."""
    with torch.no_grad():
        for weight in policy.masters.trained:
            weight.mul_(1.25)
    policy.masters.publish()
    return policy


def logprobs(folder: Path, tokens: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    return found.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]


def gap(policy: Policy, folder: Path, tokens: list[int] = TOKENS) -> float:
    return float((torch.tensor(policy.logprobs(tokens)) - logprobs(folder, tokens)).abs().max())


@pytest.mark.parametrize("tie", [True, False])
def test_a_policy_of_a_directory_is_written_with_all_that_the_directory_has(tmp_path: Path, tie: bool) -> None:
    policy = moved(Policy.of(make_model(tmp_path / "base", tie), compute=PLAIN, max_context=64))
    manifest = policy.save_pretrained(tmp_path / "out", "float32")
    assert verify_version(tmp_path / "out") == manifest
    assert (manifest.kind, manifest.agent, manifest.base, manifest.dtype) == ("model", "policy", "base", "float32")
    assert gap(policy, tmp_path / "out") < 1e-5 < gap(policy, tmp_path / "base")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<eos>"


def test_what_is_written_is_the_masters(tmp_path: Path) -> None:
    policy = Policy.of(
        make_model(tmp_path / "base"), compute=ComputeConfig(device="cpu", dtype="bfloat16"), max_context=64
    )
    with torch.no_grad():
        for weight in policy.masters.trained:
            weight.mul_(1 + 2**-12)  # lost in bfloat16
    policy.save_pretrained(tmp_path / "out", "float32")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in policy.masters.weights.items())


def test_a_callers_own_model_needs_no_directory(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": 17, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    policy = moved(Policy.of(LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)), compute=PLAIN))
    policy.save_pretrained(tmp_path / "out", "float32")
    assert gap(policy, tmp_path / "out", [1, 2, 3, 16]) < 1e-5
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "mgrpo.json"}


def test_a_wrong_dtype_and_a_path_that_is_taken_are_refused(tmp_path: Path) -> None:
    policy = Policy.of(make_model(tmp_path / "base"), compute=PLAIN, max_context=64)
    with pytest.raises(ValueError, match="dtype: 'int8' given: expected one of"):
        policy.save_pretrained(tmp_path / "out", "int8")
    with pytest.raises(ValueError, match="base exists: expected the name of a new directory"):
        policy.save_pretrained(tmp_path / "base")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def on_three_ranks(folder: Path) -> None:
    policy = moved(Policy.of(folder / "base", compute=PLAIN, max_context=64))
    policy.save_pretrained(folder / "out", "float32")
    found = policy.logprobs(TOKENS)
    with pytest.raises((ValueError, OSError), match="out exists"):  # rank 0 fails, and all of them hear of it
        policy.save_pretrained(folder / "out", "float32")
    assert policy.logprobs(TOKENS) == found
    if distributed.rank() == 0:
        torch.save(torch.tensor(found), folder / "found.pt")


@pytest.mark.slow
def test_three_ranks_with_a_tied_head_write_what_they_compute(tmp_path: Path) -> None:
    make_model(tmp_path / "base", tie=True)
    run_ranks(on_three_ranks, 3, tmp_path)
    found = torch.load(tmp_path / "found.pt")
    assert float((found - logprobs(tmp_path / "out", TOKENS)).abs().max()) < 1e-5
    assert float((found - logprobs(tmp_path / "base", TOKENS)).abs().max()) > 0.01
