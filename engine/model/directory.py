"""Say what of a model's directory is read, what may be run, and why one cannot be read.

A model's directory is data, as long as the agent's settings do not say otherwise: no Python of it runs, nobody is asked
on the terminal whether to, and no weights are unpickled. What is allowed is allowed for this directory only: code that
it names but does not hold is refused, and nothing is looked up on a hub.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError

from mgrpo.engine.config.schema import AgentConfig
from mgrpo.engine.hub.snapshots import folder

# What transformers raises for files that are damaged, or describe no model.
UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    ImportError,  # a package that a part of the model needs
    SafetensorError,
    UnpicklingError,
)
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def code_settings(agent: AgentConfig) -> dict[str, bool]:
    """Return what every `from_pretrained` gets: whether the directory's Python may run, and never to ask a hub."""
    return {"trust_remote_code": agent.trust_remote_code, "local_files_only": True}


def weight_settings(agent: AgentConfig) -> dict[str, Any]:
    """Return which files of weights are read: safetensors or, if allowed, also pickles of plain tensors."""
    return {"use_safetensors": None if agent.allow_pickle else True, "weights_only": True} | code_settings(agent)


def refuse_foreign_code(name: str, agent: AgentConfig) -> None:
    """Raise ValueError if Python may run, and a directory names code that lies elsewhere, as "repository--module"."""
    for file in ("config.json", "tokenizer_config.json"):
        found = _read(folder(name, agent) / file) if agent.trust_remote_code else {}
        for given in _texts(found.get("auto_map")):
            if "--" in given:
                raise ValueError(
                    f"agents.{name}.model: {agent.model}/{file} names the code {given!r}: expected code in that "
                    "directory, which is all that trust_remote_code allows to run"
                )


def unreadable(name: str, agent: AgentConfig, what: str, error: Exception) -> ValueError:
    """Return the error to raise for a model directory that transformers cannot read."""
    why, key = f"{type(error).__name__} without a word" if not str(error) else str(error), f"agents.{name}"
    if "trust_remote_code" in why and not agent.trust_remote_code:  # transformers would name an argument of its own
        why = (
            "it needs Python code from that directory, which is not run: expected a model that transformers has, or "
            f"{key}.trust_remote_code = true, with which that code may do whatever you may"
        )
    elif what == "weights" and not agent.allow_pickle and _only_pickled(folder(name, agent)):
        why = (
            f"they are pickled, in {PICKLED[0]}: expected safetensors, or {key}.allow_pickle = true, with which plain "
            "tensors are unpickled"
        )
    elif isinstance(error, UnpicklingError):
        why = f"{PICKLED[0]} holds more than plain tensors, or is damaged: {why.splitlines()[0]}"
    return ValueError(f"{key}.model: {agent.model} has no readable {what}: {why}")


def _only_pickled(path: Path) -> bool:
    return any((path / file).is_file() for file in PICKLED) and not any(path.glob("*.safetensors*"))


def _read(path: Path) -> dict[str, Any]:
    """Return a JSON object, or an empty one for a file that is none; what needs it says so."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts within lists and objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)
