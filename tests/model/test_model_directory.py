"""Test what of a model's directory may run: nothing, unless the agent's settings say so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mgrpo.engine.config.resume import check_unchanged, fingerprint
from mgrpo.engine.config.schema import AgentConfig, ComputeConfig, parse_config
from mgrpo.engine.model.causal_lm import load_model, load_tokenizer
from mgrpo.engine.policy.policy import Policy
from toy import make_model, raw_config

CPU = ComputeConfig(device="cpu", dtype="float32")
THEIRS = """
from transformers import LlamaConfig, LlamaForCausalLM

class TheirConfig(LlamaConfig):
    model_type = "theirs"

class TheirModel(LlamaForCausalLM):
    config_class = TheirConfig
"""
AUTO_MAP = {"AutoConfig": "theirs.TheirConfig", "AutoModelForCausalLM": "theirs.TheirModel"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    return make_model(tmp_path / "model")


def agent(folder: Path, **settings: Any) -> AgentConfig:
    return AgentConfig(model=str(folder), max_context=64, **settings)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pickle(folder: Path, weights: Any = None) -> None:
    torch.save(load_file(folder / "model.safetensors") if weights is None else weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def test_a_models_own_code_runs_where_its_agent_says_so(folder: Path):
    plain = load_model("main", agent(folder), CPU)
    (folder / "theirs.py").write_text(THEIRS)
    edit(folder / "config.json", model_type="theirs", auto_map=AUTO_MAP, architectures=["TheirModel"])
    with pytest.raises(ValueError, match=r"or agents\.main\.trust_remote_code = true, with which that code"):
        load_model("main", agent(folder), CPU)
    policy = Policy("main", agent(folder, trust_remote_code=True), CPU)
    assert type(policy.model).__name__ == "TheirModel"
    for weight, theirs in zip(plain.parameters(), policy.model.parameters(), strict=True):
        assert torch.equal(weight, theirs)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_that_lies_elsewhere_is_refused_even_then(folder: Path, file: str):
    edit(folder / file, auto_map={"AutoConfig": "someone/else--theirs.C", "AutoTokenizer": ["a/b--c.T", None]})
    trusting = agent(folder, trust_remote_code=True)
    for load in (load_tokenizer, lambda name, given: load_model(name, given, CPU)):
        with pytest.raises(ValueError, match=rf"agents\.main\.model: .*{file} names the code 'someone/else--theirs"):
            load("main", trusting)


def test_pickled_weights_are_read_where_their_agent_says_so(folder: Path):
    plain = load_model("main", agent(folder), CPU)
    pickle(folder)
    with pytest.raises(ValueError, match=r"pickled, in pytorch_model\.bin: expected safetensors, or agents\.main\."):
        load_model("main", agent(folder), CPU)
    found = load_model("main", agent(folder, allow_pickle=True), CPU)
    for weight, pickled in zip(plain.parameters(), found.parameters(), strict=True):
        assert torch.equal(weight, pickled)


class Hostile:
    """Make a file when unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_of_more_than_tensors_runs_nothing_and_is_refused(folder: Path, tmp_path: Path):
    weights = load_file(folder / "model.safetensors")
    pickle(folder, weights | {"more": Hostile(tmp_path / "ran")})
    with pytest.raises(ValueError, match=r"^agents\.main\.model: .* has no readable weights: .*pytorch_model\.bin"):
        load_model("main", agent(folder, allow_pickle=True), CPU)
    assert not (tmp_path / "ran").exists()


def test_safetensors_come_first(folder: Path):
    shutil.copy(folder / "model.safetensors", folder / "kept")
    pickle(folder, {})
    shutil.copy(folder / "kept", folder / "model.safetensors")
    assert load_model("main", agent(folder, allow_pickle=True), CPU)


def test_weights_of_neither_kind_are_told_as_missing(folder: Path):
    save_file({"x": torch.ones(1)}, folder / "other.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no readable weights: .*model\.safetensors"):
        load_model("main", agent(folder), CPU)


@pytest.mark.parametrize("key", ["trust_remote_code", "allow_pickle"])
def test_what_may_run_is_part_of_what_is_trained(tmp_path: Path, key: str):
    raw = raw_config(tmp_path)
    before = parse_config(raw)
    raw["agents"]["main"][key] = True
    now = parse_config(raw)
    with pytest.raises(ValueError, match=rf"resume: agents\.main\.{key}: True given: expected False"):
        check_unchanged(before, now)
    assert fingerprint(before) != fingerprint(now)


def test_servers_run_no_code_of_a_models_directory(tmp_path: Path):
    raw = raw_config(tmp_path, topology="local", algorithm={"sampler_cap": 2.0})
    raw["agents"]["main"] |= {"trust_remote_code": True, "vllm": {}}
    with pytest.raises(ValueError, match=r"agents\.main\.vllm: given with agents\.main\.trust_remote_code = true"):
        parse_config(raw)


def test_a_tokenizer_with_ids_beyond_the_vocabulary_is_refused(folder: Path):
    """Also where it has fewer tokens than the vocabulary, because its ids have gaps."""
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["model"]["vocab"] |= {"z": 300}
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"^agents\.main\.model: the tokenizer of .* has a token of id 300, its model"):
        load_tokenizer("main", agent(folder))
