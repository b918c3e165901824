"""Test `mgrpo bench rollout`: a tiny run ends in the line of JSON, and says why if there is no vLLM; never a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fake_vllm import FakeVLLM
from mgrpo.bench import rollout as bench
from mgrpo.engine.inference.vllm import api
from mgrpo.engine.inference.vllm.client import VLLMSampler
from mgrpo.engine.model.causal_lm import load_tokenizer
from mgrpo.engine.types import WeightsVersion


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"QUICK_SCALING": (1, 2), "PROMPT": 9, "TURN": 3, "OBSERVATION": 4}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "TINY", bench.TINY | {"vocab_size": 257, "num_hidden_layers": 1})


def results(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    bench.main(quick=True)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["bench"] == "rollout"
    return {result["name"]: result for result in found["results"]}


def test_without_vllm_the_sampler_in_the_process_is_measured_alone(capsys, monkeypatch):
    def installed() -> str:
        raise ValueError("no vLLM here")

    monkeypatch.setattr(api, "installed", installed)
    found = results(capsys)
    assert found["in process, 2 at a time: episodes"]["value"] > 0
    assert found["in process, 2 at a time: tokens"]["value"] > 0
    missing = found["our client over the least one"]
    assert (missing["value"], missing["met"], missing["why"]) == (None, None, "no vLLM here")


def test_with_servers_all_is_measured(capsys, monkeypatch):
    made: list[FakeVLLM] = []

    class Transfer:
        stalled = 0.1

        def update(self, tensors: Iterator[Any], version: WeightsVersion) -> list[str]:
            assert len(list(tensors)) > 5
            made[-1].update(version)
            return [made[-1].url]

    @contextmanager
    def server(config: Any, folder: Path) -> Iterator[Any]:
        agent = config.agents["main"]
        made.append(FakeVLLM(load_tokenizer("main", agent), pace=0.001))
        sampler = VLLMSampler("main", agent, load_tokenizer("main", agent), [made[-1].url], 8)
        yield sampler, Transfer()
        sampler.stop()
        made[-1].kill()

    monkeypatch.setattr(bench, "server", server)
    monkeypatch.setattr(api, "installed", lambda: "0.32.0")
    found = results(capsys)
    assert all(result["value"] > 0 for result in found.values())
    assert found["our client over the least one"]["target"] == "<= 1.05"
    assert {"vLLM, 1 at a time: tokens", "weight update", "of it the server paused"} <= found.keys()
    assert made[-1].weights == WeightsVersion(1, 1) and len(made[-1].requests) > 20
