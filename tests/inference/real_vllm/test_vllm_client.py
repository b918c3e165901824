"""Test the client against servers that die, hang and lie: each turn is complete, exact, and recorded once."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cases.ragged_tokenizer import FRAGMENTS, RAGGED
from fake_vllm import EOS, FakeVLLM, logps, truth
from mgrpo.engine.config.schema import AgentConfig, VLLMConfig
from mgrpo.engine.inference.sampler import Completion, Ending, Session, WeightsCheck
from mgrpo.engine.inference.vllm import api, router
from mgrpo.engine.inference.vllm.api import Chunk
from mgrpo.engine.inference.vllm.client import VLLMSampler
from mgrpo.engine.inference.vllm.router import NoServerError
from mgrpo.engine.inference.vllm.streamed_turn import InvalidTurnError, StreamedTurn
from mgrpo.engine.model.causal_lm import load_tokenizer
from mgrpo.engine.run.weights import GapError
from mgrpo.engine.types import NO_WEIGHTS, WeightsVersion
from toy import make_model
from turns import play

TOKEN = "a-token-of-the-servers"


class Kit:
    """Hold a toy model's folder, and servers and samplers that end with the test."""

    def __init__(self, folder: Path) -> None:
        self.model = str(folder)
        self.tokenizer = load_tokenizer("main", AgentConfig(model=self.model, max_context=256))
        self.servers: list[FakeVLLM] = []
        self.samplers: list[VLLMSampler] = []

    def serve(self, **options: Any) -> FakeVLLM:
        self.servers.append(FakeVLLM(self.tokenizer, **options))
        return self.servers[-1]

    def sampler(self, *servers: FakeVLLM, concurrency: int = 300, timeout: float = 30.0, **agent: Any) -> VLLMSampler:
        vllm = VLLMConfig(timeout=timeout, patience=agent.pop("patience", 30.0))
        limits = {"max_new_tokens": 12, "stop": ["\n"], "max_context": 256}
        config = AgentConfig(model=self.model, vllm=vllm, **limits | agent)
        urls = [server.url for server in servers]
        sampler = VLLMSampler("main", config, self.tokenizer, urls, concurrency)
        self.samplers.append(sampler)
        wait_for(lambda: sampler.router.error is not None or all(server.up for server in sampler.router.servers))
        return sampler

    def end(self) -> None:
        for sampler in self.samplers:
            sampler.stop()
        for server in self.servers:
            server.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("vllm") / "model")


@pytest.fixture
def kit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kit]:
    monkeypatch.setattr(router, "TICK", 0.02)
    monkeypatch.delenv(router.TOKEN, raising=False)
    kit = Kit(folder)
    yield kit
    kit.end()


def session(seed: int, length: int = 9, greedy: bool = False) -> Session:
    new = Session((seed,), greedy)
    new.append(np.random.default_rng(seed).integers(1, 257, size=length).tolist())
    return new


def check(sampler: VLLMSampler, sessions: Sequence[Session], done: Sequence[Sequence[Completion]]) -> None:
    """Check where every turn ended, and that each token's log-prob is the toy's, given exactly the tokens before it."""
    agent = sampler.agent
    for one, completions in zip(sessions, done, strict=True):
        trajectory = one.trajectory()
        versions = truth(trajectory, agent.temperature, agent.top_p)
        assert (versions >= 0).all(), (versions, trajectory)
        assert trajectory.version <= versions.min() and versions.max() <= trajectory.version_last
        at = np.flatnonzero(trajectory.sampled)
        assert len(at) == sum(completion.tokens for completion in completions)
        begin = 0
        for completion in completions:
            turn = trajectory.tokens[at[begin : begin + completion.tokens]].tolist()
            begin += completion.tokens
            ends = [sampler.ending.reached(turn[: n + 1]) for n in range(len(turn))]
            assert not any(ends[:-1]) and completion.truncated == (not ends[-1])
            assert ends[-1] or len(turn) == agent.max_new_tokens or len(trajectory) == agent.max_context
            assert completion.text == sampler.tokenizer.decode([token for token in turn if token != EOS])


