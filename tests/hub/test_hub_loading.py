"""Test that a model by its id on a hub is loaded as the same model in a directory is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hub_stub import REPO, hub_with

from mgrpo.engine.config.schema import AgentConfig, ComputeConfig
from mgrpo.engine.model.causal_lm import load_model, load_tokenizer
from toy import make_model


def test_a_model_by_its_id_is_the_one_of_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plain = AgentConfig(model=str(make_model(tmp_path / "model")), max_context=64)
    compute = ComputeConfig(device="cpu", dtype="float32")
    with hub_with(tmp_path / "model", tmp_path, monkeypatch) as hub:
        by_id = AgentConfig(model=REPO, max_context=64)
        loaded = load_model("main", by_id, compute)
        assert load_tokenizer("main", by_id).get_vocab() == load_tokenizer("main", plain).get_vocab()
        assert hub.downloads().count("model.safetensors") == 1
    for name, weight in load_model("main", plain, compute).named_parameters():
        assert torch.equal(loaded.get_parameter(name), weight), name
