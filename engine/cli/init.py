"""Write a project that trains as it is, for a user to change: settings, environment, tests and a small model.

The files are in `templates/`: those of `common/` belong to every kind. A name that ends in .txt loses that ending,
which keeps the tools that read this package's Python away from them.
"""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

from mgrpo.engine.model.pretrained import new_directory

TEMPLATES = Path(__file__).parent / "templates"
COMMON = "common"
FIRST = {"sums": "run.toml", "math": "tiny.toml"}  # what to train first, by kind


def init(kind: str, folder: Path) -> str:
    """Write a project of a kind, a key of FIRST, into a new or empty folder, and return what to do next.

    Raises ValueError for another kind, or if the folder holds something; OSError if it cannot be written. Then nothing
    is left of it.
    """
    if kind not in FIRST:
        raise ValueError(f"KIND: {kind!r} given: expected one of {list(FIRST)}")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"DIR: {folder} exists and is not empty: expected a new or an empty directory")
    place = folder / "project" if folder.exists() else folder
    with new_directory(place) as aside:
        for template in (COMMON, kind):
            _copy(TEMPLATES / template, aside)
        runpy.run_path(str(aside / "tiny.py"))["make"](aside / "model")
    if place != folder:  # which somebody may be in: it stays, and is filled
        for path in place.iterdir():
            path.rename(folder / path.name)
        place.rmdir()
    return f"{folder}: a project of {kind!r}; next:\n  cd {folder}\n  mgrpo train {FIRST[kind]}\nREADME.md says more."


def _copy(template: Path, folder: Path) -> None:
    for path in sorted(template.iterdir()):
        shutil.copyfile(path, folder / path.name.removesuffix(".txt"))