def test_each_end_of_sequence_token_of_the_generation_config_ends_a_turn(kit, tmp_path):
    kit.model = str(make_model(tmp_path / "model"))
    (tmp_path / "model/generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, 7]}))
    sampler, sent = kit.sampler(kit.serve()), list[list[int]]()
    assert sampler.ending.ends == {EOS, 7}
    make_body = api.generate_body

    def noting(*args: Any, **options: Any) -> dict[str, Any]:
        body = make_body(*args, **options)
        sent.append(body["sampling_params"]["stop_token_ids"])
        return body

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(api, "generate_body", noting)
        play(sampler, [session(1)])
    assert sent and all(ends == [EOS, 7] for ends in sent)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.3, 0.8)])
@pytest.mark.parametrize("together", [1, 5])
def test_turns_are_recorded_with_the_distribution_of_the_servers(kit, temperature, top_p, together):
    sampler = kit.sampler(
        kit.serve(weights=WeightsVersion(3, 1), together=together), temperature=temperature, top_p=top_p
    )
    sessions = [session(seed) for seed in range(20)]
    check(sampler, sessions, play(sampler, sessions, turns=3))
    assert all(one.oldest == one.newest == WeightsVersion(3, 1) for one in sessions)
    assert len({tuple(one.tokens[9:]) for one in sessions}) > 10
    assert sampler.router.faults == 0


def test_a_greedy_session_takes_the_likeliest_token_with_log_prob_0(kit):
    sampler = kit.sampler(kit.serve(), temperature=0.7)
    one = session(0, greedy=True)
    play(sampler, [one])
    for at in range(9, len(one.tokens)):
        assert one.tokens[at] == logps(0, one.tokens[:at], 1.0, 1.0, 257).argmax()
    assert set(one.logprobs) == {0.0}


def test_hundreds_of_turns_are_balanced_within_the_limit_and_reuse_connections(kit):
    servers = [kit.serve() for _ in range(3)]
    sampler = kit.sampler(*servers, concurrency=96)
    sessions = [session(seed) for seed in range(256)]
    check(sampler, sessions, play(sampler, sessions, turns=2, seconds=120))
    assert sum(len(server.requests) for server in servers) == 512
    assert max(server.most for server in servers) <= 60 and sampler.router.faults == 0
    assert sum(len(server.connections) for server in servers) < 256


def test_a_call_returns_to_the_server_that_holds_its_cache(kit):
    servers = [kit.serve(), kit.serve()]
    sampler = kit.sampler(*servers)
    sessions = [session(seed) for seed in range(12)]
    play(sampler, sessions, turns=4)
    begun = [{tuple(body["token_ids"][:9]) for body in server.requests} for server in servers]
    assert not begun[0] & begun[1] and min(map(len, begun)) >= 3


# ---- faults of servers


def lie(change: dict[str, Any], after: int = 0) -> tuple[str, Callable[[dict[str, Any], int], Any]]:
    return "lie", lambda choice, count: choice | change if count > after else choice


def scores(value: Any) -> dict[str, Any]:
    return {"logprobs": {"content": [{"logprob": value}]}}


