"""The first contact with a GPU: what a case raises or lacks ends no other, and the file is whole after every case."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from mgrpo.bench.gpu import __main__ as gpu
from mgrpo.bench.gpu.session import Session

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def results(file: Path) -> dict[str, tuple[float | None, str | None]]:
    return {r["name"]: (r["value"], r["why"]) for r in json.loads(file.read_text())["results"]}


def test_a_case_that_fails_or_lacks_a_package_is_a_result_and_the_next_runs(tmp_path: Path) -> None:
    session = Session("gpu check", CPU, tmp_path / "found.json")

    def fails(session: Session) -> None:
        session.add("first", 1.0, "ms")
        assert results(session.file) == {"broken: first": (1.0, None)}, "not written before the case ended"
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    def lacks(session: Session) -> None:
        raise ModuleNotFoundError("No module named 'liger_kernel'", name="liger_kernel")

    session.run("broken", fails)
    session.run("lacking", lacks)
    session.run("sound", lambda session: session.near("distance", torch.ones(3), torch.ones(3), 1e-6))
    found = results(session.file)
    assert found["broken: failed"] == (None, "RuntimeError: ['CUDA error: an illegal memory access']")
    assert found["lacking: left out"] == (None, "liger_kernel is not installed")
    assert found["sound: distance"] == (0.0, None) and session.failed == ["broken"]


@pytest.mark.parametrize("got", [torch.tensor([1.0, 3.0]), torch.tensor([1.0, torch.nan])])
def test_a_result_far_from_its_reference_fails_its_case(got: torch.Tensor, tmp_path: Path) -> None:
    session = Session("gpu check", CPU, tmp_path / "found.json")
    session.run("losses", lambda session: session.near("loss", got, torch.tensor([1.0, 2.0]), 0.1))
    assert session.failed == ["losses"]


def test_the_cases_run_to_their_end_on_a_cpu(tmp_path: Path) -> None:
    for command in gpu.CASES:
        file = tmp_path / f"{command}.json"
        assert gpu.main(command, file, rehearse=True), results(file)
        for case in gpu.CASES[command]:
            assert f"{case}: time" in results(file)


def test_the_script_names_its_commands() -> None:
    done = subprocess.run(["bash", "bench/gpu.sh"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "bench/gpu.sh check [--rehearse]" in done.stderr
