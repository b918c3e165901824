"""Test real vLLM servers on this machine: log-probs after updates, updates during calls, and all kinds of failures."""

from __future__ import annotations

import http.client
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest
import torch

from fake_server import FakeServer, serve
from mgrpo.engine.inference.vllm import api
from mgrpo.engine.inference.vllm.server import token
from mgrpo.engine.inference.vllm.weight_transfer import Transfer
from mgrpo.engine.types import WeightsVersion
from toy import make_model

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")
from vllm_servers import RunningServer, Stream, Trainer, ask, running, scores

pytestmark = pytest.mark.vllm

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}  # heads of 32
LIMIT = {"float32": 0.002, "bfloat16": 0.02}  # nats; or twice the rounding error of the trainer, if that is more
TOKENS = np.random.default_rng(0).integers(1, 257, 40).tolist()
SMOLLM2 = Path(os.environ.get("MGRPO_TEST_SMOLLM2", "runs/geography/data/smollm2"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Make a model with a tied head and one without."""
    return {tie: make_model(tmp_path_factory.mktemp("model"), tie=tie, **SIZES) for tie in (True, False)}


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def servers(models: dict[bool, Path], logs: Path) -> Iterator[Servers]:
    with ExitStack() as stack:
        yield Servers(models, logs, stack)


class Servers(dict[tuple[str, bool], RunningServer]):
    """Hold servers by dtype and by whether the head is tied. Each starts when it is first used."""

    def __init__(self, models: dict[bool, Path], logs: Path, stack: ExitStack):
        self.models, self.logs, self.stack = models, logs, stack

    def __missing__(self, kind: tuple[str, bool]) -> RunningServer:
        dtype, tie = kind
        self[kind] = RunningServer(self.models[tie], dtype, self.logs / f"{dtype}-{tie}.txt")
        self.stack.enter_context(running(self[kind]))
        return self[kind]


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_after_every_update_the_server_scores_as_the_trainer(servers, models, dtype: str, tie: bool, record_property):
    server, trainer = servers[dtype, tie], Trainer(models[tie], dtype, temperature=0.8)
    transfer, gaps, rounding = trainer.transfer(server), [], []
    for _ in range(10):
        trainer.step(0.3)
        assert trainer.gap(server, TOKENS) > 0.1, "the weights have not moved"
        assert trainer.push(transfer) == [server.url]
        gaps.append(trainer.gap(server, TOKENS))
        rounding.append(trainer.rounding(TOKENS))
    result = f"at most {max(gaps):.2g} nats; rounding of the trainer's own: {max(rounding):.2g}"
    record_property("measured", f"gap after each of 10 updates, {dtype}, {tie=}: {result}")
    assert all(gap <= max(LIMIT[dtype], 2 * own) for gap, own in zip(gaps, rounding, strict=True))


def test_updates_during_64_calls_lose_none_and_mix_versions_as_recorded(servers, models, record_property):
    """Each token's log-prob is that of the weights that its label names, given all tokens before it."""
    server, trainer = servers["float32", False], Trainer(models[False], "float32")
    transfer, truth = trainer.transfer(server), {}

    def update() -> None:
        trainer.step(0.3)
        assert trainer.push(transfer) == [server.url]
        label = api.label(WeightsVersion(trainer.policy.version, trainer.policy.version))
        truth[label] = {name: weight.clone() for name, weight in trainer.policy.masters.weights.items()}

    update()
    streams = [Stream(server.url, TOKENS[: 4 + i % 30], max_tokens=200) for i in range(64)]
    while not all(stream.tokens for stream in streams):
        time.sleep(0.05)
    for _ in range(3):
        update()
    assert [stream.last.finish for stream in streams].count("abort") == 0
    spans = [stream.last.spans for stream in streams]
    mixed = sum(len(of) > 1 for of in spans)
    record_property("measured", f"3 updates under 64 calls: {mixed} calls mix versions, none lost")
    assert mixed >= 32, "few calls ran through an update"
    gaps = []
    for label, weights in truth.items():
        with torch.no_grad():
            for name, weight in trainer.policy.masters.weights.items():
                weight.copy_(weights[name])
            trainer.policy.masters.publish()
        for stream, of in zip(streams, spans, strict=True):
            scored = trainer.policy.logprobs(stream.prompt + stream.tokens)[len(stream.prompt) - 1 :]
            for _, begin, end in (span for span in of if span[0] == label):
                gaps += [abs(a - b) for a, b in zip(scored[begin:end], stream.logprobs[begin:end], strict=True)]
    assert len(gaps) == sum(len(stream.tokens) for stream in streams), "a token has a version that was not sent"
    assert sum(gaps) / len(gaps) <= LIMIT["float32"] and max(gaps) < 0.05


def test_comment_lines_bound_the_labels_of_the_last_chunk(servers, models):
    """A stream that breaks off has nothing else."""
    server, trainer = servers["float32", False], Trainer(models[False], "float32")
    transfer = trainer.transfer(server)
    trainer.step(0.1)
    trainer.push(transfer)
    streams = [Stream(server.url, TOKENS[:8], max_tokens=200) for i in range(16)]
    while not all(stream.tokens for stream in streams):
        time.sleep(0.05)
    trainer.step(0.1)
    trainer.push(transfer)
    for stream in streams:
        spans, position = stream.last.spans, 0
        for bound, chunk in stream.chunks:
            newest = [api.read_label(label) for label, _, end in spans if end > position][:1]
            position += len(chunk.tokens)
            assert not chunk.tokens or newest[0] <= api.read_label(bound)
        assert position == spans[-1][2] and [begin for _, begin, _ in spans[1:]] == [end for _, _, end in spans[:-1]]


def test_turns_end_where_ours_end(servers, models):
    """A turn ends at a stop string, which is among the tokens, at the end-of-sequence token, or at the limit."""
    server, trainer = servers["float32", False], Trainer(models[False], "float32")
    trainer.step(0.1)
    trainer.push(trainer.transfer(server))
    decode = trainer.policy.tokenizer.decode
    greedy = Stream(server.url, TOKENS[:5], max_tokens=20, temperature=0.0)
    assert greedy.last.finish in ("length", "stop")
    text = decode(greedy.tokens)
    stop = text[3:5]
    stopped = Stream(server.url, TOKENS[:5], max_tokens=20, temperature=0.0, stop=[stop])
    assert stopped.last.finish == "stop" and stop in decode(stopped.tokens)
    assert stop not in decode(stopped.tokens[:-1]) and greedy.tokens[: len(stopped.tokens)] == stopped.tokens
    eos = greedy.tokens[6]
    ended = Stream(server.url, TOKENS[:5], max_tokens=20, temperature=0.0, ends=[eos])
    assert ended.last.finish == "stop" and ended.tokens == greedy.tokens[: greedy.tokens.index(eos) + 1]


def test_a_call_whose_client_disconnected_is_aborted(servers):
    """Its id is refused while it runs, and soon free again."""
    server = servers["bfloat16", True]
    long = {"max_tokens": 250, "temperature": 1.0, "top_p": 1.0, "stop": [], "ends": [0]}
    body = json.dumps(api.generate_body(TOKENS[:5], **long))
    headers = {"Content-Type": "application/json", api.REQUEST_ID: "went-away"}
    host, _, port = server.url.removeprefix("http://").partition(":")

    def status(connection: http.client.HTTPConnection) -> int:
        connection.request("POST", api.GENERATE, body, headers)
        return connection.getresponse().status

    with closing(http.client.HTTPConnection(host, int(port), timeout=60)) as first:
        assert status(first) == 200
        with closing(http.client.HTTPConnection(host, int(port), timeout=60)) as second:
            assert status(second) == 409
    until = time.monotonic() + 10
    while status(http.client.HTTPConnection(host, int(port), timeout=60)) == 409:
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("path", ["/pause", "/update_weights", "/collective_rpc", "/sleep", "/reset_prefix_cache"])
def test_control_without_the_token_is_refused(servers, path: str):
    assert ask(servers["float32", False].url, "POST", path)[0] == 401


def test_a_wrong_token_a_wrong_model_and_an_old_version_are_refused(servers, models, tmp_path, monkeypatch):
    server, trainer = servers["float32", False], Trainer(models[False], "float32")
    before = ask(server.url, "GET", api.LABEL)
    with pytest.raises(ValueError, match="the token is wrong"):
        trainer.push(Transfer([server.url], "another", "tcp", trainer.manifest))
    other = Trainer(make_model(tmp_path / "other", tie=False, **SIZES | {"hidden_size": 128}), "float32")
    with pytest.raises(ValueError, match=r"'lm_head\.weight' is float32 \[257, 128\]: expected float32 \[257, 64\]"):
        other.push(other.transfer(server))
    with pytest.raises(ValueError, match=r"weight 'lm_head\.weight' is missing: expected"):
        tied = Trainer(models[True], "float32")
        tied.push(tied.transfer(server))
    with pytest.raises(ValueError, match=r"is bfloat16 .*: expected float32"):
        rounded = Trainer(models[False], "bfloat16")
        rounded.push(rounded.transfer(server))
    with pytest.raises(ValueError, match="started with transfer 'tcp': expected 'other'"):
        trainer.transfer(server).servers[0].check(trainer.manifest, "other")
    monkeypatch.setattr(api, "SUPPORTED", ("0.99",))
    with pytest.raises(ValueError, match=rf"{server.url} is vLLM 0\.32\.0: expected 0\.99"):
        trainer.push(trainer.transfer(server))
    assert ask(server.url, "GET", api.LABEL) == before


class DiesError(Exception):
    """Stand for the death of a trainer."""


def test_an_update_that_fails_leaves_the_old_weights(servers, models):
    server, trainer = servers["bfloat16", True], Trainer(models[True], "bfloat16")
    trainer.step(0.1)
    trainer.push(trainer.transfer(server))
    label, before = ask(server.url, "GET", api.LABEL), trainer.policy.logprobs(TOKENS)
    rounding = trainer.rounding(TOKENS)

    def breaks() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(trainer.policy.full_weights())[:5]
        raise DiesError

    trainer.step(0.5)
    with pytest.raises(DiesError):
        trainer.transfer(server).update(breaks(), WeightsVersion(99, 99))
    assert ask(server.url, "GET", api.LABEL) == label
    gaps = [abs(a - b) for a, b in zip(before, scores(server.url, TOKENS), strict=True)]
    assert sum(gaps) / len(gaps) <= max(LIMIT["bfloat16"], 2 * rounding)
    assert trainer.push(trainer.transfer(server)) == [server.url]
    assert trainer.gap(server, TOKENS) <= max(LIMIT["bfloat16"], 2 * trainer.rounding(TOKENS))


def test_a_hanging_server_is_left_out_and_updated_when_it_answers_again(servers, models):
    server, trainer = servers["float32", False], Trainer(models[False], "float32")
    transfer = trainer.transfer(server, timeout=2.0)
    server.signal(signal.SIGSTOP)
    try:
        trainer.step(0.1)
        assert trainer.push(transfer) == [] and transfer.behind() == []
    finally:
        server.signal(signal.SIGCONT)
    patient, until = trainer.transfer(server), time.monotonic() + 30
    while patient.behind() != [server.url]:
        assert time.monotonic() < until
        time.sleep(0.1)
    assert trainer.push(patient) == [server.url]
    assert trainer.gap(server, TOKENS) <= LIMIT["float32"]


def test_a_server_killed_during_an_update_is_updated_after_its_restart(servers, models):
    """Another server gets its weights nevertheless. The restarted one has the model's own weights until its update."""
    killed, trainer = servers["bfloat16", True], Trainer(models[True], "bfloat16")

    def kills() -> Iterator[tuple[str, torch.Tensor]]:
        for number, named in enumerate(trainer.policy.full_weights()):
            if number == 5:
                killed.kill()
            yield named

    with serve(FakeServer(token=token())) as other:
        transfer = Transfer([killed.url, other.url], token(), "tcp", trainer.manifest)
        trainer.step(0.3)
        assert trainer.push(transfer) == [killed.url, other.url]
        trainer.step(0.3)
        version = WeightsVersion(trainer.policy.version, trainer.policy.version)
        assert transfer.update(kills(), version) == [other.url] and transfer.behind() == []
        killed.start()
        killed.wait()
        assert transfer.behind() == [killed.url] and trainer.gap(killed, TOKENS) > 0.1
        assert trainer.push(transfer) == [killed.url] and transfer.behind() == []
    assert trainer.gap(killed, TOKENS) <= max(LIMIT["bfloat16"], 2 * trainer.rounding(TOKENS))


def test_a_stopped_server_ends_with_all_its_processes(servers, models):
    """Servers are stopped when their weights are neither the old nor the new ones."""
    server, trainer = servers["bfloat16", True], Trainer(models[True], "bfloat16")
    trainer.transfer(server).servers[0].stop()
    assert server.process.wait(30) != 0, "its supervisor would not restart it"
    until = time.monotonic() + 60
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < until:
            server.signal(0)
            time.sleep(0.1)


def test_smollm2_follows_its_trainer(logs, record_property):
    """It compares the log-probs of sampled tokens, which training uses."""
    if not SMOLLM2.is_dir():
        pytest.skip(f"no weights in {SMOLLM2}: make test-vllm downloads them")
    server = RunningServer(SMOLLM2, "bfloat16", logs / "smollm2.txt")
    with running(server):
        trainer, seconds, stalls, gaps, rounding = Trainer(SMOLLM2, "bfloat16"), [], [], [], []
        transfer = trainer.transfer(server)
        prompt = trainer.policy.tokenizer.encode("The capital of France is Paris. The capital of Kenya is")
        for _ in range(3):
            trainer.step(0.01)
            began = time.monotonic()
            assert trainer.push(transfer) == [server.url]
            seconds.append(f"{time.monotonic() - began:.2f}")
            stalls.append(f"{transfer.stalled:.2f}")
            streams = [
                Stream(server.url, prompt, max_tokens=60, ends=[trainer.policy.tokenizer.eos_token_id])
                for _ in range(4)
            ]
            for stream in streams:
                assert stream.last.spans is not None
                scored = trainer.policy.logprobs(prompt + stream.tokens)[len(prompt) - 1 :]
                gaps.append(np.abs(np.subtract(scored, stream.logprobs)).mean())
            rounding.append(trainer.rounding(prompt + streams[0].tokens))
    times = f"updates of {', '.join(seconds)} s, stalls of {', '.join(stalls)} s"
    result = f"gap {np.mean(gaps):.2g} nats; rounding of the trainer's own: {np.mean(rounding):.2g}"
    record_property("measured", f"SmolLM2, bfloat16: {times}, {result}")
    assert np.mean(gaps) <= max(LIMIT["bfloat16"], 2 * np.mean(rounding))
