"""Hold the words and the shape of the code: how docstrings begin, how long functions and the README are, no circles."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("engine", "kernels", "bench")
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
# Words with which no function's docstring begins: they open a noun or a clause where an imperative is expected.
OPENERS = frozenset(
    re.findall(
        r"\w+",
        """
        a after all an and any are as at both by can each every everything for from here how if in is it its likewise no
        nobody nothing of on once one only or other others raises seconds so some such that the their there they this
        those to two what whatever when where whether which while who whoever whole whose why with without
        """,
    )
)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> Iterator[Function]:
    return (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, Function))


def is_property(node: Function) -> bool:
    return any("property" in ast.unparse(decorator) for decorator in node.decorator_list)


def opener(doc: str) -> str:
    """Return the first word of a docstring in lower case."""
    found = re.match(r"\W*([A-Za-z]+)", doc)
    return found[1].lower() if found else ""


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_docstring_of_a_function_begins_with_a_verb(path: Path) -> None:
    docs = {node.name: ast.get_docstring(node) for node in functions(path) if not is_property(node)}
    wrong = {function: doc.split("\n")[0] for function, doc in docs.items() if doc and opener(doc) in OPENERS}
    assert not wrong, wrong


@pytest.mark.parametrize("path", FILES, ids=name)
def test_the_first_line_of_a_docstring_is_a_sentence(path: Path) -> None:
    tree = ast.parse(path.read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, Function | ast.ClassDef | ast.Module)]
    lines = [doc.split("\n")[0] for node in nodes if (doc := ast.get_docstring(node))]
    assert not [line for line in lines if not line.endswith(".")]


def test_no_class_is_defined_twice() -> None:
    paths = [path for path in FILES if path.relative_to(ROOT).parts[0] != "bench"]
    names = Counter(
        node.name for path in paths for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)
    )
    assert not [name for name, count in names.items() if count > 1]


def test_functions_are_small() -> None:
    """Triton's kernels are left out: each is one function by necessity."""
    paths = [path for path in FILES if path.parent.name != "triton" and path.relative_to(ROOT).parts[0] != "bench"]
    lengths = [node.end_lineno - node.lineno + 1 for path in paths for node in functions(path) if node.end_lineno]
    assert np.median(lengths) <= 8
    assert np.percentile(lengths, 90) <= 20


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


# ---- circles of imports


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("mgrpo", *parts[:-1], *(() if parts[-1] == "__init__" else parts[-1:])))


def imported(path: Path, modules: set[str]) -> set[str]:
    """Return the modules of ours that a module imports while it is itself imported."""
    package = module_of(path) if path.stem == "__init__" else module_of(path).rpartition(".")[0]
    found: set[str] = set()
    for node in at_import(ast.parse(path.read_text()).body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] + "." if node.level else ""
            source = (above + (node.module or "")).rstrip(".")
            found |= {
                f"{source}.{alias.name}" if f"{source}.{alias.name}" in modules else source for alias in node.names
            }
    return found & modules - {module_of(path)}


def at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that run at import: not those in functions, nor those for type checkers alone."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        for part in ("body", "orelse", "finalbody"):
            if not isinstance(node, Function) and (inner := getattr(node, part, None)):
                yield from at_import(inner)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules that lie in a circle, or lead only to some: what is left when leaves are removed in turn."""
    left = dict(graph)
    while leaves := [module for module, needs in left.items() if not needs & left.keys()]:
        for leaf in leaves:
            del left[leaf]
    return sorted(left)


def test_no_imports_go_in_a_circle() -> None:
    paths = {module_of(path): path for path in FILES if path.relative_to(ROOT).parts[0] != "bench"}
    graph = {module: imported(path, set(paths)) for module, path in paths.items()}
    assert sum(map(len, graph.values())) > 100
    assert not circle(graph)


# ---- the checks see what they are there to see


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []


def test_an_opener_is_found() -> None:
    assert [opener(doc) for doc in ("The mean.", "`x` is so.", "(a, b) of it.", "Return it.")] == [
        "the",
        "x",
        "a",
        "return",
    ]
    tree = ast.parse("import a\nif TYPE_CHECKING:\n    import b\ndef f():\n    import c\nclass D:\n    import d")
    assert [ast.unparse(node) for node in at_import(tree.body) if isinstance(node, ast.Import)] == [
        "import a",
        "import d",
    ]
