"""Test how reproductions of faults report: a script that cannot be tried must never count as a fault that is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from reproduction.verdicts import RUNNER, FaultStands, check, parameters

STATUSES = {
    "from reproduction import fault\nfault('it is there')": 1,
    "from reproduction import held\nheld('refused')": 0,
    "from reproduction import cannot\ncannot('no server')": 2,
    "import no_such_module": 2,
    "from reproduction import no_such_name": 2,
    "def broken(:": 2,
    "from reproduction import held\ntry:\n    1 / 0\nfinally:\n    print('cleaned up')": 2,
}


def written(folder: Path, source: str) -> Path:
    (folder / "script.py").write_text(source)
    return folder / "script.py"


@pytest.mark.parametrize(("source", "status"), STATUSES.items())
def test_an_unexpected_exception_is_no_fault(tmp_path: Path, source: str, status: int) -> None:
    command = [sys.executable, str(RUNNER), str(written(tmp_path, source))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status, done.stderr


@pytest.mark.parametrize("source", [source for source, status in STATUSES.items() if status == 2])
def test_what_could_not_be_tried_fails_also_an_expected_failure(tmp_path: Path, source: str) -> None:
    with pytest.raises(AssertionError, match="could not be tried") as raised:
        check(written(tmp_path, source), 60)
    assert not isinstance(raised.value, FaultStands)


def test_a_fault_that_is_there_is_told_by_name_and_a_script_that_hangs_is_ended(tmp_path: Path) -> None:
    with pytest.raises(FaultStands, match="it is there"):
        check(written(tmp_path, next(iter(STATUSES))), 60)
    with pytest.raises(AssertionError, match="did not end within 1 s"):
        check(written(tmp_path, "import time\ntime.sleep(60)"), 1)


def test_a_list_cannot_name_a_script_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such reproductions"):
        parameters(tmp_path, ["crashes/mended_long_ago"], {})
