"""Test that an object store that is out of reach raises OSError, and that our own mistakes do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from faulty import Bucket
from mgrpo.engine.run.trajectories import Position, TrajectoryWriter, read
from mgrpo.engine.run.weights import load_weights, publish_weights, remove_old
from mgrpo.engine.system.remote import file_system, reaching


class EndpointConnectionError(Exception):
    """Stand in for botocore's, which is no OSError."""


class Cut(Bucket):
    """An object store whose network can be cut."""

    protocol = "cut"
    cut = False

    def __getattribute__(self, name: str) -> Any:
        if name in ("ls", "cat_file", "rm_file", "modified", "pipe_file", "_open", "makedirs") and Cut.cut:
            return _no_connection
        return super().__getattribute__(name)


def _no_connection(*_: Any, **__: Any) -> None:
    raise EndpointConnectionError("Could not connect to the endpoint")


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    fsspec.register_implementation("cut", Cut, clobber=True)
    monkeypatch.setattr(Cut, "cut", False)
    return f"cut://{tmp_path}/bucket"


def test_what_an_object_store_raises_when_it_is_away_is_an_oserror_that_names_it(bucket, monkeypatch):
    weights = {"a": torch.zeros(3)}
    published = publish_weights(bucket, "main", 1, weights)
    monkeypatch.setattr(Cut, "cut", True)
    for act in (
        lambda: publish_weights(bucket, "main", 2, weights),
        lambda: load_weights(bucket, *published),
        lambda: remove_old(bucket, "main", []),
        lambda: TrajectoryWriter(bucket, "main-w"),
        lambda: read(bucket, [Position("main-w-00000.arrow", 0, 0)]),
    ):
        with pytest.raises(OSError, match=r"(store.files|bucket).*EndpointConnectionError: Could not connect"):
            act()
    monkeypatch.setattr(Cut, "cut", False)
    assert load_weights(bucket, *published)["a"].tolist() == [0.0] * 3
    assert len(AbstractFileSystem.glob(Cut(), f"{bucket}/main/*")) == 1, "nothing was half written"


def test_errors_of_files_and_our_own_mistakes_stay_what_they_are(bucket):
    fs, directory = file_system(bucket)
    with pytest.raises(FileNotFoundError):
        fs.cat_file(f"{directory}/nothing")
    with pytest.raises(TypeError):
        fs.cat_file()
    with pytest.raises(AssertionError), reaching(bucket):
        raise AssertionError


def test_a_local_folder_is_reached_directly(tmp_path):
    fs, directory = file_system(tmp_path)
    assert isinstance(fs, LocalFileSystem) and directory == str(tmp_path)


def test_a_kind_of_url_without_its_package_is_refused_by_name():
    with pytest.raises(ValueError, match=r"store\.files: 'dropbox://x' given: .*install"):
        file_system("dropbox://x")
