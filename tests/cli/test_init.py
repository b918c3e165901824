"""`mgrpo init`: a project of each kind is written, checked, trained for two steps and evaluated, and its tests pass."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mgrpo.engine.cli import init as module
from mgrpo.engine.cli.init import COMMON, FIRST, TEMPLATES, init

COMMAND = Path(sys.executable).parent / "mgrpo"
NEEDED = {"sums": (), "math": ("math_verify",)}


def run(folder: Path, *command: object) -> str:
    environ = {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=os.environ | environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_every_kind_has_its_templates() -> None:
    assert {path.name for path in TEMPLATES.iterdir()} == {COMMON, *FIRST}
    for kind in FIRST:
        names = {path.name.removesuffix(".txt") for path in (TEMPLATES / kind).iterdir()}
        assert {"README.md", "run.toml", FIRST[kind], "environment.py", "test_environment.py"} <= names


@pytest.mark.parametrize("kind", FIRST)
def test_a_project_is_what_a_user_would_write(tmp_path: Path, kind: str) -> None:
    """Its files are named in its README, formatted and free of lint."""
    said = init(kind, tmp_path / "mine")
    assert f"mgrpo train {FIRST[kind]}" in said
    files = {path.name for path in (tmp_path / "mine").iterdir()}
    text = (tmp_path / "mine" / "README.md").read_text()
    columns = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    named = {name for column in columns for name in re.findall(r"`([\w.]+)/?`", column)}
    assert named == files - {"README.md"}
    if ruff := next((path for path in [COMMAND.with_name("ruff")] if path.exists()), None):
        settings = ["--isolated", "--line-length", "120"]
        run(tmp_path / "mine", ruff, "check", *settings, "--select", "E,F,I,UP,B,SIM", ".")
        run(tmp_path / "mine", ruff, "format", "--check", *settings, ".")


def test_what_is_there_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"KIND: 'cooking' given: expected one of \['sums', 'math'\]"):
        init("cooking", tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for taken in (tmp_path / "full", tmp_path / "full" / "file"):
        with pytest.raises(ValueError, match=r"DIR: .* exists and is not empty"):
            init("sums", taken)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(module.shutil, "copyfile", full)
        with pytest.raises(OSError, match="No space left"):
            init("sums", tmp_path / "b")
    assert {path.name for path in tmp_path.iterdir()} == {"full"}


def test_an_empty_folder_is_filled_also_from_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    init("sums", Path("."))
    assert {"run.toml", "model", "README.md"} <= {path.name for path in Path(".").iterdir()}
    assert not Path("project").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", FIRST)
def test_a_project_runs(tmp_path: Path, kind: str) -> None:
    """Check, two steps of each stage, evaluation, export, and the project's own tests."""
    for package in NEEDED[kind]:
        pytest.importorskip(package)
    init(kind, tmp_path / "mine")
    folder, file = tmp_path / "mine", FIRST[kind]
    short = [f"--set={key}" for key in ("steps=2", "warmup.steps=2", "eval.questions=4", "run_dir=runs/short")]
    assert "main" in run(folder, COMMAND, "check", file)
    assert "2 of 2 rl steps" in run(folder, COMMAND, "train", file, *short)
    rows = [json.loads(line) for line in (folder / "runs/short/metrics.jsonl").read_text().splitlines()]
    assert sum(row.get("rollouts/failed", 0) + row.get("rollouts/unscored", 0) for row in rows) == 0
    assert "%" in run(folder, COMMAND, "eval", file, *short, "--checkpoint", "runs/short/checkpoints/rl-00002")
    assert "main after rl-00002" in run(folder, COMMAND, "export", "runs/short")
    assert " passed" in run(folder, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")


@pytest.mark.slow
def test_the_settings_for_a_gpu_are_valid(tmp_path: Path) -> None:
    """run.toml of math names models on a hub: everything but them is checked, with the tiny one in their place."""
    pytest.importorskip("math_verify")
    init("math", tmp_path / "mine")
    tiny = [
        f"--set=agents.{agent}.{key}" for agent in ("main", "verifier") for key in ("model=model", "max_context=1024")
    ]
    assert "verifier" in run(tmp_path / "mine", COMMAND, "check", "run.toml", *tiny)