MISDEEDS = {
    "cut before headers": ("cut before headers", 0),
    "cut before a token": ("cut", 0),
    "cut mid-stream": ("cut", 2),
    "cut after the last chunk": ("cut at the end", None),
    "hangs before headers": ("hang before headers", 0),
    "hangs before a token": ("hang", 0),
    "hangs mid-stream": ("hang", 2),
    "hangs after the last chunk": ("hang at the end", None),
    "torn": ("torn", None),
    "closes": ("close", None),
    **{f"status {code}": ("status", code) for code in (408, 409, 429, 500, 502, 503, 504)},
    "no header": ("header", ""),
    "nonsense header": ("header", "newest"),
    "weights that no trainer sent": ("header", "default"),
    "NaN": lie(scores(math.nan), 1),
    "null": lie(scores(None), 1),
    "above 0": lie(scores(0.5), 1),
    "-inf": lie(scores(-math.inf), 1),
    "text": lie(scores("-1.0"), 1),
    "no log-probs": lie({"logprobs": None}, 1),
    "fewer log-probs": lie({"logprobs": {"content": []}}, 1),
    "ids beyond the vocabulary": lie({"token_ids": [257]}, 1),
    "negative ids": lie({"token_ids": [-1]}, 1),
    "no ids": lie({"token_ids": ["a"]}, 1),
    "a bool": lie({"token_ids": [True]}, 1),
    "more than asked": lie({"token_ids": [65] * 99, "logprobs": {"content": [{"logprob": -1.0}] * 99}}, 1),
    "aborted": lie({"finish_reason": "abort"}, 1),
    "an unknown end": lie({"finish_reason": "tired"}, 1),
    "no choice": ("lie", lambda choice, count: b'data: {"choices": 3}\n\n'),
    "no JSON": ("lie", lambda choice, count: b"data: {{{\n\n"),
    "no UTF-8": ("lie", lambda choice, count: b"data: \xff\xfe\n\n"),
    "an error": ("lie", lambda choice, count: b'data: {"error": {"message": "engine died"}}\n\n'),
    "an endless line": ("lie", lambda choice, count: b"x" * 3_000_000),
    "spans of nonsense": lie({"weight_versions": [{"version": "?", "start": 0, "end": 99}]}),
    "empty events": (
        "lie",
        lambda choice, count: b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n: x\n\n",
    ),
}


@pytest.mark.parametrize("misdeed", MISDEEDS)
def test_whatever_a_server_does_wrong_every_turn_is_complete_and_exact(kit, misdeed):
    servers = [kit.serve(), kit.serve()]
    for server in servers:
        server.misdeeds.extend([("", None), MISDEEDS[misdeed], ("", None), MISDEEDS[misdeed]])
    sampler = kit.sampler(*servers, timeout=0.4)
    sessions = [session(seed) for seed in range(12)]
    check(sampler, sessions, play(sampler, sessions, turns=2))
    assert not any(server.misdeeds for server in servers)
    assert len({request for server in servers for request in server.ids}) == sum(len(s.ids) for s in servers)


def test_a_turn_continues_from_the_tokens_received_before_a_server_died(kit):
    servers = [kit.serve(endless=True), kit.serve(endless=True)]
    for server in servers:
        server.misdeeds.append(("cut", 5))
    sampler = kit.sampler(*servers, stop=[])
    one = session(1)
    (done,) = play(sampler, [one])
    assert done[0].tokens == 12 and (truth(one.trajectory()) == 0).all()
    asked = [body for server in servers for body in server.requests]
    assert sorted(len(body["token_ids"]) for body in asked) == [9, 14, 19]
    assert sorted(body["sampling_params"]["max_tokens"] for body in asked) == [2, 7, 12]
    assert all(one.tokens[: len(body["token_ids"])] == body["token_ids"] for body in asked)


def test_a_server_killed_during_many_turns_loses_none(kit):
    servers = [kit.serve(pace=0.004) for _ in range(2)]
    sampler = kit.sampler(*servers)
    sessions = [session(seed) for seed in range(64)]

    def kill() -> None:
        while servers[0].running < 20:
            time.sleep(0.001)
        servers[0].kill()
        kit.servers.remove(servers[0])

    with beside(kill):
        check(sampler, sessions, play(sampler, sessions, turns=2))
    assert sampler.replayed > 0


