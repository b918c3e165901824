"""What an embedder has to have installed, and what is imported on their behalf: nothing that they did not ask for."""

from __future__ import annotations

import subprocess
import sys

KERNELS = """
import re, sys
from importlib.abc import MetaPathFinder
from importlib.metadata import requires

def needed(name, found):
    '''A distribution and all that it requires.'''
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

ENGINE = """
import sys
import mgrpo.engine
assert not {"torch", "numpy", "transformers", "msgspec"} & sys.modules.keys()
assert "Policy" in dir(mgrpo.engine) and not hasattr(mgrpo.engine, "Nothing")
from mgrpo.engine import advantages, align, pack
loaded = {"transformers", "sqlalchemy", "typer"} & sys.modules.keys()
assert not loaded, loaded
for name in dir(mgrpo.engine):
    getattr(mgrpo.engine, name)
print("light")
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_kernels_need_torch_and_triton_alone() -> None:
    assert run(KERNELS) == "forbidden"


def test_the_engines_parts_load_what_they_need_when_they_are_asked_for() -> None:
    """Plain arrays need no model library and no database."""
    assert run(ENGINE) == "light"
