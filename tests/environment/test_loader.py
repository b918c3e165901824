"""Load environments from files and modules, and refuse what cannot be loaded by name of the key."""

from __future__ import annotations

import logging
import sys

import pytest

from cases.episodes import use
from mgrpo.engine.environment.base import Environment
from mgrpo.engine.environment.loader import load_environment
from toy import SUMS


def test_an_environment_is_loaded_from_a_file_or_a_module_with_its_options(tmp_path):
    assert type(load_environment(use(f"{SUMS}:Sums"))).__name__ == "Sums"
    assert type(load_environment(use("mgrpo.engine.environment.base:Environment"))) is Environment
    file = tmp_path / "mine.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from mgrpo.engine.environment.base import Environment\n"
        "@dataclass\nclass Mine(Environment):\n    size: int = 1\n"
    )
    assert load_environment(use(f"{file}:Mine", size=3)).size == 3  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"environment\.options: \{'height': 3\} given: .*'height'"):
        load_environment(use(f"{file}:Mine", height=3))


def test_a_files_name_shadows_no_module(tmp_path):
    (tmp_path / "logging.py").write_text(SUMS.read_text())
    assert type(load_environment(use(f"{tmp_path}/logging.py:Sums"))).__name__ == "Sums"
    assert sys.modules["logging"] is logging


BESIDE = "from mgrpo import Environment\nfrom {module} import WORD\nclass Mine(Environment):\n    word = WORD\n"


def test_an_environment_may_import_modules_beside_it_at_once_and_later(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("rules_beside", "later_beside"):
        (tmp_path / f"{name}.py").write_text(f"WORD = {name!r}\n")
    late = "    def prompt(self, call):\n        from later_beside import WORD\n        return WORD\n"
    (tmp_path / "mine.py").write_text(BESIDE.format(module="rules_beside") + late)
    monkeypatch.chdir(tmp_path.parent)
    mine = load_environment(use(f"{tmp_path.name}/mine.py:Mine"))
    monkeypatch.chdir("/")
    assert mine.word == "rules_beside" and mine.prompt(None) == "later_beside"  # type: ignore[attr-defined, arg-type]


def test_a_module_beside_an_environment_replaces_none_of_a_library(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "colorsys.py").write_text("raise AssertionError('not this one')\n")
    (tmp_path / "mine.py").write_text("import colorsys\n" + SUMS.read_text())
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    load_environment(use(f"{tmp_path}/mine.py:Sums"))
    assert hasattr(sys.modules["colorsys"], "rgb_to_hls")


def test_a_module_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine.py").write_text(BESIDE.format(module="nowhere_beside"))
    with pytest.raises(
        ValueError, match=r"environment\.use: .*mine\.py given: No module named 'nowhere_beside': expec"
    ):
        load_environment(use(f"{tmp_path}/mine.py:Mine"))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("Sums", r"environment\.use: 'Sums' given: expected file\.py:Class or package\.module:Class"),
        (":Sums", r"environment\.use: ':Sums' given: expected file\.py:Class"),
        ("nowhere.py:Sums", r"environment\.use: nowhere\.py is not a file: expected a Python file"),
        ("no.such.package:Sums", r"environment\.use: 'no\.such\.package' given: No module named"),
        (".relative:Sums", r"environment\.use: '\.relative' given"),
        (f"{SUMS}:Nope", r"environment\.use: 'Nope' in .*environment\.py is not defined: expected a subclass of .*"),
        (f"{SUMS}:Answer", r"environment\.use: 'Answer' in .* is <class .*: expected a subclass of Environment"),
        (f"{SUMS}:", r"environment\.use: '' in .* expected a subclass of Environment"),
    ],
)
def test_an_environment_that_cannot_be_found_is_a_value_error(target, message):
    with pytest.raises(ValueError, match=message):
        load_environment(use(target))