def test_turns_wait_while_all_servers_are_dead(kit):
    server = kit.serve(pace=0.004)
    sampler = kit.sampler(server)
    sessions = [session(seed) for seed in range(8)]

    def kill_and_start() -> None:
        while server.running < 8:
            time.sleep(0.001)
        server.kill()
        time.sleep(0.3)
        server.start()

    with beside(kill_and_start):
        check(sampler, sessions, play(sampler, sessions, turns=2))


def test_when_no_server_returns_the_error_names_them_and_their_faults(kit):
    servers = [kit.serve(), kit.serve()]
    sampler = kit.sampler(*servers, patience=0.3)
    play(sampler, [session(0)])
    for server in servers:
        server.kill()
    kit.servers.clear()
    with pytest.raises(
        NoServerError, match=rf"agents\.main\.vllm: no server for 0\.3 s: {servers[0].url}: .*{servers[1].url}: "
    ):
        play(sampler, [session(1)])


def test_the_only_server_is_named_if_it_always_lies(kit, monkeypatch):
    server = kit.serve()
    server.misdeeds.extend([lie(scores(math.nan))] * 1000)
    monkeypatch.setattr(router, "LONGEST", 0.02)
    message = (
        rf"agents\.main\.vllm: a turn got no token for 0\.5 s, last from {server.url}: InvalidTurnError: log-prob nan"
    )
    with pytest.raises(NoServerError, match=message):
        play(kit.sampler(server, patience=0.5), [session(1)])


def test_a_server_that_is_busy_for_a_while_is_waited_for(kit):
    server = kit.serve()
    server.misdeeds.extend([("status", 503)] * 12)
    sampler = kit.sampler(server)
    check(sampler, [one := session(1)], play(sampler, [one]))
    assert len(server.requests) == 13


def test_a_server_that_sends_tokens_of_any_turn_does_not_hang(kit):
    server = kit.serve(endless=True, pace=0.1)
    sampler = kit.sampler(server, timeout=0.5, stop=[])
    sessions = [session(seed) for seed in range(3)]
    server.misdeeds.extend([("", None), ("", None), ("slow", 0.9)])
    check(sampler, sessions, play(sampler, sessions))
    assert sampler.router.faults == 0 and len(server.requests) == 3


def test_a_deaf_server_is_taken_out_of_service_and_its_turns_move(kit, monkeypatch):
    monkeypatch.setattr(router, "ASK", 0.3)
    servers = [kit.serve(pace=0.004), kit.serve(pace=0.004)]
    sampler = kit.sampler(*servers, timeout=0.5)
    play(sampler, [session(0)])
    servers[1].deaf = True
    sessions = [session(seed) for seed in range(1, 9)]
    check(sampler, sessions, play(sampler, sessions, turns=2))
    assert [server.up for server in sampler.router.servers] == [True, False]


# ---- mistakes of the user, which are errors at once


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token": TOKEN}, r"401: expected another token in the environment variable MGRPO_SERVER_TOKEN"),
        ({"vllm": "0.11.2"}, r"is vLLM 0\.11\.2: expected 0\.32"),
        ({"length": 100}, r"--max-model-len 100: expected at least agents\.main\.max_context = 256"),
    ],
)
def test_a_server_that_can_never_serve_is_an_error_at_once(kit, options, message):
    sampler = kit.sampler(kit.serve(), kit.serve(**options))
    wait_for(lambda: sampler.router.error is not None)
    with pytest.raises(ValueError, match=message):
        play(sampler, [session(0)])
    with pytest.raises(ValueError, match=message):
        sampler.expect(WeightsVersion(1, 1))


def test_the_token_comes_from_the_environment(kit, monkeypatch):
    monkeypatch.setenv(router.TOKEN, TOKEN)
    sampler = kit.sampler(kit.serve(token=TOKEN))
    check(sampler, [one := session(0)], play(sampler, [one]))


