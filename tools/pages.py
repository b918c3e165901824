"""Write the pages, and the parts of pages, that are made from other files of the repository.

    python tools/pages.py

docs/config.md comes from engine/config/schema.py, docs/models.md from tests/model/model_sweep.json and
docs/performance.md from bench/results/*.json. In README.md and
docs/architecture.md the results table and the sentences of the rooms are written anew between their two comment lines.
tests/repo/test_pages.py fails if a page is out of date.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import config_page
import models_page
import performance

ROOT = Path(__file__).resolve().parents[1]
PART = re.compile(r"(<!-- (results|rooms): written by tools/pages\.py -->\n).*?(<!-- end -->)", re.DOTALL)
ROOM = re.compile(r"^\* `(\w+)`: .*$", re.MULTILINE)


def sentence(room: str) -> str:
    """Return what the `__init__` of a room says of it."""
    path = ROOT / "engine" / room / "__init__.py"
    said = ast.get_docstring(ast.parse(path.read_text()))
    assert said, path
    return said.partition("\n\n")[0].replace("\n", " ")


def with_parts(text: str) -> str:
    """Return a page with its generated parts written anew; the rooms stay in the page's order."""

    def part(found: re.Match[str]) -> str:
        if found[2] == "results":
            return f"{found[1]}\n{performance.summary()}\n\n{found[3]}"
        return ROOM.sub(lambda room: f"* `{room[1]}`: {sentence(room[1])}", found[0])

    return PART.sub(part, text)


def pages() -> dict[Path, str]:
    """Return the text that each page should have."""
    found = {ROOT / name: with_parts((ROOT / name).read_text()) for name in ("README.md", "docs/architecture.md")}
    found[ROOT / "docs" / "config.md"] = config_page.page()
    found[ROOT / "docs" / "models.md"] = models_page.page()
    found[ROOT / "docs" / "performance.md"] = performance.page()
    return found


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
