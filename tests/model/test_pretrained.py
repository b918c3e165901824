"""A model's directory, written from weights one after the other: what transformers loads from it is what was given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_sweep import tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Gemma3Config

from mgrpo.engine.config.schema import AgentConfig
from mgrpo.engine.model.composite import auto_class
from mgrpo.engine.model.pretrained import write_pretrained
from toy import make_model


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    config = AutoConfig.from_pretrained(folder)
    model, loading = auto_class(config).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return model, loading


def trained(base: Path) -> Any:
    """Load a model and move all of its parameters a little, as a training does."""
    model, _ = load(base)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param), alpha=0.01)
    return model


def write(base: Path, out: Path, model: Any, **options: Any) -> int:
    out.mkdir()
    params = dict(model.named_parameters())
    settings = AgentConfig(model=str(base))
    return write_pretrained(out, settings, list(params), lambda name: params[name].detach(), **options)


def gemma3(folder: Path) -> Any:
    text = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14})
    config.architectures = ["Gemma3ForConditionalGeneration"]
    return auto_class(config).from_config(config)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "gemma2", "gemma3"])
def test_transformers_loads_every_weight_that_was_written(tmp_path: Path, kind: str) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    torch.manual_seed(0)
    (gemma3(base) if kind == "gemma3" else tiny(kind)).float().save_pretrained(base)
    model = trained(base)
    size = write(base, out, model, dtype="float32", shard_bytes=40_000)
    again, loading = load(out)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    expected, found = model.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert names_in(base) == set(index["weight_map"]) == names_in(out)
    assert index["metadata"]["total_size"] == size
    assert len(set(index["weight_map"].values())) > 1
    assert not list(out.glob(".tmp*"))


def names_in(folder: Path) -> set[str]:
    found: list[str] = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found.extend(file.keys())
    assert len(found) == len(set(found))
    return set(found)


@pytest.mark.parametrize("tie", [True, False])
def test_the_rest_of_the_directory_is_kept_and_the_dtype_is_said(tmp_path: Path, tie: bool) -> None:
    base, out = make_model(tmp_path / "base", tie), tmp_path / "out"
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "README.md").write_text("another model")
    (base / "model.gguf").write_bytes(b"other weights")
    model = trained(base)
    write(base, out, model, dtype="bfloat16")
    there = {path.name for path in base.iterdir()} - {"README.md", "model.gguf"}
    assert {path.name for path in out.iterdir()} == there
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    found, expected = load(out)[0].state_dict(), model.to(torch.bfloat16).state_dict()
    assert all(torch.equal(expected[name].float(), found[name]) for name in expected)


def test_what_a_trainer_does_not_hold_is_copied(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    model = tiny("deepseek_v3").float()
    buffers = [buffer for name, buffer in model.named_buffers() if "e_score_correction_bias" in name]
    assert buffers
    for buffer in buffers:
        buffer.normal_()
    model.save_pretrained(base)
    write(base, out, trained(base), dtype="bfloat16")
    found = {name: buffer for name, buffer in load(out)[0].named_buffers() if "e_score_correction_bias" in name}
    assert all(torch.equal(a, b) for a, b in zip(buffers, found.values(), strict=True))


def test_a_directory_that_became_another_models_is_refused(tmp_path: Path) -> None:
    base, other = make_model(tmp_path / "base"), make_model(tmp_path / "other", num_hidden_layers=3)
    model, _ = load(other)
    with pytest.raises(ValueError, match=r"base: expected the model that was trained.*'model\.layers\.2"):
        write(base, tmp_path / "out", model, dtype="float32")


def test_names_that_transformers_would_not_write_are_refused(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", tie=False)
    model, _ = load(base)
    weights = load_file(base / "model.safetensors")
    stripped = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    save_file(stripped, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"base: has no weights named \['model\."):
        write(base, tmp_path / "out", model, dtype="float32")
