"""Test which module may import which, by reading the sources, so that an import inside a function counts too."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# An import may only point down this list of rooms, or stay inside its room.
ROOMS = (
    "cli",
    "training",
    "rollout",
    "policy",
    "simulate",
    "report",
    "integrations",
    "batch",
    "inference",
    "model",
    "store",
    "run",
    "environment",
    "hub",
    "config",
    "system",
    "types",
)
DEPTH = {name: depth for depth, name in enumerate(ROOMS)}
MOST = 13  # modules in one folder
ENGINE = sorted((ROOT / "engine").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
BENCH = sorted((ROOT / "bench").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
SUPPORT = {path.stem for path in (ROOT / "tests/support").iterdir()}


def imports(source: str) -> set[str]:
    """Return the dotted names that a source imports: for `from a import b` both a and a.b, relative ones with dots."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {module} | {f"{module.rstrip('.')}.{alias.name}" for alias in node.names}
    return found


def rooms(source: str) -> set[str]:
    """Return the rooms of the engine that a source imports from."""
    found = {name.split(".")[2] for name in imports(source) if name.startswith("mgrpo.engine.")}
    return found & DEPTH.keys()


def room(path: Path) -> str:
    """Return the room of a module of the engine."""
    return path.relative_to(ROOT / "engine").parts[0].removesuffix(".py")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_module_of_the_engine_stands_in_a_room():
    assert {room(path) for path in ENGINE} == {*DEPTH, "__init__", "__main__"}


@pytest.mark.parametrize("path", [path for path in ENGINE if room(path) in DEPTH], ids=name)
def test_an_import_points_down_the_list(path: Path):
    own = room(path)
    for imported in rooms(path.read_text()):
        assert DEPTH[imported] >= DEPTH[own], f"{name(path)} imports {imported}"


def test_no_folder_has_too_many_modules():
    folders = {path.parent for path in [*ENGINE, *KERNELS, *BENCH, *TESTS]}
    for folder in folders:
        modules = [path.name for path in folder.glob("*.py") if path.stem not in ("__init__", "__main__")]
        assert len(modules) <= MOST, (folder, modules)


@pytest.mark.parametrize("folder", sorted({path.parent for path in [*ENGINE, *KERNELS, *BENCH]}), ids=name)
def test_each_folder_says_in_one_sentence_what_it_is_for(folder: Path):
    sentence = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    assert (sentence and sentence[0].isupper()) or sentence.startswith(("mgrpo", "`")), folder


@pytest.mark.parametrize("path", ENGINE, ids=lambda path: path.stem)
def test_the_engine_imports_only_the_public_face_of_the_other_parts(path: Path):
    for name in imports(path.read_text()):
        assert not name.startswith("."), f"{path.stem} imports {name}: expected the absolute name"
        assert name.split(".")[0] not in {"engine", "kernels", "bench", "tests", "examples", *SUPPORT}
        if name == "mgrpo" or name.startswith("mgrpo."):
            assert re.fullmatch(r"mgrpo(\.engine(\.\w+)*|\.kernels(\.\w+)?|\._packing)?", name), name
        assert not re.match(r"mgrpo\.kernels\.[a-z]+$", name) or not (ROOT / "kernels" / f"{name[14:]}.py").exists()


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_the_kernels_import_torch_and_triton_only(path: Path):
    for name in imports(path.read_text()):
        first = name.split(".")[0]
        assert not name.startswith(".." if path.parent.name == "kernels" else "...")
        assert first in {"", "torch", "triton"} or first in sys.stdlib_module_names, f"{path.stem} imports {name}"


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_the_kernels_name_no_other_part_of_ours(path: Path):
    """Not even in an import by name, so that they can be copied into another project as they are."""
    code = re.sub(r'(?s)""".*?"""|#[^\n]*', "", path.read_text())
    named = re.findall(r"mgrpo\.\w+", code)
    assert set(named) <= {"mgrpo.kernels"}, path


@pytest.mark.parametrize("path", BENCH, ids=lambda path: path.stem)
def test_the_benchmarks_use_the_public_faces_and_the_reference_only(path: Path):
    for name in imports(path.read_text()):
        assert not name.startswith("."), f"{path.stem} imports {name}: expected the absolute name"
        inner = re.match(r"mgrpo\.kernels\.(\w+)", name)
        hidden = inner and inner[1] != "reference" and (ROOT / "kernels" / f"{inner[1]}.py").exists()
        assert not hidden, f"{path.stem} imports {name}"


@pytest.mark.parametrize("path", TESTS, ids=name)
def test_no_test_imports_another_test(path: Path):
    """What several of them share is in tests/support."""
    files = {path.stem for path in TESTS if path.stem.startswith("test_")}
    assert not files & imports(path.read_text())


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


def test_a_forbidden_import_would_be_found():
    """The checks above find imports of every form."""
    source = "import mgrpo.engine.cli\ndef f():\n  from mgrpo.engine import run as x, report\n  from .types import y"
    assert rooms(source) == {"cli", "run", "report"}
    assert ".types" in imports(source)
    assert rooms("from mgrpo.engine.config.schema import Config") == {"config"}
    assert rooms("from mgrpo.kernels import Objective\nfrom mgrpo import _packing") == set()
