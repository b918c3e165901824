"""Try each key of the schema with values that it cannot have: an error names the key, and only ValueErrors come.

The keys are those of the schema itself, so a new one is tried too. What is accepted must survive the run's config.json.
"""

from __future__ import annotations

import datetime
import math
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import pytest

from mgrpo.engine.cli import main as cli
from mgrpo.engine.config import schema
from mgrpo.engine.config.schema import Config, dump_config, load_config, parse_config, read_dump
from toy import make_model, raw_config

WRONG: dict[str, Any] = {
    "empty text": "",
    "text": "many",
    "a null byte": "a\0b",
    "true": True,
    "zero": 0,
    "negative": -1,
    "small": 1e-320,
    "large": 10**18,
    "huge": 10**400,
    "huge float": 1e308,
    "fraction": 0.5,
    "NaN": math.nan,
    "infinity": math.inf,
    "minus infinity": -math.inf,
    "date": datetime.date(2026, 1, 1),
    "time": datetime.time(1, 2),
    "empty list": [],
    "list": ["a", 1, None],
    "list of lists": [[[]]],
    "empty section": {},
    "section": {"a": {"b": 1}},
}


def leaves(kind: Any, prefix: str) -> Iterator[str]:
    """Yield each key of a section and of those within it, by its full name."""
    for field in msgspec.structs.fields(kind):
        key = f"{prefix}.{field.name}".lstrip(".")
        inner = [one for one in (field.type, *get_args(field.type)) if isinstance(one, type)]
        sections = [one for one in inner if issubclass(one, msgspec.Struct)]
        yield key
        for section in sections:
            within = f"{key}.main" if section is schema.AgentConfig else key
            yield from leaves(section, within)


KEYS = list(leaves(Config, ""))


