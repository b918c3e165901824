"""Check that a run is resumed, or joined by another process, with the configuration that it was begun with.

One rule says which keys may change: those that do not change what was trained so far. It is applied in two places. A
run directory holds a copy of the config, so the key that differs can be named. The store only holds a fingerprint,
because the processes of a run may reach the store by different URLs and see different files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection
from typing import Any

import msgspec

from mgrpo.engine.config.schema import AgentConfig, Config, EnvironmentConfig

MAY_CHANGE = ("run_dir", "steps", "eval", "checkpoint", "compute", "sampling", "log", "restarts")
MAY_CHANGE_WITHIN = re.compile(
    r"agents\.\w+\.(ranks|lr|lr_warmup_steps|lr_schedule)|warmup\.lr|store\.(lease|tls|password_file)|"
    r"agents\.\w+\.vllm\.(urls|servers|tensor_parallel|data_parallel|gpus|transfer|timeout|patience)"
)
OPTION = "environment.options."


def check_unchanged(before: Config, now: Config, volatile: Callable[[], Collection[str]] = tuple) -> list[str]:
    """Check that a resumed run keeps what it was trained with; return each change that it takes, in words.

    It may change its length, its place, its numbers of processes, learning rates from here on, where servers and the
    store are (the store itself is compared by the run's id), and the environment's options that `volatile` returns; it
    is called only if options differ. Raises ValueError naming the key, what is given and what it was.
    """
    old, new = (_flat(msgspec.to_builtins(config)) for config in (before, now))
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    loose = set(volatile()) if any(key.startswith(OPTION) for key in changed) else set()
    for key in changed:
        if not (_may_change(key) or key == "store.url" or _option(key) in loose):
            raise ValueError(
                f"resume: {key}: {new.get(key)!r} given: expected {old.get(key)!r}, as the run was begun with (only "
                f"{', '.join(MAY_CHANGE)}, numbers of ranks, learning rates, addresses and the environment's volatile "
                "options may change)"
            )
    if list(before.agents) != list(now.agents):  # an agent's place in the order seeds its random numbers
        raise ValueError(f"resume: agents: {list(now.agents)} given: expected the order {list(before.agents)}")
    return [f"{key}: {new.get(key)!r} from here on, it was {old.get(key)!r}" for key in changed if key != "run_dir"]


def check_steps(config: Config, stage: str, step: int) -> None:
    """Check that a run has not taken more rl steps than it is to have now: its rows and evaluations would be lost.

    stage, step: the step that comes next. Raises ValueError naming the key.
    """
    if stage == "rl" and step > config.steps:
        raise ValueError(f"resume: steps: {config.steps} given: expected at least {step}, which the run has taken")


def fingerprint(config: Config) -> str:
    """Return a hash of all keys that every process of a run must share: 16 bytes of blake2b in hex.

    Keys that have their default are left out, so that a later version with more keys finds the same hash.
    """
    usual = _flat(msgspec.to_builtins(_defaults(config)))
    shared = {
        key: value
        for key, value in _flat(msgspec.to_builtins(config)).items()
        if not _may_change(key) and not key.startswith("store.") and usual.get(key, ...) != value
    }
    return hashlib.blake2b(json.dumps(shared, sort_keys=True).encode(), digest_size=16).hexdigest()


def _defaults(config: Config) -> Config:
    """Return a config of the same agents in which everything else has its default."""
    agents = {name: AgentConfig(model="") for name in config.agents}
    return Config(run_dir="", environment=EnvironmentConfig(use=""), agents=agents)


def _may_change(key: str) -> bool:
    return key.split(".")[0] in MAY_CHANGE or bool(MAY_CHANGE_WITHIN.fullmatch(key))


def _option(key: str) -> str | None:
    """Return the environment's option that a key belongs to, or None."""
    return key.removeprefix(OPTION).split(".")[0] if key.startswith(OPTION) else None


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {key: value}
    parts = (_flat(inner, f"{key}.{name}" if key else name) for name, inner in value.items())
    return {name: inner for part in parts for name, inner in part.items()}
