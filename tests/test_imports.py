"""The layering: who may import whom. Read from the sources, so that an import inside a function counts too."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# An import may only point down this list, not within a line. A package stands here by its name.
LAYERS = (
    ("__init__",),  # the public face, imported at first use
    ("__main__",),
    ("cli",),
    ("check", "simulate"),
    ("launch", "local"),
    ("report", "watch", "agent", "measure", "events"),
    ("curves", "transcript", "worker", "office", "workload", "parts"),
    ("trainer", "records", "tasks", "arrivals", "sharing"),
    ("rollout", "policy", "integrations"),
    ("sampler", "passes"),
    ("batch", "objective", "advantage", "ledger", "weights", "state", "serving"),
    ("rows", "model"),
    ("groups", "layout", "store", "run", "packing", "shards", "masters", "supervisor", "schedule"),
    ("intake", "accounts", "resume"),
    ("roster", "wrappers"),
    ("database",),
    ("schema", "distributed"),
    ("trajectories", "planning", "ragged", "attention", "display", "statistics", "process", "usercode", "boards"),
    ("config", "environment", "asking"),
    ("types", "strict"),
)
DEPTH = {name: depth for depth, names in enumerate(LAYERS) for name in names}
ENGINE = sorted((ROOT / "engine").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
BENCH = sorted((ROOT / "bench").rglob("*.py"))


def imports(source: str) -> set[str]:
    """Dotted names that a source imports, of `from a import b` both a and a.b; relative ones begin with their dots."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {module} | {f"{module.rstrip('.')}.{alias.name}" for alias in node.names}
    return found


def engine_modules(source: str) -> set[str]:
    """Modules of the engine that a source imports, by their names within it."""
    names = {name.split(".")[2] for name in imports(source) if name.startswith("mgrpo.engine.")}
    unknown = {name for name in names if name not in DEPTH}
    return names - unknown | {name for name in unknown if (ROOT / "engine" / f"{name}.py").exists()}


def place(path: Path) -> str:
    """Where a module of the engine stands in the list."""
    return path.relative_to(ROOT / "engine").parts[0].removesuffix(".py")


def test_every_module_of_the_engine_has_its_place_in_the_list():
    assert {place(path) for path in ENGINE} == set(DEPTH)


@pytest.mark.parametrize("path", ENGINE, ids=place)
def test_an_import_points_down_the_list(path: Path):
    own = place(path)
    for imported in engine_modules(path.read_text()) - ({own} if path.name != f"{own}.py" else set()):
        assert DEPTH[imported] > DEPTH[own], f"{own} imports {imported}"


@pytest.mark.parametrize("path", ENGINE, ids=lambda path: path.stem)
def test_the_engine_imports_only_the_public_face_of_the_other_parts(path: Path):
    for name in imports(path.read_text()):
        assert not name.startswith("."), f"{path.stem} imports {name}: expected the absolute name"
        assert name.split(".")[0] not in {"engine", "kernels", "bench", "tests", "examples", "toy"}
        if name == "mgrpo" or name.startswith("mgrpo."):
            assert re.fullmatch(r"mgrpo(\.engine(\.\w+)*|\.kernels(\.\w+)?|\._packing)?", name), name
        assert not re.match(r"mgrpo\.kernels\.[a-z]+$", name) or not (ROOT / "kernels" / f"{name[14:]}.py").exists()


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_the_kernels_import_torch_and_triton_only(path: Path):
    for name in imports(path.read_text()):
        first = name.split(".")[0]
        assert not name.startswith("..")
        assert first in {"", "torch", "triton"} or first in sys.stdlib_module_names, f"{path.stem} imports {name}"


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_the_kernels_name_no_other_part_of_ours(path: Path):
    """Not in an import by name either: they may be lifted out of here as they are."""
    code = re.sub(r'(?s)""".*?"""|#[^\n]*', "", path.read_text())
    named = re.findall(r"mgrpo\.\w+", code)
    assert set(named) <= {"mgrpo.kernels"}, path


@pytest.mark.parametrize("path", BENCH, ids=lambda path: path.stem)
def test_the_benchmarks_use_the_public_faces_only(path: Path):
    for name in imports(path.read_text()):
        assert not name.startswith("."), f"{path.stem} imports {name}: expected the absolute name"
        inner = re.match(r"mgrpo\.kernels\.(\w+)", name)
        assert not (inner and (ROOT / "kernels" / f"{inner[1]}.py").exists()), f"{path.stem} imports {name}"


def test_nothing_imports_the_benchmarks_but_their_tests():
    for path in [*ENGINE, *KERNELS, *(ROOT / "examples").rglob("*.py")]:
        assert not any(name.startswith("mgrpo.bench") for name in imports(path.read_text())), path


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").iterdir()), ids=lambda path: path.name)
def test_the_core_in_cpp_includes_the_standard_library_and_itself_only(path: Path):
    for line in re.findall(r"^\s*#\s*include\s*(.*)$", path.read_text(), re.MULTILINE):
        own = re.fullmatch(r'"([\w.]+)"', line)
        if own:
            assert (ROOT / "csrc" / own[1]).is_file(), line
        else:
            assert re.fullmatch(r"<[a-z_]+>", line), f"{line}: expected a header of the C++ standard library"


def test_only_the_bindings_name_pybind11_or_python():
    for path in (ROOT / "csrc").iterdir():
        assert not re.search(r"pybind|Python\.h|PyObject", path.read_text()), path


def test_the_list_refuses_what_it_is_there_to_refuse():
    """The checks above see imports in every form."""
    source = "import mgrpo.engine.cli\ndef f():\n  from mgrpo.engine import launch as x, report\n  from .types import y"
    assert engine_modules(source) == {"cli", "launch", "report"}
    assert ".types" in imports(source)
    assert engine_modules("from mgrpo.engine.config import Config") == {"config"}
    assert engine_modules("from mgrpo.kernels import Objective\nfrom mgrpo import _packing") == set()
