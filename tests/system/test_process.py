"""Determinism that a process asks torch for."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROCESS = """
import os, sys
from mgrpo.engine.system.process import make_deterministic
make_deterministic(7, sys.argv[1] == "True")
import torch
assert not torch.cuda.is_initialized() and torch.initial_seed() == 7
print(torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
"""


@pytest.mark.parametrize(
    ("deterministic", "given", "expected"),
    [(True, None, "True :4096:8"), (True, ":16:8", "True :16:8"), (False, None, "False None")],
)
def test_a_deterministic_process_sets_what_cublas_reads_when_it_starts(
    deterministic: bool, given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if given:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given)
    done = subprocess.run([sys.executable, "-c", PROCESS, str(deterministic)], capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr
