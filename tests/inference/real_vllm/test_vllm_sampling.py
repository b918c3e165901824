"""Test the sampler on real vLLM servers: it records what the trainer computes, through updates and crashes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mgrpo.engine.config.schema import AgentConfig, VLLMConfig
from mgrpo.engine.inference.sampler import Session, WeightsCheck
from mgrpo.engine.model.causal_lm import load_tokenizer
from mgrpo.engine.types import WeightsVersion
from toy import make_model
from turns import play

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")
from mgrpo.engine.inference.vllm.client import VLLMSampler
from mgrpo.engine.inference.vllm.weight_transfer import Transfer
from vllm_servers import RunningServer, Trainer, running

pytestmark = pytest.mark.vllm

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}  # heads of 32
EXACT = 0.002  # nats, mean, in fp32
SECONDS = 240.0  # for a round of turns


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[RunningServer]]]:
    model = make_model(tmp_path_factory.mktemp("model"), **SIZES)
    logs = tmp_path_factory.mktemp("logs")
    servers = [RunningServer(model, "float32", logs / f"{number}.txt") for number in range(2)]
    with running(*servers):
        yield model, servers


def sampler_of(model: Path, servers: Sequence[RunningServer], **agent: Any) -> VLLMSampler:
    config = AgentConfig(
        model=str(model),
        vllm=VLLMConfig(timeout=180.0),
        max_context=256,
        **{"max_new_tokens": 24, "stop": ["\n"]} | agent,
    )
    return VLLMSampler("main", config, load_tokenizer("main", config), [server.url for server in servers], 64)


def new_session(seed: int, greedy: bool = False) -> Session:
    session = Session((seed,), greedy)
    session.append(np.random.default_rng(seed % 5).integers(1, 257, size=9).tolist())
    return session


def gap(trainer: Trainer, session: Session) -> float:
    """Return the mean absolute difference between a session's log-probs and the trainer's, over sampled tokens."""
    truth = np.array([0.0, *trainer.policy.logprobs(session.tokens)])
    sampled = np.array(session.sampled)
    return float(np.abs(truth - np.array(session.logprobs))[sampled].mean())


def until(what: Any) -> None:
    give_up = time.monotonic() + 60
    while not what():
        assert time.monotonic() < give_up
        time.sleep(0.02)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_turns_are_recorded_as_the_trainer_computes_them(world, temperature):
    model, servers = world
    trainer = Trainer(model, "float32", temperature)
    trainer.policy.version = int(10 * temperature)
    assert len(trainer.push(trainer.transfer(*servers))) == 2
    sampler = sampler_of(model, servers, temperature=temperature)
    try:
        until(lambda: len(sampler.router.ready()) == 2)
        sessions = [new_session(seed) for seed in range(24)]
        done = play(sampler, sessions, turns=3, seconds=SECONDS)
        gaps = [gap(trainer, session) for session in sessions]
        assert max(gaps) < EXACT
        version = WeightsVersion(trainer.policy.version, trainer.policy.version)
        assert all(session.oldest == session.newest == version for session in sessions)
        assert len({tuple(session.tokens) for session in sessions}) == 24 and sampler.router.faults == 0
        for completion in (one for all_of in done for one in all_of):
            assert "\n" not in completion.text[:-1] and (completion.tokens == 24 or not completion.truncated)
        greedy = [new_session(3, greedy=True) for _ in range(2)]
        play(sampler, greedy, seconds=SECONDS)
        assert greedy[0].tokens == greedy[1].tokens
        tokens = sessions[0].tokens[:30]
        np.testing.assert_allclose(sampler.logprobs(tokens), trainer.policy.logprobs(tokens), atol=5e-3)
    finally:
        sampler.stop()


def test_an_update_and_a_crash_during_64_turns_lose_none_and_are_recorded(world):
    model, servers = world
    trainer = Trainer(model, "float32")
    trainer.policy.version = 20
    transfer = trainer.transfer(*servers)
    trainer.push(transfer)
    sampler = sampler_of(model, servers, stop=[], max_new_tokens=120)
    updated: list[str] = []

    def disturb() -> None:
        until(lambda: sum(len(server.turns) for server in sampler.router.servers) == 64)
        time.sleep(0.5)
        trainer.step(0.05)
        updated.extend(trainer.push(transfer))
        servers[1].kill()

    thread = threading.Thread(target=disturb)
    try:
        until(lambda: len(sampler.router.ready()) == 2)
        sessions = [new_session(seed) for seed in range(64)]
        thread.start()
        done = play(sampler, sessions, seconds=SECONDS)
        thread.join()
        assert len(updated) == 2 and sampler.router.faults > 0
        for (completion,) in done:
            assert completion.tokens == 120 or not completion.truncated
        old, new = WeightsVersion(20, 20), WeightsVersion(21, 21)
        spans = {(session.oldest, session.newest) for session in sessions}
        assert spans <= {(old, old), (old, new), (new, new)} and (old, new) in spans
        restart(servers[1], sampler, trainer, transfer)
    finally:
        sampler.stop()


def restart(server: RunningServer, sampler: VLLMSampler, trainer: Trainer, transfer: Transfer) -> None:
    """Restart a server, which gets the weights that others were verified with and must be verified too."""
    heard: list[tuple[str, Sequence[float]]] = []
    tokens = new_session(0).tokens
    check = WeightsCheck(tokens, lambda who, logprobs: heard.append((who, logprobs)), due=False)
    sampler.expect(WeightsVersion(21, 21), check)
    server.kill()
    server.start()
    server.wait()
    assert trainer.push(transfer) == [server.url]
    until(lambda: len(sampler.router.ready()) == 2)
    assert server.url in {who for who, _ in heard}
    for _, logprobs in heard:
        np.testing.assert_allclose(logprobs, trainer.policy.logprobs(tokens), atol=5e-3)