@pytest.mark.parametrize(("status", "message"), [(400, "status 400.*not now"), (401, "another token"), (404, "404")])
def test_a_permanently_refused_request_is_an_error_and_not_retried(kit, status, message):
    server = kit.serve()
    server.misdeeds.append(("status", status))
    with pytest.raises(ValueError, match=message):
        play(kit.sampler(server), [session(0)])
    assert len(server.requests) == 1


def test_a_server_with_a_shorter_context_is_an_error(kit):
    server = kit.serve(endless=True)
    server.misdeeds.append(lie({"finish_reason": "length"}, 2))
    with pytest.raises(ValueError, match=r"after 12 tokens of context: expected room for 21, a larger --max-model-len"):
        play(kit.sampler(server, stop=[]), [session(0)])


# ---- weights


def test_weights_that_change_during_a_turn_are_recorded_as_its_span(kit):
    server = kit.serve(endless=True, pace=0.01, weights=WeightsVersion(2, 1))
    sampler = kit.sampler(server, stop=[], max_new_tokens=40)
    sessions = [session(seed) for seed in range(64)]

    def update() -> None:
        while server.running < 64:
            time.sleep(0.001)
        time.sleep(0.05)  # some turns have their first tokens then, and none has its last
        server.update(WeightsVersion(5, 2))

    with beside(update):
        check(sampler, sessions, play(sampler, sessions))
    spans = {(str(one.oldest), str(one.newest)) for one in sessions}
    assert ("2/1", "5/2") in spans and sampler.router.faults == 0
    for one in sessions:
        versions = truth(one.trajectory())
        assert (versions.min(), versions.max()) == (one.oldest.optimizer_steps, one.newest.optimizer_steps)


def test_a_broken_stream_is_recorded_with_all_weights_it_may_have_seen(kit):
    servers = [
        kit.serve(endless=True, pace=0.01, weights=WeightsVersion(2, 1)),
        kit.serve(endless=True, pace=0.01, weights=WeightsVersion(2, 1)),
    ]
    for server in servers:
        server.misdeeds.append(("cut", 30))
    sampler = kit.sampler(*servers, stop=[], max_new_tokens=40)

    def update() -> None:
        while not any(server.running for server in servers):
            time.sleep(0.001)
        time.sleep(0.05)
        for server in servers:
            server.update(WeightsVersion(5, 2))

    one = session(3)
    with beside(update):
        check(sampler, [one], play(sampler, [one]))
    assert (one.oldest, one.newest) == (WeightsVersion(2, 1), WeightsVersion(5, 2))


def test_a_server_that_missed_an_update_gets_no_turns_until_it_has_it(kit):
    servers = [kit.serve(weights=WeightsVersion(1, 1)), kit.serve(weights=WeightsVersion(2, 2))]
    sampler = kit.sampler(*servers)
    wait_for(lambda: sampler.version == WeightsVersion(2, 2))
    sessions = [session(seed) for seed in range(6)]
    check(sampler, sessions, play(sampler, sessions))
    assert not servers[0].requests and {one.oldest for one in sessions} == {WeightsVersion(2, 2)}
    servers[0].update(WeightsVersion(2, 2))
    wait_for(lambda: len(sampler.router.ready()) == 2)


def test_a_restarted_server_waits_for_the_trainer(kit):
    servers = [kit.serve(weights=WeightsVersion(2, 2)), kit.serve(weights=WeightsVersion(2, 2))]
    sampler = kit.sampler(*servers)
    wait_for(lambda: len(sampler.router.ready()) == 2)
    servers[1].kill()
    servers[1].weights = NO_WEIGHTS  # as after a start
    servers[1].start()
    wait_for(lambda: len(sampler.router.ready()) == 1)
    play(sampler, [session(seed) for seed in range(6)])
    assert not servers[1].requests
    assert sampler.version == WeightsVersion(2, 2)


