"""Check that a run is resumed, or joined by another process, with the configuration that it was begun with.

One rule says which keys must stay the same, and it is checked in two places. A run directory holds a copy of the
config, so the key that differs can be named. The store only holds a fingerprint, because the processes of a run may
reach the store by different URLs and see different files.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import msgspec

from mgrpo.engine.config.schema import Config

MAY_CHANGE = ("run_dir", "steps", "eval", "checkpoint", "compute", "sampling", "restarts")
MAY_CHANGE_WITHIN = re.compile(r"agents\.\w+\.ranks|store\.(lease|tls|password_file)")


def check_unchanged(before: Config, now: Config) -> None:
    """Check that a resumed run keeps its config, except for its length, its place and its number of processes.

    Raises ValueError naming the key.
    """
    old, new = _fixed(before), _fixed(now)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise ValueError(
                f"resume: {key}: {new.get(key)!r} given: expected {old.get(key)!r}, as the run was begun with "
                f"(only {', '.join(MAY_CHANGE)} and numbers of ranks may change)"
            )
    if list(before.agents) != list(now.agents):  # an agent's place in the order seeds its random numbers
        raise ValueError(f"resume: agents: {list(now.agents)} given: expected the order {list(before.agents)}")


def fingerprint(config: Config) -> str:
    """Return a hash of all keys that every process of a run must share: 16 bytes of blake2b in hex."""
    shared = {key: value for key, value in _fixed(config).items() if not key.startswith(("store.", "run_dir"))}
    return hashlib.blake2b(json.dumps(shared, sort_keys=True).encode(), digest_size=16).hexdigest()


def _fixed(config: Config) -> dict[str, Any]:
    """Return every key that may not change, by its full name."""
    flat = _flat(msgspec.to_builtins(config))
    in_store = {"run_dir's name in store.url": Path(config.run_dir).name} if config.store.url else {}
    return in_store | {
        key: value
        for key, value in flat.items()
        if key.split(".")[0] not in MAY_CHANGE and not MAY_CHANGE_WITHIN.fullmatch(key)
    }


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {key: value}
    parts = (_flat(inner, f"{key}.{name}" if key else name) for name, inner in value.items())
    return {name: inner for part in parts for name, inner in part.items()}
