"""Read sections strictly: a dictionary becomes a frozen structure, or a `ValueError` says what is wrong with it.

The error names the key, the given value and what was expected. This module knows none of the keys itself.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from typing import Any, TypeVar, get_args

import msgspec

Section = TypeVar("Section", bound=msgspec.Struct)


def convert(raw: Any, schema: type[Section], prefix: str) -> Section:
    """Return the section that `raw` holds.

    prefix: what errors put before the keys; "" for the whole file. Raises ValueError for a wrong key or value.
    """
    try:
        return msgspec.convert(raw, schema)
    except msgspec.ValidationError as error:
        raise ValueError(f"config: {_explain(str(error), raw, schema, prefix)}") from error


def check_plain(value: Any, key: str) -> None:
    """Refuse infinities, NaN and dates: TOML has them, but JSON, the format of the run's config.json, does not.

    Raises ValueError naming the key.
    """
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for name, part in inner:
        check_plain(part, f"{key}.{name}" if key else str(name))
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"config: {key}: {value} given: expected a finite number")
    if not isinstance(value, dict | list | tuple | str | bool | int | float | None):
        raise ValueError(f"config: {key}: {value!r} given: expected text, a number, a truth value, a list or a section")


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set `key.path=value`, where the value is written as in TOML; a bare word is a string.

    Raises ValueError if the override has another form.
    """
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ValueError(f"--set: {override!r} given, expected KEY=VALUE such as agents.main.lr=1e-6")
    *parents, last = key.split(".")
    for parent in parents:
        raw = raw.setdefault(parent, {})
        if not isinstance(raw, dict):
            raise ValueError(f"--set: {key}: {parent!r} is a value, expected a section")
    raw[last] = _value(value)


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    except (ValueError, RecursionError) as error:  # a number too long, or lists nested too deep
        raise ValueError(f"--set: {text:.40}… given: expected a value of TOML: {error}") from error


def _explain(message: str, raw: Any, schema: type[msgspec.Struct], prefix: str) -> str:
    """Extend msgspec's message, which says where and what was expected, by the given value or the known keys."""
    expected, _, where = message.partition(" - at `$")
    path = re.findall(r"\w+", where)
    value = raw
    for part in path:
        value = value[int(part)] if isinstance(value, (list, tuple)) else value[part]
    unknown = re.search(r"contains unknown field `(.*)`", expected)
    if unknown:
        path.append(unknown[1])
        value = value[unknown[1]]
        keys = _type(schema, path[:-1]).__struct_fields__
        hints = [f"; did you mean {key}?" for key in difflib.get_close_matches(unknown[1], keys, 1)]
        expected = f"no such key, expected one of {', '.join(keys)}" + "".join(hints)
    if expected.startswith("Invalid enum value"):
        expected = f"expected one of {', '.join(map(repr, get_args(_type(schema, path))))}"
    key = ".".join([prefix, *path] if prefix else path) or "the file"
    return f"{key}: {expected}" if "missing required" in expected else f"{key}: {value!r} given: {expected}"


def _type(schema: Any, path: list[str]) -> Any:
    """Return the type of a key of a section."""
    for part in path:
        schema = next(field.type for field in msgspec.structs.fields(schema) if field.name == part)
        schema = next(
            (one for one in get_args(schema) if isinstance(one, type) and issubclass(one, msgspec.Struct)), schema
        )
    return schema