def test_turns_wait_for_servers_that_have_no_weights_of_a_trainer(kit):
    server = kit.serve(weights=NO_WEIGHTS)
    sampler = kit.sampler(server, patience=0.2)
    assert sampler.version == NO_WEIGHTS

    def update() -> None:
        time.sleep(0.5)
        server.update(WeightsVersion(0, 0))

    with beside(update):
        check(sampler, [one := session(0)], play(sampler, [one]))


def test_after_a_rewind_the_published_older_version_is_used(kit):
    servers = [kit.serve(weights=WeightsVersion(7, 3)), kit.serve(weights=WeightsVersion(7, 3))]
    sampler = kit.sampler(*servers)
    wait_for(lambda: sampler.version == WeightsVersion(7, 3))
    sampler.expect(WeightsVersion(4, 2))
    assert sampler.version == WeightsVersion(7, 3)
    servers[0].update(WeightsVersion(4, 2))
    wait_for(lambda: sampler.version == WeightsVersion(4, 2))
    play(sampler, [session(seed) for seed in range(4)])
    assert len(servers[0].requests) == 4 and not servers[1].requests


def test_unchanged_weights_have_the_rl_step_that_was_published_last(kit):
    sampler = kit.sampler(kit.serve(weights=WeightsVersion(0, 0)))
    sampler.expect(WeightsVersion(0, 6))
    wait_for(lambda: sampler.version == WeightsVersion(0, 6))
    play(sampler, [one := session(0)])
    assert one.oldest == one.newest == WeightsVersion(0, 6)


PROBE = np.random.default_rng(0).integers(1, 257, size=20).tolist()


def expected(version: int, temperature: float = 1.0) -> list[float]:
    """Return the log-probs of PROBE but its first token."""
    return [logps(version, PROBE[:n], temperature, 1.0, 257)[PROBE[n]] for n in range(1, len(PROBE))]


class Judge:
    """Judge the log-probs of one version, and keep which server sent which."""

    def __init__(self, version: int, due: bool = True) -> None:
        self.version, self.heard = version, list[tuple[str, Sequence[float]]]()
        self.check = WeightsCheck(PROBE, self, due)

    def __call__(self, who: str, logprobs: Sequence[float]) -> None:
        self.heard.append((who, logprobs))
        if not np.allclose(logprobs, expected(self.version)):
            raise GapError(f"{who} lies")


def asked_since(server: FakeVLLM, before: int) -> list[bool]:
    """Return for each later request of a server whether it is a turn."""
    return [bool(request.get("stream")) for request in server.requests[before:]]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_every_server_is_verified_at_the_agents_temperature(kit, temperature):
    servers = [kit.serve(weights=WeightsVersion(2, 1)), kit.serve(weights=WeightsVersion(2, 1))]
    sampler, heard = kit.sampler(*servers, temperature=temperature, top_p=0.5), list[tuple[str, Sequence[float]]]()
    sampler.expect(WeightsVersion(2, 1), WeightsCheck(PROBE, lambda who, logprobs: heard.append((who, logprobs)), True))
    wait_for(lambda: len(sampler.router.ready()) == 2)
    assert {who for who, _ in heard} == {server.url for server in servers} and len(heard) == 2
    for _, logprobs in heard:
        np.testing.assert_allclose(logprobs, expected(2, temperature))
    np.testing.assert_allclose(sampler.logprobs(PROBE), expected(2, temperature))


