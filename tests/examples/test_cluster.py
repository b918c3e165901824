"""Run the scripts of examples/cluster with stand-ins for ssh and Slurm, and check what they start and how they end."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from mgrpo import load_config

FOLDER = Path(__file__).parents[2] / "examples" / "cluster"
SECRET = "a-secret-of-the-store"
# Every stand-in records its arguments, and then does what these scripts need of the real program.
STAND_INS = {
    "ssh": 'eval "${@: -1}"',
    "srun": 'while [[ $1 == --* ]]; do shift; done\n"$@"',
    "scontrol": "printf 'node-%s\\n' 1 2 3 4 5",
    "scancel": "",
    "torchrun": '[ "${FAIL:-}" = "${@: -1}" ] && exit 1\n[ -z "${FAIL:-}" ] || sleep 1000',
    "mgrpo": '[ "$1" = store ] || [ -z "${FAIL:-}" ] || sleep 1000',
}


@pytest.fixture
def machines(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which the stand-ins are found first; they write to tmp_path/calls."""
    for name, body in STAND_INS.items():
        head = f'#!/usr/bin/env bash\nprintf "%s\\n" "${{0##*/}} $*" >> {shlex.quote(str(tmp_path / "calls"))}\n'
        (tmp_path / name).write_text(head + body + "\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[1-5]"}
    return {**os.environ, **slurm, "PATH": path, "MGRPO_STORE_PASSWORD": SECRET}


def calls(folder: Path, program: str) -> list[list[str]]:
    lines = (folder / "calls").read_text().splitlines()
    return sorted(line.split() for line in lines if line.startswith(f"{program} "))


@pytest.mark.parametrize("script", ["ssh.sh", "slurm.sh"])
def test_a_script_starts_every_part_once_and_tells_no_one_the_password(script: str, machines, tmp_path: Path):
    done = subprocess.run(
        [FOLDER / script, "/shared/a b.toml"], env=machines, capture_output=True, timeout=60, start_new_session=True
    )
    assert (done.returncode, done.stderr) == (0, b"")
    started = calls(tmp_path, "torchrun")
    trained = ["-m", "mgrpo.engine", "agent", "/shared/a", "b.toml", "--name"]
    assert sorted(call[-7:] for call in started) == [[*trained, "main"], [*trained, "sub"]]
    assert calls(tmp_path, "mgrpo")[-1] == ["mgrpo", "store", "init", "/shared/a", "b.toml"]
    workers = [call for call in calls(tmp_path, "mgrpo") if call[1] == "rollout"]
    assert len(workers) == (16 if script == "ssh.sh" else 2)  # srun starts eight copies of each
    assert SECRET not in (tmp_path / "calls").read_text()


@pytest.mark.parametrize("script", ["ssh.sh", "slurm.sh"])
def test_a_trainer_that_is_given_up_ends_the_script(script: str, machines, tmp_path: Path):
    process = subprocess.Popen(
        [FOLDER / script, "/shared/c.toml"], env=machines | {"FAIL": "sub"}, start_new_session=True
    )
    if script == "slurm.sh":  # this script leaves it to Slurm to end the other parts
        while not (tmp_path / "calls").exists() or not calls(tmp_path, "scancel"):
            assert process.poll() is None
            time.sleep(0.05)
        assert calls(tmp_path, "scancel") == [["scancel", "--signal=INT", "7"]]
        os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) != 0


def test_the_example_is_a_run_on_a_cluster(monkeypatch: pytest.MonkeyPatch):
    config = load_config(FOLDER / "cluster.toml")
    assert config.topology == "cluster"
    assert config.run_dir == "/shared/runs/geography", "the same on every machine"
    assert "@" in config.store.url and ":" not in config.store.url.partition("//")[2]


@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.sh")), ids=lambda path: path.name)
def test_a_script_is_well_formed(script: Path):
    subprocess.run(["bash", "-n", script], check=True)
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, script], check=True)