def with_key(raw: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    raw = inner = deepcopy(raw)
    *parents, last = key.split(".")
    for parent in parents:
        inner = inner.setdefault(parent, {})
    inner[last] = value
    return raw


def base(key: str, folder: Path = Path("/nowhere")) -> dict[str, Any]:
    """Return a valid config in which the key may stand."""
    served = ".vllm" in key
    raw = raw_config(folder, topology="local") if served else raw_config(folder)
    if served:
        raw["algorithm"] |= {"sampler_cap": 2.0}
        raw["agents"]["main"]["vllm"] = {}
    return raw


def test_every_section_of_the_schema_is_tried():
    sections = {kind for kind in vars(schema).values() if isinstance(kind, type) and issubclass(kind, schema.Frozen)}
    fields = sum(len(msgspec.structs.fields(kind)) for kind in sections)
    assert len(KEYS) == fields and len(set(KEYS)) == len(KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_a_value_that_a_key_cannot_have_is_told_by_the_key(key: str):
    for what, value in WRONG.items():
        try:
            config = parse_config(with_key(base(key), key, deepcopy(value)))
        except ValueError as error:
            told = str(error)
            assert told.startswith("config: ") and key in told, (what, told)
            assert "\n" not in told and len(told) < 2000, (what, told)
        else:
            assert read_dump(dump_config(config)) == config, what


@pytest.mark.parametrize("key", KEYS)
def test_a_key_in_a_wrong_section_or_misspelt_is_told(key: str):
    section, _, last = key.rpartition(".")
    wrong = f"{section}.{last}x".lstrip(".")
    others = {key.rpartition(".")[0] for key in KEYS} - {"environment.options"}
    siblings = {other for other in others if f"{other}.{last}".lstrip(".") not in KEYS}
    drawn = np.random.default_rng(len(key)).permutation(sorted(siblings))[:3]
    for name in (wrong, *(f"{other}.{last}".lstrip(".") for other in drawn)):
        if name == "agents" or (name.startswith("agents.") and name.count(".") == 1):
            continue  # the name of an agent is free
        with pytest.raises(ValueError) as caught:
            parse_config(with_key(base(name), name, 1))
        assert name in str(caught.value), (name, str(caught.value))


@pytest.mark.parametrize("key", KEYS)
def test_the_command_ends_in_one_line_that_names_the_key(key: str, tmp_path: Path):
    """The same through the file and the command's overrides, as a user writes them."""
    path = tmp_path / "run.toml"
    path.write_text(f'run_dir = "{tmp_path}/run"\nenvironment.use = "a.py:A"\nagents.main.model = "m"\n')
    for value in ("", "nan", "[]", "{}", "-1", "2026-01-01", "'", '"\\u0000"', "[[[", "1e400", "0x", "9" * 5000):
        try:
            load_config(path, [f"{key}={value}"])
        except ValueError as error:
            told = str(error)
            of_servers = ".vllm" in key and "agents.main.vllm: given with topology" in told
            assert key in told or told.startswith("--set: ") or of_servers, (value, told)


# ---- what the schema accepts, as far as `mgrpo check`

ACCEPTED = [
    ("seed", 2**63 - 1),
    ("steps", 10**18),
    ("queries_per_step", 10**18),
    ("restarts", 10**18),
    ("agents.main.max_new_tokens", 10**18),
    ("agents.main.max_turns", 10**18),
    ("agents.main.max_context", 2),
    ("agents.main.max_context", 10**18),
    ("agents.main.ranks", 10**18),
    ("agents.main.temperature", 1e-320),
    ("agents.main.temperature", 1e308),
    ("agents.main.stop", ["\0", "x" * 10**5]),
    ("agents.main.model", ""),
    ("agents.main.model", "\0"),
    ("agents.main.model", "x" * 5000),
    ("algorithm.rollouts", 10**18),
    ("algorithm.aligned_calls", 10**18),
    ("algorithm.advantage", "x"),
    ("algorithm.objective", ":"),
    ("compute.device", ""),
    ("compute.device", "cuda:99"),
    ("compute.device", "meta"),
    ("compute.device", "xla"),
    ("compute.max_tokens", 10**18),
    ("compute.concurrency", 10**18),
    ("compute.compile", True),
    ("environment.use", ""),
    ("environment.use", "x"),
    ("environment.use", "\0:X"),
    ("environment.use", "os:getcwd"),
    ("environment.options", {"n": 1}),
    ("eval.questions", 10**18),
    ("reward.timeout", 1e308),
    ("sampling.workers", 10**18),
    ("sampling.timeout", 1e308),
    ("store.url", "nonsense"),
    ("store.files", "\0"),
    ("warmup.episodes", 10**18),
]


@pytest.mark.parametrize(("key", "value"), ACCEPTED, ids=[f"{key}={value!r:.12}" for key, value in ACCEPTED])
def test_check_never_ends_in_a_traceback(
    key: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Values that only the machine, the model or the environment can refuse."""
    make_model(tmp_path / "model")
    raw = with_key(raw_config(tmp_path), key, value)
    (tmp_path / "run.toml").write_text(_toml(raw))
    monkeypatch.setattr("mgrpo.engine.cli.check.rehearsal.BUDGET", 0.1)
    monkeypatch.setattr(sys, "argv", ["mgrpo", "check", str(tmp_path / "run.toml"), "--patience", "5"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert ended.value.code in (0, 1), said.err
    if ended.value.code:
        assert "error: " in said.err and key.rpartition(".")[2] in said.err, said.err


def _toml(raw: dict[str, Any]) -> str:
    return "\n".join(f"{key} = {_value(value)}" for key, value in raw.items() if not isinstance(value, dict)) + "".join(
        _section(key, value) for key, value in raw.items() if isinstance(value, dict)
    )


def _section(name: str, raw: dict[str, Any]) -> str:
    return f"\n[{name}]\n" + "".join(
        _section(f"{name}.{key}", value) if isinstance(value, dict) else f"{key} = {_value(value)}\n"
        for key, value in sorted(raw.items(), key=lambda item: isinstance(item[1], dict))
    )


def _value(value: Any) -> str:
    return msgspec.json.encode(value).decode()
