"""Run reproductions as processes, and judge each by its exit status."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

RUNNER = Path(__file__).parent


def scripts(folder: Path) -> dict[str, Path]:
    """Return the reproductions below a folder by name: GROUP/NAME."""
    return {f"{path.parent.name}/{path.stem}": path for path in sorted(folder.glob("*/*.py"))}


def parameters(folder: Path, standing: Collection[str], needs: Mapping[str, str]) -> list[Any]:
    """Return a parameter for each reproduction: an expected failure if its fault is still there.

    standing: the names of those. needs: by name, a module without which a reproduction cannot be tried. Raises
    ValueError for a name that is none.
    """
    found = scripts(folder)
    if unknown := {*standing, *needs} - found.keys():
        raise ValueError(f"no such reproductions below {folder}: {sorted(unknown)}")
    return [pytest.param(path, id=name, marks=_marks(name, standing, needs)) for name, path in found.items()]


def _marks(name: str, standing: Collection[str], needs: Mapping[str, str]) -> list[pytest.MarkDecorator]:
    marks = []
    if name in standing:
        marks.append(pytest.mark.xfail(strict=True, raises=FaultStands, reason="the fault is there, not mended yet"))
    if name in needs:
        absent = find_spec(needs[name]) is None
        marks.append(pytest.mark.skipif(absent, reason=f"needs {needs[name]}: pip install '{needs[name]}'"))
    return marks


class FaultStands(AssertionError):
    """A reproduction shows its fault."""


def check(script: Path, limit: float) -> None:
    """Run a reproduction for at most `limit` seconds.

    Raises FaultStands if it shows its fault, and AssertionError if it could not be tried or did not end in time.
    """
    command = [sys.executable, str(RUNNER), str(script)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"{script.name} did not end within {limit:.0f} s: {error.stdout!r}") from None
    told = f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    if done.returncode == 1:
        raise FaultStands(told)
    assert done.returncode == 0, f"{script.name} could not be tried:\n{told}"
