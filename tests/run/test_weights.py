"""Test that published weights are read back bit for bit, by the library too, or that there is no file at all."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import os
import tempfile
import uuid
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mgrpo.engine.run import tensor_file
from mgrpo.engine.run import weights as weights_module
from mgrpo.engine.run.weights import (
    DamagedWeightsError,
    GapError,
    check_probe,
    load_weights,
    probe_tokens,
    publish_weights,
    remove_old,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["local", "object store"])
def root(request, tmp_path) -> str:
    return str(tmp_path / "weights") if request.param == "local" else f"memory://{uuid.uuid4()}"


def files(root: str) -> list[str]:
    fs, directory = fsspec.url_to_fs(root)
    return sorted(os.path.relpath(path, directory) for path in fs.find(directory, withdirs=False))


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layer.{i}": torch.randn(5, 3, generator=generator).to(DTYPES[i % 3]) for i in range(4)}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Compare tensors bit by bit, including NaN."""
    return left.keys() == right.keys() and all(
        left[key].dtype == right[key].dtype
        and left[key].shape == right[key].shape
        and left[key].reshape(-1).view(torch.uint8).equal(right[key].reshape(-1).view(torch.uint8))
        for key in left
    )


shapes = st.lists(st.integers(0, 5), max_size=3)


@settings(max_examples=60)
@given(
    st.dictionaries(
        st.text(max_size=8).filter(lambda name: name != "__metadata__"), st.tuples(shapes, st.integers(0, 2))
    ),
    st.integers(0, 2**32),
    st.booleans(),
)
def test_any_tensors_come_back_by_us_and_by_the_library(wanted, seed, turned):
    rng = np.random.default_rng(seed)
    given_tensors = {}
    for name, (shape, kind) in wanted.items():
        tensor = torch.empty(shape, dtype=DTYPES[kind])
        if tensor.numel():  # any bits
            tensor.view(-1).view(torch.uint8).numpy()[:] = rng.integers(0, 256, tensor.nbytes, dtype=np.uint8)
        given_tensors[name] = tensor.t() if turned and tensor.dim() == 2 else tensor
    with tempfile.TemporaryDirectory() as folder:
        file, checksum, size = publish_weights(folder, "main", 7, given_tensors)
        data = (Path(folder) / file).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (size, checksum)
        plain = {name: tensor.contiguous() for name, tensor in given_tensors.items()}
        assert same(load_weights(folder, file, checksum, size), plain)
        assert same(load_file(Path(folder) / file), plain)


def test_the_tensors_begin_at_a_multiple_of_eight_bytes(tmp_path):
    for length in range(1, 9):
        file = tmp_path / publish_weights(str(tmp_path), "main", 0, {"x" * length: torch.ones(2)}).file
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0


def test_the_same_version_published_again_is_another_file(root):
    first, second = (publish_weights(root, "main", 3, tensors(seed)) for seed in (0, 1))
    assert first.file != second.file and files(root) == sorted([first.file, second.file])
    assert same(load_weights(root, *first), tensors(0)) and same(load_weights(root, *second), tensors(1))


def test_another_dtype_is_refused_by_name(root):
    with pytest.raises(ValueError, match=r"'b' is torch\.int64: expected one of \[torch\.float32"):
        publish_weights(root, "main", 0, {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.int64)})
    assert files(root) == []


# ---- what can go wrong


@pytest.mark.parametrize("room", [0, 1, 8, 100, 400])
def test_a_full_disk_leaves_no_file_and_the_next_try_succeeds(root, monkeypatch, room):
    real, left = weights_module.write_all, [room]

    def write(file, data) -> None:
        part = min(len(data), left[0])
        left[0] -= part
        real(file, data[:part])
        if part < len(data):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(weights_module, "write_all", write)
        with pytest.raises(OSError, match=r"cannot write weights: No space left on device: '.*main/v4-") as caught:
            publish_weights(root, "main", 4, tensors())
    assert caught.value.errno == errno.ENOSPC and files(root) == []
    assert same(load_weights(root, *publish_weights(root, "main", 4, tensors())), tensors())


def test_a_disk_that_is_full_at_the_last_moment_leaves_no_file(tmp_path, monkeypatch):
    def fsync(_: object) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="Disk quota exceeded"):
            publish_weights(str(tmp_path), "main", 4, tensors())
    assert files(str(tmp_path)) == []


@pytest.mark.parametrize("fails", range(4))  # three forced early, and the last
def test_an_error_of_the_disk_that_it_tells_once_leaves_no_file(tmp_path, monkeypatch, fails):
    real, calls = os.fsync, itertools.count()

    def fsync(file: object) -> None:
        if next(calls) == fails:
            raise OSError(errno.EIO, "Input/output error")
        real(file)  # type: ignore[arg-type]

    monkeypatch.setattr(tensor_file, "FORCE", 100)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="cannot write weights: Input/output error"):
            publish_weights(str(tmp_path), "main", 4, {f"{i}": torch.ones(40) for i in range(2)})
    assert files(str(tmp_path)) == []


def test_a_file_that_takes_a_part_of_each_write_gets_all_of_it(tmp_path, monkeypatch):
    whole = publish_weights(str(tmp_path), "main", 0, tensors())

    class Narrow:
        def __init__(self, file) -> None:
            self.file = file

        def write(self, data) -> int:
            return self.file.write(data[:7])

    real = weights_module.write_all
    monkeypatch.setattr(weights_module, "write_all", lambda file, data: real(Narrow(file), data))
    narrow = publish_weights(str(tmp_path), "main", 0, tensors())
    assert narrow[1:] == whole[1:] and same(load_weights(str(tmp_path), *narrow), tensors())


@settings(max_examples=40)
@given(st.data())
def test_a_torn_longer_or_altered_file_is_refused(data):
    with tempfile.TemporaryDirectory() as root:
        published = publish_weights(root, "main", 0, tensors())
        path = Path(root) / published.file
        whole = path.read_bytes()
        cut = data.draw(st.integers(0, len(whole) - 1))
        bit = 1 << data.draw(st.integers(0, 7))
        kinds = [whole[:cut], whole + b"\0", whole[:cut] + bytes([whole[cut] ^ bit]) + whole[cut + 1 :]]
        path.write_bytes(data.draw(st.sampled_from(kinds)))
        with pytest.raises(DamagedWeightsError, match=rf"weights {published.file}: expected (\d+ bytes|SHA-256)"):
            load_weights(root, *published)


def test_a_file_of_something_else_is_no_safetensors_even_with_its_own_checksum(tmp_path):
    for data in (b"", b"\x80\x04K\x01.", b"\xff" * 64, json.dumps({"a": 1}).encode()):
        (tmp_path / "x").write_bytes(data)
        with pytest.raises(DamagedWeightsError, match="weights x: not in the safetensors format"):
            load_weights(str(tmp_path), "x", hashlib.sha256(data).hexdigest(), len(data))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "", "main/../../x", "main/.."])
def test_a_file_outside_the_root_is_refused(tmp_path, name):
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(ValueError, match="file: expected a path below"):
        load_weights(str(tmp_path / "weights"), name, hashlib.sha256(b"").hexdigest(), 0)


def test_a_file_that_is_gone_is_not_found(root):
    published = publish_weights(root, "main", 0, tensors())
    fs, directory = fsspec.url_to_fs(root)
    fs.rm_file(f"{directory}/{published.file}")
    with pytest.raises(FileNotFoundError):
        load_weights(root, *published)


def test_old_files_go_but_the_newest_two_and_those_named(root):
    written = [publish_weights(root, "main", version, tensors()).file for version in (0, 1, 9, 2, 3)]  # 9 was rewound
    other = publish_weights(root, "clerk", 0, tensors()).file
    fs, directory = fsspec.url_to_fs(root)
    left = ["main/.tmp-v9-01234567.safetensors", "main/v5-01234567.safetensors.part"]
    for name in left:  # left by writers that were killed
        fs.pipe_file(f"{directory}/{name}", b"half")
    assert sorted(remove_old(root, "main", [written[1]])) == sorted([written[0], written[2], *left])
    assert files(root) == sorted([other, written[1], written[3], written[4]])
    assert remove_old(root, "main", [written[1]]) == []


# ---- the probe


def test_the_probes_prompt_follows_from_the_seed_alone():
    assert probe_tokens(3, 257, 100) == probe_tokens(3, 257, 100) != probe_tokens(4, 257, 100)
    assert len(probe_tokens(3, 257, 100)) == 32 and len(probe_tokens(3, 257, 5)) == 5
    assert all(0 <= token < 7 for seed in range(20) for token in probe_tokens(seed, 7, 100))


@given(st.lists(st.tuples(st.floats(-50, 0), st.floats(-1, 1)), min_size=1, max_size=40), st.floats(0, 1))
def test_a_gap_above_the_limit_is_an_error_and_one_below_is_returned(pairs, limit):
    trainer = [logp for logp, _ in pairs]
    sampler = [logp + change for logp, change in pairs]
    gap = math.fsum(abs(a - b) for a, b in zip(trainer, sampler, strict=True)) / len(pairs)
    if gap <= limit * (1 - 1e-9):
        assert check_probe("main", 5, trainer, sampler, limit) == pytest.approx(gap, abs=1e-12)
    elif gap > limit * (1 + 1e-9):
        with pytest.raises(GapError, match=r"agents\.main: with version 5 .* at most sampling\.max_gap = "):
            check_probe("main", 5, trainer, sampler, limit)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_log_prob_that_is_no_number_is_a_gap(bad):
    for trainer, sampler in (([bad, -1.0], [-1.0, -1.0]), ([-1.0, -1.0], [bad, -1.0]), ([bad], [bad])):
        with np.errstate(invalid="ignore"), pytest.raises(GapError):
            check_probe("main", 1, trainer, sampler, 1e9)
