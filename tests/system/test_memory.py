"""Test what a process says of its memory."""

from __future__ import annotations

import subprocess
import sys

from mgrpo.engine.system.memory import peak_resident, resident

MIB = 2**20


def test_the_peak_is_what_this_program_has_had_not_its_parent() -> None:
    before = peak_resident()
    held = b"x" * (resident() + 200 * MIB)
    assert peak_resident() >= before + 150 * MIB
    code = "from mgrpo.engine.system.memory import peak_resident; print(peak_resident())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(told) < len(held)


def test_what_is_given_back_still_counts() -> None:
    held = b"x" * (peak_resident() + 100 * MIB)
    assert peak_resident() > len(held)
    del held
    assert peak_resident() > resident()
