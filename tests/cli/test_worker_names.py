"""Test that the command refuses a worker's name that is no name of a file, before it makes anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from mgrpo.engine.cli.main import app
from mgrpo.engine.run.directory import RunPaths

CONFIG = """
topology = "cluster"
run_dir = "{folder}/a/b/run"
environment.use = "{folder}/x.py:X"
store.url = "sqlite:///{folder}/store.db"
agents.main.model = "{folder}/model"
"""


@pytest.mark.parametrize(
    "name", ["../../../../escaped", "..", ".", "/tmp/x", "a/b", "-x", ".x", "a b", "a\n", "x" * 101]
)
def test_a_name_that_is_no_name_of_a_file_is_refused_before_anything_is_made(tmp_path: Path, name: str):
    file = tmp_path / "x.toml"
    file.write_text(CONFIG.format(folder=tmp_path))
    found = CliRunner().invoke(app, ["rollout", str(file), f"--name={name}"])
    assert isinstance(found.exception, ValueError) and f"--name: {name!r} given" in str(found.exception)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("name", ["w", "worker-0", "node.example.org-4242", "x" * 100])
def test_usual_names_are_taken(name: str):
    assert RunPaths("run").worker(name).path == Path("run/workers") / name