@pytest.mark.parametrize("restarted", [True, False])
def test_a_returning_server_is_verified_before_it_gets_a_turn(kit, restarted):
    """It is checked even if no check is due, and even if it was only out of reach."""
    server, other = kit.serve(weights=WeightsVersion(2, 1)), kit.serve(weights=WeightsVersion(2, 1))
    sampler = kit.sampler(server, other)
    sampler.expect(WeightsVersion(2, 1), (first := Judge(2)).check)
    wait_for(lambda: len(sampler.router.ready()) == 2)
    sampler.expect(WeightsVersion(3, 2), (second := Judge(3, due=False)).check)
    for one in (server, other):
        one.update(WeightsVersion(3, 2))
    wait_for(lambda: sampler.version == WeightsVersion(3, 2) and len(sampler.router.ready()) == 2)
    assert len(first.heard) == 2 and not second.heard
    before = len(server.requests)
    server.kill()
    wait_for(lambda: len(sampler.router.ready()) == 1)
    server.weights = NO_WEIGHTS if restarted else WeightsVersion(3, 2)
    server.start()
    if restarted:
        server.update(WeightsVersion(3, 2))
    wait_for(lambda: len(sampler.router.ready()) == 2)
    check(sampler, sessions := [session(seed) for seed in range(8)], play(sampler, sessions))
    assert [who for who, _ in second.heard] == [server.url]
    turns = asked_since(server, before)
    assert turns == [False] * (len(PROBE) - 1) + [True] * (len(turns) - len(PROBE) + 1) and turns[-1]


def test_a_returning_server_with_other_weights_than_it_reports_gets_no_turn(kit):
    server, other = kit.serve(weights=WeightsVersion(2, 1)), kit.serve(weights=WeightsVersion(2, 1), pace=0.01)
    sampler = kit.sampler(server, other)
    sampler.expect(WeightsVersion(2, 1), Judge(2).check)
    wait_for(lambda: len(sampler.router.ready()) == 2)
    server.kill()
    wait_for(lambda: len(sampler.router.ready()) == 1)
    server.model_version, before = lambda version: version + 1, len(server.requests)
    server.start()
    wait_for(lambda: sampler.router.error is not None)
    for act in (lambda: play(sampler, [session(0)]), lambda: sampler.expect(WeightsVersion(2, 1))):
        with pytest.raises(GapError, match=f"{server.url} lies"):
            act()
    assert not any(asked_since(server, before))


def test_a_server_that_fails_during_its_check_is_checked_again(kit):
    server = kit.serve(weights=WeightsVersion(2, 1))
    sampler = kit.sampler(server)
    server.misdeeds.extend([("", None)] * 5 + [("status", 500)])
    sampler.expect(WeightsVersion(2, 1), (judge := Judge(2)).check)
    wait_for(lambda: bool(judge.heard))
    check(sampler, [one := session(0)], play(sampler, [one]))
    assert sampler.router.faults == 1 and len(judge.heard) == 1


def test_log_probs_of_other_weights_than_expected_are_not_used(kit):
    """The server got new weights, and the router does not know it yet."""
    server = kit.serve(weights=WeightsVersion(2, 1))
    sampler = kit.sampler(server)
    known = sampler.router.servers[0]

    async def ask() -> None:
        known.version = WeightsVersion(1, 1)
        await sampler.router.scores(known, PROBE)

    with pytest.raises(router.MovedError):
        sampler.wait(ask())


# ---- where a turn ends


@settings(max_examples=150)
@given(
    st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=8).map(lambda parts: [i for part in parts for i in part]),
    st.lists(st.sampled_from(["\n", "\n\n", "é", "€", "🙂", "€\n", "</s>", "bé", "ab\na", "a€"]), max_size=3),
    st.integers(1, 12),
    st.lists(st.integers(1, 4), min_size=1, max_size=12),
    st.integers(0, 12),
)
def test_a_turn_ends_as_in_process_for_any_division_into_chunks(tokens, stop, allowed, sizes, broken):
    """broken: the number of chunks after which a server dies and another continues."""
    turn = StreamedTurn([1, 2], allowed, Ending(RAGGED, stop), 18)
    turn.begin("0/0")
    begin, chunks = 0, 0
    for size in sizes * len(tokens):
        if turn.left == 0 or begin >= len(tokens):
            break
        some = tokens[begin : begin + min(size, turn.left)]
        turn.take(Chunk(some, [-1.0] * len(some)))
        begin, chunks = begin + len(some), chunks + 1
        if chunks == broken:
            turn.settle()
            turn.begin("0/0")
    turn.settle()
    limit = min(allowed, len(tokens))
    ends = [n for n in range(1, limit + 1) if any(s in RAGGED.decode(tokens[:n]) for s in stop) or tokens[n - 1] == 0]
    assert turn.tokens == tokens[: ends[0] if ends else limit]
    assert len(turn.logprobs) == len(turn.tokens) and turn.stopped == bool(ends)


