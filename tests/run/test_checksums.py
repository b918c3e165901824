"""Test that a sealed folder is refused if any bit of it changed, and that folders of version 0.1.0 are still read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mgrpo.engine.run.checksums import seal, verify
from mgrpo.engine.run.tensor_file import write_tensors

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).view(2, 3),
    "a": torch.ones(5, dtype=torch.bfloat16),
    "none": torch.zeros(0, 4),
    "step": torch.tensor(7.0),
    "wide": torch.full((3,), 0.1, dtype=torch.float64),
    "flags": torch.tensor([True, False, True]),
}


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    (tmp_path / "main").mkdir()
    write_tensors(tmp_path / "main/weights.safetensors", TENSORS)
    (tmp_path / "state.json").write_text('{"groups":12}')
    seal(tmp_path)
    return tmp_path


def test_the_manifest_has_the_size_and_sha_256_of_every_file(sealed: Path):
    verify(sealed)
    manifest = json.loads((sealed / "manifest.json").read_text())
    files = ["main/weights.safetensors", "main/weights.safetensors.sha256", "state.json"]
    assert manifest["files"] == {name: (sealed / name).stat().st_size for name in files}
    assert manifest["sha256"] == {name: hashlib.sha256((sealed / name).read_bytes()).hexdigest() for name in files}


@pytest.mark.parametrize("name", ["main/weights.safetensors", "main/weights.safetensors.sha256", "state.json"])
@pytest.mark.parametrize("at", [0, -1])
def test_one_bit_that_changed_is_found(sealed: Path, name: str, at: int):
    data = bytearray((sealed / name).read_bytes())
    data[at] ^= 1
    (sealed / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"checkpoint {sealed}: {name} is damaged: expected SHA-256 [0-9a-f]{{64}}"):
        verify(sealed)


@pytest.mark.parametrize("change", ["drop", "add", "rename"])
def test_a_manifest_whose_parts_disagree_is_refused(sealed: Path, change: str):
    manifest = json.loads((sealed / "manifest.json").read_text())
    if change == "drop":
        del manifest["sha256"]["state.json"]
    if change == "add":
        manifest["sha256"]["other.json"] = "0" * 64
    if change == "rename":
        manifest["sha257"] = manifest.pop("sha256")
    (sealed / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"state\.json is damaged|other\.json is damaged|manifest\.json is damaged"):
        verify(sealed)


def test_a_folder_of_version_0_1_0_has_its_sizes_checked(sealed: Path):
    manifest = json.loads((sealed / "manifest.json").read_text())
    (sealed / "manifest.json").write_text(json.dumps({"files": manifest["files"]}, indent=1))
    verify(sealed)
    (sealed / "state.json").write_text('{"groups":92}')
    verify(sealed)  # nothing is known of the contents
    (sealed / "state.json").write_text('{"groups":120}')
    with pytest.raises(ValueError, match=r"expected state\.json to have 13 bytes, it has 14"):
        verify(sealed)


def test_the_library_reads_what_was_written_and_the_sha_256_beside_it_is_right(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS)
    save_file(TENSORS, tmp_path / "library.safetensors")
    assert path.read_bytes() == (tmp_path / "library.safetensors").read_bytes()
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    beside = tmp_path / "x.safetensors.sha256"
    assert beside.read_text() == f"{hashlib.sha256(path.read_bytes()).hexdigest()}  x.safetensors\n"


def test_a_tensor_of_another_dtype_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"'odd' is torch\.complex64: expected one of"):
        write_tensors(tmp_path / "x", {"odd": torch.zeros(2, dtype=torch.complex64)})
