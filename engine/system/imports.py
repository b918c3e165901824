"""Load what a configuration names by an import path: "file.py:name" or "package.module:name"."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any


def load_name(path: str, key: str, kind: str) -> Any:
    """Return the object of an import path, or None if its module has no object of that name.

    kind: "Class" or "function", for the message. Raises ValueError naming the key if `path` is not an import path or
    there is no such module.
    """
    module, _, name = path.rpartition(":")
    if not module:
        raise ValueError(f"{key}: {path!r} given: expected file.py:{kind} or package.module:{kind}")
    return getattr(_load_module(module, key), name, None)


@cache
def load_function(path: str, key: str) -> Callable[..., Any]:
    """Return the function of an import path, always the same one. Raises ValueError naming the key if there is none."""
    found = load_name(path, key, "function")
    if not callable(found):
        module, _, name = path.rpartition(":")
        given = "not defined" if found is None else repr(found)
        raise ValueError(f"{key}: {name!r} in {module} is {given}: expected a function")
    function: Callable[..., Any] = found
    return function


def takes(function: Callable[..., Any], name: str) -> bool:
    """Return whether a user's function has a parameter of that name, and so takes the optional argument."""
    try:
        return name in inspect.signature(function).parameters
    except ValueError:  # a function written in C, without a signature
        return False


def _load_module(name: str, key: str) -> Any:
    if not name.endswith(".py"):
        try:
            return importlib.import_module(name)
        except (ModuleNotFoundError, TypeError) as error:  # TypeError: a relative name
            raise ValueError(f"{key}: {name!r} given: {error}") from error
    if not Path(name).is_file():
        raise ValueError(f"{key}: {name} is not a file: expected a Python file")
    spec = importlib.util.spec_from_file_location(f"mgrpo_user_{Path(name).stem}", name)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses in the file look themselves up here
    _search(str(Path(name).resolve().parent))
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{key}: {name} given: {error}: expected it to import modules that are installed or lie beside it"
        ) from error
    return module


def _search(folder: str) -> None:
    """Let imports find modules in the folder of a user's file, also those that run later, inside its functions.

    The folder comes last in the search, so that a file there cannot replace a module of a library that we import.
    """
    if folder not in sys.path:
        sys.path.append(folder)
