"""Show the figures of bench/results on the pages, though they are outside of docs/.

A page links to a figure by its path in the repository, so that the link also works on GitHub. The site gets copies.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"


def on_files(files: Files, config: Any) -> Files:
    """Add the figures to the site, under figures/."""
    for path in sorted(RESULTS.glob("*.png")):
        files.append(File.generated(config, f"figures/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point the links of a page at the copies."""
    return markdown.replace("](../bench/results/", "](figures/")
