"""Test a whole run of a model on a hub, by the command on a terminal: what is shown, kept and gone on with."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hub_stub import REPO, Hub, serving

from toy import SUMS, make_model

RUN = """
run_dir = "{folder}/run"
steps = 1
queries_per_step = 2
deterministic = true
environment = {{ use = "{sums}:Sums" }}
algorithm = {{ rollouts = 2 }}
warmup = {{ steps = 1, episodes = 2 }}
eval = {{ questions = 2 }}
checkpoint = {{ every = 1 }}
compute = {{ dtype = "float32", max_tokens = 256, device = "cpu" }}
{more}
[agents.main]
model = "{repo}"
stop = ["\\n"]
max_context = 64
[agents.clerk]
model = "{repo}"
stop = ["\\n"]
max_context = 64
"""
Shown = list[tuple[float, str]]


def on_a_terminal(hub: Hub, folder: Path, *arguments: str) -> tuple[int, Shown]:
    """Run the command on a terminal; return its status and what it showed, each piece with its second."""
    own = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "home"),
        "HF_TOKEN": "mine",
        "TERM": "xterm",
        "COLUMNS": "200",
    }
    master, slave = pty.openpty()
    command = [sys.executable, "-P", "-m", "mgrpo.engine", *arguments]
    began = time.monotonic()
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, cwd=folder, env=os.environ | own)
    os.close(slave)
    shown: Shown = []
    try:
        while piece := os.read(master, 1 << 16):
            shown.append((time.monotonic() - began, piece.decode(errors="replace")))
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(master)
    return process.wait(), shown


def text_of(shown: Shown) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", "".join(piece for _, piece in shown))


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., str]:
    def write(more: str = "") -> str:
        path = tmp_path / "run.toml"
        path.write_text(RUN.format(folder=tmp_path, sums=SUMS, repo=REPO, more=more))
        return str(path)

    return write


def test_a_run_of_a_model_on_a_hub_shows_what_it_does_and_keeps_the_commit(
    tmp_path: Path, file: Callable[..., str], record_property: Callable[[str, object], None]
):
    model = make_model(tmp_path / "model")
    with serving() as hub:
        hub.open_to, first = "mine", hub.add(model)
        status, shown = on_a_terminal(hub, tmp_path, "check", file())
        assert status == 0, text_of(shown)
        assert re.search(rf"{REPO} \(main at {first[:7]}\), a run downloads .* in 1 file first", text_of(shown))
        assert "model.safetensors" not in hub.downloads()

        status, shown = on_a_terminal(hub, tmp_path, "train", file())
        told = text_of(shown)
        assert status == 0, told
        steps = ("loading torch and the engine", "downloading", "loading main", "first warm-up step", "evaluating")
        places = [told.find(step) for step in steps]
        assert -1 not in places and places == sorted(places), dict(zip(steps, places, strict=True))
        saved = json.loads((tmp_path / "run" / "config.json").read_text())
        assert saved["agents"]["main"]["revision"] == f"main@{first}"
        times = [0.0, *(second for second, _ in shown)]
        gap = max(after - before for before, after in pairwise(times))
        record_property("measured", f"first output after {times[1]:.1f} s, longest silence {gap:.1f} s")

        hub.add(model)
        hub.asked.clear()
        status, shown = on_a_terminal(hub, tmp_path, "train", file(), "--resume", "--set", "steps=2")
        assert status == 0, text_of(shown)
        assert f"the run goes on with {first[:7]}, with which it was begun" in " ".join(text_of(shown).split())
        assert hub.downloads() == []
        assert {token for _, path, token in hub.asked if REPO in path} == {"mine"}


def test_the_processes_of_a_local_run_load_what_its_launcher_fetched(tmp_path: Path, file: Callable[..., str]):
    model = make_model(tmp_path / "model")
    with serving() as hub:
        hub.open_to, first = "mine", hub.add(model)
        status, shown = on_a_terminal(hub, tmp_path, "train", file('topology = "local"'))
        logs = [path.read_text()[-2000:] for path in (tmp_path / "run" / "logs").glob("*")]
        assert status == 0, (text_of(shown)[-3000:], logs)
        assert hub.downloads().count("model.safetensors") == 1
        assert len([path for _, path, _ in hub.asked if path.startswith("/api/models/")]) == 1
        assert f"main@{first}" in (tmp_path / "run" / "config.json").read_text()