def test_nothing_of_an_invalid_chunk_is_kept():
    turn = StreamedTurn([1], 5, Ending(RAGGED, []), 18)
    turn.begin("0/0")
    turn.take(Chunk([3, 4], [-1.0, -2.0]))
    with pytest.raises(InvalidTurnError, match="log-prob nan"):
        turn.take(Chunk([5, 6], [-1.0, math.nan]))
    assert (turn.tokens, turn.logprobs) == ([3, 4], [-1.0, -2.0])


@pytest.mark.parametrize(
    ("spans", "told"),
    [
        ([], "weight versions of 0 tokens: expected those of 2"),
        ([("1/1", 0, 1)], "weight versions of 1 tokens: expected those of 2"),
        ([("1/1", 0, "2")], "expected whole numbers"),
        ([("1/1", 0, 1), ("9/9", 1, 2)], r"weights 9/9: expected none newer than 2/2, as labelled"),
        ([("default", 0, 2)], "weights that no trainer has sent"),
        ([(None, 0, 2)], "None"),
    ],
)
def test_a_count_of_weights_that_cannot_be_is_not_believed(spans, told):
    turn = StreamedTurn([1], 5, Ending(RAGGED, []), 18)
    turn.begin("1/1")
    turn.take(Chunk([3], [-1.0]))
    turn.take(Chunk(label="2/2"))
    with pytest.raises(InvalidTurnError, match=told):
        turn.take(Chunk([4], [-1.0], "stop", spans))
    assert turn.tokens == [3] and turn.versions == {WeightsVersion(1, 1)}
    turn.take(Chunk([4], [-1.0], "stop", [("1/1", 0, 1), ("2/2", 1, 2)]))
    assert turn.versions == {WeightsVersion(1, 1), WeightsVersion(2, 2)}


def test_a_full_context_adds_nothing_and_sends_no_request(kit):
    server = kit.serve()
    sampler = kit.sampler(server, max_context=9)
    assert play(sampler, [session(0)]) == [[Completion("", 0, truncated=True)]]
    assert not server.requests


@pytest.mark.parametrize(("max_context", "tokens"), [(12, 3), (21, 12), (99, 12)])
def test_the_limits_of_turn_and_context_end_a_turn(kit, max_context, tokens):
    sampler = kit.sampler(kit.serve(endless=True), stop=[], max_context=max_context)
    (done,) = play(sampler, [session(2)])
    assert (done[0].tokens, done[0].truncated) == (tokens, True)


def test_an_abandoned_turn_is_aborted_on_the_server_and_leaves_the_session_unchanged(kit):
    server = kit.serve(endless=True, pace=0.05)
    sampler = kit.sampler(server, stop=[], max_new_tokens=500)
    one = session(0)
    before = list(one.tokens)

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await sampler.act(one)
        sampler.close(one)

    asyncio.run(give_up())
    assert one.tokens == before and len(one.trajectory()) == 9
    wait_for(lambda: server.aborted == 1 and server.running == 0)
    assert not sampler.homes and sampler.router.faults == 0
    wait_for(lambda: not sampler.router.servers[0].turns)
    check(sampler := kit.sampler(server), [two := session(1)], play(sampler, [two]))


@contextmanager
def beside(work: Callable[[], None]) -> Iterator[None]:
    """Run `work` in another thread meanwhile. Raises what it raises."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        yield
        future.result(30)


def wait_for(what: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 20
    while not what():
        assert time.monotonic() < give_up
        time.sleep(0.005)
