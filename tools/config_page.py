"""Describe every key of a run's TOML file: the page docs/config.md, from engine/config/schema.py.

Types, bounds and defaults come from the classes. The meaning of a key is the comment behind its field, or the comment
lines directly above it; the text above a table is the docstring of the section's class. `python tools/pages.py` writes
the page.
"""

from __future__ import annotations

import ast
import io
import json
import tokenize
import types
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import msgspec

from mgrpo.engine.config import schema

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "engine" / "config" / "schema.py"
WORDS = {bool: "true or false", int: "integer", float: "number", str: "string", Any: "any value"}
BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
INTRODUCTION = """\
# Configuration

<!-- Written by tools/pages.py from engine/config/schema.py. Change the comments there, not this page. -->

One TOML file describes one run. This page lists every key with its type, its bounds, its default and its meaning.
Unknown keys, wrong types and values out of bounds are refused: the error names the key, what was given and what was
expected. Relative paths are relative to the working directory. `--set section.key=value` overrides a key of the file.

Only `run_dir`, the section `[environment]` and an agent called `main` are required:

```toml
run_dir = "runs/sums"

[environment]
use = "examples/sums/environment.py:Sums"

[agents.main]
model = "path/to/a/transformers/causal/LM"
```
"""


class Key(NamedTuple):
    """Describe one key of a section."""

    name: str
    type: str
    default: str
    meaning: str


class Section(NamedTuple):
    """Describe one section of the file: its heading, its introduction and its keys."""

    heading: str
    text: str
    keys: list[Key]


def comments(source: str) -> dict[int, tuple[str, bool]]:
    """Return the comment of each line of a source, and whether it stands alone on the line."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            found[token.start[0]] = (token.string.lstrip("# ").strip(), alone)
    return found


def meanings(source: str) -> dict[tuple[str, str], str]:
    """Return the comment that explains each field, by class and field."""
    said, found = comments(source), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    found[node.name, field.target.id] = _meaning(field, said)
    return found


def _meaning(field: ast.AnnAssign, said: dict[int, tuple[str, bool]]) -> str:
    """Return the comments behind a field, or else the comment lines directly above it."""
    lines = range(field.lineno, (field.end_lineno or field.lineno) + 1)
    behind = [said[line][0] for line in lines if line in said]
    if behind:
        return " ".join(behind)
    above: list[str] = []
    line = field.lineno - 1
    while line in said and said[line][1]:
        above.insert(0, said[line][0])
        line -= 1
    return " ".join(above)


def type_text(hint: Any) -> str:
    """Describe a type with its bounds in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _bounded(type_text(arguments[0]), arguments[1:])
    if origin is Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(type_text(each) for each in arguments if each is not type(None))
    if origin is tuple:
        number = "" if arguments[-1] is ... else f" {len(arguments)}"
        return f"list of{number}: {'each ' if number else ''}{type_text(arguments[0])}"
    if origin is list:
        return f"list of: {type_text(arguments[0])}"
    return "table" if origin is dict else WORDS[hint]


def _bounded(text: str, metas: tuple[Any, ...]) -> str:
    """Append the bounds that msgspec checks to the words of a type."""
    for meta in metas:
        limits = {sign: getattr(meta, name) for name, sign in BOUNDS.items()}
        said = [f"{sign} {bound(value)}" for sign, value in limits.items() if value is not None]
        said += [f"matching `{meta.pattern}`"] if meta.pattern else []
        said += ["not empty"] if meta.min_length else []
        text = f"{text} {', '.join(said)}"
    return text


def bound(value: float) -> str:
    """Format a bound; the largest 64-bit integer as a power."""
    return "2^63 - 1" if value == 2**63 - 1 else f"{value:g}"


def default_text(field: msgspec.structs.FieldInfo) -> str:
    """Format a field's default as TOML."""
    if field.required:
        return "required"
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    if value is None:
        return "absent"
    return "`{}`" if value == {} else f"`{json.dumps(value)}`"


def section_of(hint: Any) -> type[msgspec.Struct] | None:
    """Return the class of a nested section, if a type is one (also of a table of sections, or an optional one)."""
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return hint
    return next((found for each in get_args(hint) if (found := section_of(each))), None)


def sections(cls: type[msgspec.Struct] = schema.Config, path: str = "") -> Iterator[Section]:
    """Yield a section and all sections below it, in the order of the file."""
    said, hints = meanings(SOURCE.read_text()), get_type_hints(cls, include_extras=True)
    fields = msgspec.structs.fields(cls)
    keys = [
        Key(field.name, type_text(hints[field.name]), default_text(field), said[cls.__name__, field.name])
        for field in fields
        if not section_of(hints[field.name])
    ]
    yield Section(f"`[{path}]`" if path else "Top level", cleandoc(cls.__doc__ or ""), keys)
    for field in fields:
        if inner := section_of(hints[field.name]):
            named = field.name + (".<name>" if get_origin(hints[field.name]) is dict else "")
            yield from sections(inner, f"{path}.{named}".lstrip("."))


def table(keys: list[Key]) -> str:
    """Format the keys of a section as a Markdown table."""
    rows = [f"| `{key.name}` | {_cell(key.type)} | {key.default} | {_cell(_raised(key.meaning))} |" for key in keys]
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows])


def _raised(text: str) -> str:
    """Begin a meaning with a capital letter, unless it begins with a quote, a key or a single-letter name."""
    word = text.split(" ", 1)[0]
    return text if not word.isalpha() else text[0].upper() + text[1:]


def _cell(text: str) -> str:
    """Escape what would end a cell, and outside of code what would be read as HTML."""
    parts = text.replace("|", "\\|").split("`")
    return "`".join(part if number % 2 else part.replace("<", "&lt;") for number, part in enumerate(parts))


def page() -> str:
    """Return the whole page."""
    parts = [f"## {found.heading}\n\n{_cell(found.text)}\n\n{table(found.keys)}\n" for found in sections()]
    return "\n".join([INTRODUCTION, *parts])
