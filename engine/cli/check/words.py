"""Find texts that may make an environment act, from the words in its own source.

An environment without a script does not say what its agents should write. But its source spells out its verbs and the
names of its tools: each short word there is tried as a line, as a call, as an element and as a tool call in JSON.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import textwrap
from dataclasses import dataclass
from typing import Any

from mgrpo.engine.environment.base import Environment

WORD = re.compile(r"[A-Za-z_][\w-]{0,30}")
MOST_WORDS = 40
ARGUMENT = "x"


@dataclass(frozen=True)
class SpelledOut:
    """Hold what an environment's source spells out: short words, and the agents and tools that its actions name."""

    words: tuple[str, ...]
    agents: frozenset[str]
    tools: frozenset[str]


def read_source(environment: Environment) -> SpelledOut:
    """Return what the source of an environment's class spells out, then that of its module."""
    module = sys.modules.get(type(environment).__module__)
    whole = _tree(module)
    classes = [_tree(kind) for kind in type(environment).__mro__ if kind not in (Environment, object)]
    constants = {
        target.id: node.value.value
        for node in ast.walk(whole)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    words = dict.fromkeys(word for tree in (*classes, whole) for word in _words(tree))
    agents, tools = (
        frozenset[str]().union(*(_named(tree, kind, constants) for tree in classes))
        for kind in ("Delegate", "ToolCall")
    )
    return SpelledOut(tuple(words)[:MOST_WORDS], agents, tools)


def _tree(source: Any) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(source)))
    except (OSError, TypeError, SyntaxError, ValueError):  # it has no source, or none that can be read
        return ast.Module([], [])


def _words(tree: ast.AST) -> list[str]:
    """Return the short words among the texts of a source, in its order."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    texts = [str(node.value).strip(" :\n<>/[]()") for node in sorted(found, key=lambda node: node.lineno)]
    return [text for text in texts if WORD.fullmatch(text)]


def _named(tree: ast.AST, kind: str, constants: dict[str, str]) -> frozenset[str]:
    """Return the first arguments of all calls of a class that are written as text or as a constant's name."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == kind and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                found.add(first.value)
            elif isinstance(first, ast.Name) and first.id in constants:
                found.add(constants[first.id])
    return frozenset(found)


def texts_of(words: tuple[str, ...]) -> list[str]:
    """Return texts that may make an environment act, the likeliest forms first."""
    forms = (
        lambda word: f"{word} {ARGUMENT}",
        lambda word: f"{word}: {ARGUMENT}",
        lambda word: f"<{word}>{ARGUMENT}</{word}>",
        lambda word: f"{word}({ARGUMENT})",
        lambda word: json.dumps({"name": word, "arguments": {ARGUMENT: ARGUMENT}}),
        lambda word: f"<tool_call>{json.dumps({'name': word, 'arguments': {ARGUMENT: ARGUMENT}})}</tool_call>",
    )
    return [form(word) for form in forms for word in words]
