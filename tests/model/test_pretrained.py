"""A model's directory, written from weights one after the other: what transformers loads from it is what was given."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from model_sweep import tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Gemma3Config

from mgrpo.engine.config.schema import AgentConfig
from mgrpo.engine.model import pretrained
from mgrpo.engine.model.composite import auto_class
from mgrpo.engine.model.pretrained import new_directory, write_pretrained
from mgrpo.engine.model.sharding import write_shards
from mgrpo.engine.run.weights import Published
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


def write(base: Path, out: Path, model: Any, **options: Any) -> list[Published]:
    out.mkdir()
    params = dict(model.named_parameters())
    settings = AgentConfig(model=str(base))
    return write_pretrained(out, base, settings, list(params), lambda name: params[name].detach(), **options)


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
    shards = write(base, out, model, dtype="float32", shard_bytes=40_000)
    again, loading = load(out)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    expected, found = model.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert names_in(base) == set(index["weight_map"]) == names_in(out)
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in weights_in(out))
    assert {shard.file for shard in shards} == set(index["weight_map"].values()) and len(shards) > 1
    for shard in shards:
        data = (out / shard.file).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (shard.checksum, shard.size)
    assert not list(out.glob(".tmp*"))


def weights_in(folder: Path) -> Iterator[torch.Tensor]:
    for path in folder.glob("*.safetensors"):
        yield from load_file(path).values()


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


def test_a_model_that_does_not_fit_the_disk_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, out = make_model(tmp_path / "base"), tmp_path / "out"
    model, _ = load(base)
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(pretrained.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"cannot write the model: it takes [\d,]+ bytes, 100 are free"):
        write(base, out, model, dtype="float32")
    assert not list(out.glob("*.safetensors"))


def test_a_new_directory_is_whole_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="cannot write the model: No space"), new_directory(tmp_path / "a" / "b") as out:
        (out / "some").touch()
        raise OSError(28, "No space left on device")
    assert not list((tmp_path / "a").iterdir())
    with new_directory(tmp_path / "a" / "b") as out:
        (out / "some").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"] and (tmp_path / "a" / "b" / "some").exists()
    with (
        pytest.raises(ValueError, match="b exists: expected the name of a new directory"),
        new_directory(out.with_name("b")),
    ):
        pass


MEMORY = """
import sys
from pathlib import Path
from mgrpo.engine.config.schema import AgentConfig
from mgrpo.engine.model.pretrained import write_pretrained
from mgrpo.engine.model.sharding import Shards
from mgrpo.engine.system.memory import peak_resident, resident

def write(folder, dtype, shard):
    weights, out = Shards(folder / "saved", "weights"), folder / f"out-{dtype}"
    out.mkdir()
    agent = AgentConfig(model=str(folder / "base"))
    return write_pretrained(out, folder / "base", agent, list(weights.shapes), weights.read, dtype, shard)

small, big, dtype, shard = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
write(small, dtype, shard)  # imports and threads
before = resident()
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
assert len(write(big, dtype, shard)) > 2
print(peak_resident() - before)
"""


def save_rows(folder: Path, ranks: int, **sizes: Any) -> None:
    """Make a model, and a checkpoint of its weights by rows."""
    model, _ = load(make_model(folder / "base", **sizes))
    (folder / "saved").mkdir()
    for rank in range(ranks):
        rows = {name: param.tensor_split(ranks)[rank] for name, param in model.named_parameters()}
        write_shards(folder / "saved", "weights", rows, rank)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_no_more_than_a_file_is_in_memory(tmp_path: Path, ranks: int, record_property: Any) -> None:
    """180 MB of weights, tied, in files of 48 MB."""
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 10, "vocab_size": 4096}
    save_rows(tmp_path / "small", ranks)
    save_rows(tmp_path / "big", ranks, **wide)
    for dtype in ("float32", "bfloat16"):
        command = [sys.executable, "-c", MEMORY, tmp_path / "small", tmp_path / "big", dtype, 48 << 20]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        grown = int(done.stdout.split()[-1])
        record_property(
            "measured", f"export of {ranks} ranks in {dtype}, files of 48 MiB: {grown / 2**20:.0f} MiB more"
        )
        assert grown <= 48 << 20
