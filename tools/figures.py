"""Look up figures in bench/results/*.json and format them, for the pages that `pages.py` writes."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"


@cache
def results(name: str) -> dict[str, Any]:
    """Read one file of results."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def commit(name: str) -> str:
    """Return the commit at which a benchmark ran."""
    return str(results(name)["commit"]).rstrip("+")


@cache
def named(name: str) -> dict[str, Any]:
    return {row["name"]: row["value"] for row in results(name)["results"]}


def value(name: str, figure: str) -> float:
    """Return one figure of a benchmark. Raises KeyError if it is not there."""
    return float(named(name)[figure])


def run(name: str) -> dict[str, Any]:
    """Return the figures of one entry of runs.json."""
    found: dict[str, Any] = results("runs")["runs"][name]
    return found


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def span(of: Sequence[float]) -> str:
    """Format a value with its interval: 23.8 (18.8 to 29.5)."""
    return f"{of[0]:.1f} ({of[1]:.1f} to {of[2]:.1f})"


def points(of: dict[str, float]) -> str:
    """Format a share and its interval in percent."""
    return span([100 * of[key] for key in ("mean", "low", "high")])


def digits(number: float, count: int = 3) -> str:
    """Format a number with so many significant digits, without an exponent."""
    return f"{float(f'{number:.{count}g}'):g}" if number < 10**count else f"{number:,.0f}"


def wrapped(text: str) -> str:
    """Break the lines of paragraphs and lists anew; leave tables, code and headings as they are."""
    return "\n\n".join(map(_wrapped, text.split("\n\n")))


def _wrapped(block: str) -> str:
    if block.startswith(("#", "|", "`" * 3, "!", "<")):
        return block
    indent = "  " if block.startswith("* ") else ""
    items = (" ".join(item.split()) for item in re.split(r"\n(?=\* )", block))
    filled = (textwrap.fill(each, 120, subsequent_indent=indent, break_on_hyphens=False) for each in items)
    return "\n".join(filled)
