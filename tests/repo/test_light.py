"""Check what each part of the package needs to be installed, and that an import loads nothing that it need not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import mgrpo.engine

ROOT = Path(__file__).parents[2]
ONLY = """
import re, sys
from importlib.abc import MetaPathFinder
from importlib.metadata import requires

def needed(name, found):
    '''Add to `found` all that a distribution requires.'''
    for line in requires(name) or []:
        other = re.match(r"[\\w.-]+", line)[0].replace("-", "_").lower()
        if "extra ==" not in line and other not in found and not other.startswith(("cuda", "nvidia")):
            found.add(other)
            if other != "setuptools":
                try:
                    needed(other, found)
                except ModuleNotFoundError:
                    pass
    return found

allowed = needed("torch", {"torch", "triton", "mgrpo", "torchgen", "functorch", "setuptools"})

class Only(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top.lower() not in allowed and top not in sys.stdlib_module_names and not top.startswith("_"):
            raise ModuleNotFoundError(f"{name}: not in an environment of torch and triton alone", name=name)

sys.meta_path.insert(0, Only())
"""

# What the engine needs beyond torch and triton, hidden as if it were not installed.
HIDDEN = """
import re, sys
from importlib.metadata import requires

needed = {re.match(r"[\\w.-]+", line)[0].lower() for line in requires("mgrpo") if "extra ==" not in line}
hidden = needed - {"torch", "triton", "numpy", "fsspec"}  # torch, and pytest's helpers, look for the last two
assert {"msgspec", "sqlalchemy", "transformers", "rich"} <= hidden

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *rest):
        return None if name.partition(".")[0].lower() in hidden else self.finder.find_spec(name, *rest)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
"""

KERNELS = """
import torch
from mgrpo.kernels import Objective, group_advantages, linear_grpo_loss

hidden, head = torch.randn(4, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
advantages = group_advantages(torch.tensor([1.0, 0, 2, 0]), torch.tensor([0, 4])).values_R
linear_grpo_loss(hidden, head, torch.arange(4), advantages, torch.ones(4), Objective()).loss.backward()
assert hidden.grad.abs().max() > 0
assert "numpy" not in sys.modules and "mgrpo.engine" not in sys.modules
try:
    import numpy
except ModuleNotFoundError:
    print("forbidden")
"""

BENCH = """
import contextlib, io, json, sys
sys.argv = ["bench", "--quick"]
with contextlib.redirect_stdout(io.StringIO()) as out:
    import mgrpo.bench.kernels.__main__
assert not {"msgspec", "rich", "typer", "sqlalchemy", "transformers", "mgrpo.engine"} & sys.modules.keys()
print(json.loads(out.getvalue().splitlines()[-1])["bench"])
"""

TESTS = """
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""

LAZY = """
import importlib, sys
face = importlib.import_module(sys.argv[1])
assert not {"torch", "numpy", "transformers", "msgspec", "mgrpo.engine.policy"} & sys.modules.keys()
assert "Policy" in dir(face) and not hasattr(face, "Nothing")
face.advantages, face.align, face.pack
loaded = {"transformers", "sqlalchemy", "typer"} & sys.modules.keys()
assert not loaded, loaded
for name in dir(face):
    getattr(face, name)
print("light")
"""

# `python -c` puts the working directory first on sys.path, as a script or a notebook does.
WHERE = """
import mgrpo
from mgrpo import Environment, Score, Task, ToolError, load_config
assert mgrpo.__version__
print(mgrpo.__file__)
"""


def run(code: str, *args: str, folder: Path | None = None) -> str:
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=120, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_kernels_need_torch_and_triton_alone() -> None:
    assert run(ONLY + KERNELS) == "forbidden"


def test_the_bench_of_the_kernels_needs_torch_and_triton_alone() -> None:
    assert run(HIDDEN + BENCH) == "kernels"


def test_the_tests_of_the_kernels_need_torch_triton_and_pytest_alone() -> None:
    assert "passed" in run(HIDDEN + TESTS, "tests/kernels/test_kernels_objective.py", folder=ROOT)


@pytest.mark.parametrize("face", ["mgrpo", "mgrpo.engine"])
def test_the_public_names_load_what_they_need_when_they_are_asked_for(face: str) -> None:
    """Functions of plain arrays need neither transformers nor a database."""
    assert run(LAZY, face) == "light"


def test_the_front_door_names_every_public_part_once() -> None:
    assert len(set(mgrpo.__all__)) == len(mgrpo.__all__)
    assert set(mgrpo.__all__) == {"__version__", "Objective", *mgrpo.engine._HOME}


def test_a_clone_in_the_working_directory_never_hides_the_installed_package(tmp_path: Path) -> None:
    """A clone holds engine/ and kernels/, but no __init__.py that would make it the package itself."""
    for part in ("engine", "kernels"):
        (tmp_path / "mgrpo" / part).mkdir(parents=True)
        (tmp_path / "mgrpo" / part / "__init__.py").write_text("raise AssertionError('the clone was imported')")
    installed = run(WHERE, folder=tmp_path)
    assert Path(installed).name == "__init__.py" and not Path(installed).is_relative_to(tmp_path)
    assert run(WHERE, folder=ROOT) == run(WHERE, folder=ROOT / "tests") == installed
    assert not any((ROOT / name).exists() for name in ("__init__.py", "mgrpo", "mgrpo.py"))


def test_the_launcher_of_a_local_run_loads_no_torch():
    run('import sys, mgrpo.engine.training.launcher; assert not {"torch", "transformers"} & sys.modules.keys()')
