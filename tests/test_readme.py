"""The README says what is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_environment_shown_is_the_one_in_examples() -> None:
    shown = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert shown and shown[1] == (ROOT / "examples/sums/environment.py").read_text()


def test_the_file_tree_names_every_module_and_no_other() -> None:
    tree = README[README.index("## The house") :]
    for room in ("engine", "kernels"):
        block = tree[tree.index(f"\n{room}/") :]
        block = block[: re.search(r"\n\w+/", block[1:]).end()] if re.search(r"\n\w+/", block[1:]) else block
        named = set(re.findall(r"\b(\w+\.py)\b", block))
        assert named == {path.name for path in (ROOT / room).rglob("*.py")} - {"__init__.py"}
