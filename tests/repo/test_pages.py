"""The generated pages are up to date, every key of the config has a meaning, and every figure comes from a file."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import config_page  # noqa: E402
import figures  # noqa: E402
import pages  # noqa: E402
import performance  # noqa: E402

SECTIONS = list(config_page.sections())
KEYS = [pytest.param(key, id=f"{found.heading}.{key.name}") for found in SECTIONS for key in found.keys]


@pytest.mark.parametrize("path", pages.pages(), ids=lambda path: path.name)
def test_a_page_is_what_the_script_writes(path: Path) -> None:
    assert path.read_text() == pages.pages()[path], "run: python tools/pages.py"


@pytest.mark.parametrize("key", KEYS)
def test_every_key_of_the_config_has_a_meaning(key: config_page.Key) -> None:
    assert len(key.meaning.split()) >= 2, "write a comment behind the field in engine/config/schema.py"


def test_the_sections_are_those_of_the_file() -> None:
    headings = [found.heading for found in SECTIONS]
    assert headings[0] == "Top level" and {"`[agents.<name>.vllm]`", "`[sampling]`"} <= set(headings)
    assert len(set(headings)) == len(headings) == 13
    names = {(found.heading, key.name) for found in SECTIONS for key in found.keys}
    assert {("Top level", "run_dir"), ("`[agents.<name>.vllm]`", "urls"), ("`[store]`", "lease")} <= names


def test_types_bounds_and_defaults_are_those_of_the_schema() -> None:
    found = {(section.heading, key.name): key for section in SECTIONS for key in section.keys}
    clip = found["`[algorithm]`", "clip_low"]
    assert (clip.type, clip.default) == ("number > 0, < 1", "`0.2`")
    assert found["`[agents.<name>]`", "betas"].default == "`[0.9, 0.95]`"
    assert found["`[algorithm]`", "dual_clip"].default == "absent"
    assert found["Top level", "run_dir"].default == "required"
    assert found["Top level", "topology"].type == '`"colocated"`, `"local"`, `"cluster"`'


def test_a_comment_behind_a_field_counts_before_one_above_it() -> None:
    source = "class A:\n    # above\n    x: int = 1  # behind\n    # two\n    # lines\n    y: int = 2\n    z: int = 3\n"
    assert config_page.meanings(source) == {("A", "x"): "behind", ("A", "y"): "two lines", ("A", "z"): ""}


def test_a_figure_that_changes_changes_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "2.16 s" in performance.loss()
    named = dict(figures.named("cpu-kernels"))
    named[f"{performance.LINEAR}ours: time"] = 1234.5
    monkeypatch.setattr(figures, "named", lambda name: named)
    assert "1.23 s" in performance.loss() and "2.16 s" not in performance.loss()


def test_a_figure_that_is_missing_is_named() -> None:
    with pytest.raises(KeyError, match="no such figure"):
        figures.value("cpu-kernels", "no such figure")


def test_each_run_outside_of_the_benchmarks_has_its_commit_and_command() -> None:
    for name, one in figures.results("runs")["runs"].items():
        assert re.fullmatch("[0-9a-f]{7}", one["commit"]) and one["command"] and one["where"], name
