"""Test what may change when a run goes on, what is refused by name, and what is said of it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from mgrpo.engine.config.resume import check_steps, check_unchanged, fingerprint
from mgrpo.engine.config.schema import Config
from toy import toy_config

FOLDER = Path("/nowhere")
VLLM = {"urls": ["http://a:1"], "timeout": 9.0}


def config(**changes: Any) -> Config:
    return toy_config(FOLDER, **{"topology": "local", "algorithm": {"sampler_cap": 2.0}} | changes)


def agents(**changes: Any) -> dict[str, Any]:
    return {name: {"model": "/m", **changes} for name in ("main", "clerk")}


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (
            {"agents": agents(lr=1e-3)},
            {"agents": agents(lr=1e-4)},
            "agents.clerk.lr: 0.0001 from here on, it was 0.001",
        ),
        (
            {"agents": agents(vllm=VLLM)},
            {"agents": agents(vllm=VLLM | {"urls": ["http://b:2"]})},
            "agents.clerk.vllm.urls: ['http://b:2'] from here on, it was ['http://a:1']",
        ),
        (
            {"store": {"url": "postgresql://me@old/db"}},
            {"store": {"url": "postgresql://me@new/db"}},
            "store.url: 'postgresql://me@new/db' from here on, it was 'postgresql://me@old/db'",
        ),
        ({"steps": 3}, {"steps": 5}, "steps: 5 from here on, it was 3"),
        (
            {"agents": agents()},
            {"agents": agents(lr_schedule="cosine")},
            "agents.clerk.lr_schedule: 'cosine' from here",
        ),
    ],
    ids=["lr", "servers", "store", "steps", "schedule"],
)
def test_what_does_not_change_what_was_trained_may_change_and_is_told(before: Any, now: Any, said: str):
    first = check_unchanged(config(**before), config(**now))[0]
    assert first.startswith(said)
    assert fingerprint(config(**before)) == fingerprint(config(**now))


@pytest.mark.parametrize(
    ("now", "refused"),
    [
        ({"seed": 3}, "seed: 3 given: expected 0"),
        ({"agents": agents(grad_clip=2.0)}, "agents.clerk.grad_clip: 2.0 given: expected 1.0"),
        ({"agents": agents(vllm=VLLM)}, "agents.clerk.vllm.arguments: None given: expected []"),
        ({"store": {"files": "/elsewhere"}}, "store.files: '/elsewhere' given: expected ''"),
        (
            {"environment": {"use": "a.py:A", "options": {"data": 1}}},
            "environment.options.data: 1 given: expected None",
        ),
    ],
)
def test_everything_else_is_refused_with_what_is_given_and_what_was(now: Any, refused: str):
    before = {"agents": agents(), "environment": {"use": "a.py:A"}}
    changed = before | now
    if "vllm" in refused:
        before, changed = changed, before
    with pytest.raises(ValueError, match="resume: ") as error:
        check_unchanged(config(**before), config(**changed))
    assert refused in str(error.value)


def test_options_that_the_environment_calls_volatile_may_change_and_only_they():
    def options(**given: Any) -> Config:
        return config(environment={"use": "a.py:A", "options": given})

    def volatile() -> Collection[str]:
        return ("judge",)

    before, now = options(judge={"url": "http://a"}, data=1), options(judge={"url": "http://b"}, data=1)
    said = "environment.options.judge.url: 'http://b' from here on, it was 'http://a'"
    assert check_unchanged(before, now, volatile) == [said]
    with pytest.raises(
        ValueError, match=r"resume: environment\.options\.judge\.url: 'http://b' given: expected 'http://a'"
    ):
        check_unchanged(before, now)
    with pytest.raises(ValueError, match=r"resume: environment\.options\.data: 2 given: expected 1"):
        check_unchanged(before, options(judge={"url": "http://b"}, data=2), volatile)


def test_the_environment_is_asked_only_if_options_differ():
    def never() -> Collection[str]:
        raise AssertionError("imports the user's code for nothing")

    assert check_unchanged(config(), config(), never) == []
    assert check_unchanged(config(steps=1), config(steps=2), never)


def test_the_fingerprint_does_not_know_keys_that_have_their_default():
    assert fingerprint(config()) == fingerprint(config(agents=agents_of(config())))
    assert fingerprint(config()) != fingerprint(config(reward={"main_format": 0.2}))


def agents_of(of: Config) -> dict[str, Any]:
    """Write out the keys of agents, with a default among them."""
    raw = {}
    for name, agent in of.agents.items():
        keys = ("model", "stop", "max_new_tokens", "max_turns", "max_context", "lr", "grad_clip")
        raw[name] = {key: getattr(agent, key) for key in keys}
    return raw


def test_a_run_does_not_become_shorter_than_it_is() -> None:
    check_steps(config(steps=3), "rl", 3)
    check_steps(config(steps=3), "warmup", 4)
    with pytest.raises(ValueError, match=r"^resume: steps: 3 given: expected at least 4"):
        check_steps(config(steps=3), "rl", 4)
