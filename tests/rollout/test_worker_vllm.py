"""Test a rollout worker with vLLM servers: each rollout counts once, and the recorded weights are those used."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cases.worker import STEPS, Flaky, K, Q, World
from fake_vllm import FakeVLLM, logps, truth
from mgrpo.engine.config.schema import VLLMConfig
from mgrpo.engine.inference.vllm import router
from mgrpo.engine.model.causal_lm import load_tokenizer
from mgrpo.engine.rollout import worker as worker_module
from mgrpo.engine.run.metrics import read_metrics
from mgrpo.engine.run.trajectories import read
from mgrpo.engine.run.weights import GapError, probe_tokens
from mgrpo.engine.store import Publication
from mgrpo.engine.system import retry
from mgrpo.engine.types import NO_WEIGHTS, WeightsVersion

VERSIONS = [10 * step for step in range(STEPS + 1)]


class Served(World):
    """A world whose agents have two servers each; those in `updated` get published weights a moment later."""

    def __init__(self, folder: Path, sampling: dict[str, Any] | None = None, **options: Any) -> None:
        served, pace = options.pop("served", ("main", "clerk")), options.pop("pace", 0.0)
        super().__init__(folder, sampling, **options)
        tokenizer = load_tokenizer("main", self.config.agents["main"])
        self.fakes = {name: [FakeVLLM(tokenizer, weights=NO_WEIGHTS, pace=pace) for _ in range(2)] for name in served}
        agents = {
            name: msgspec.structs.replace(agent, vllm=self._section(name) if name in served else None)
            for name, agent in self.config.agents.items()
        }
        self.config = msgspec.structs.replace(self.config, agents=agents)

    def _section(self, name: str) -> VLLMConfig:
        return VLLMConfig(urls=[fake.url for fake in self.fakes[name]], timeout=1.0, patience=20.0)

    def publish(self, name: str, step: int, **changes: Any) -> Publication:
        if name not in self.fakes:
            return super().publish(name, step, **changes)
        tokens = probe_tokens(self.config.seed, 257, 128)
        probe = tuple(float(logps(10 * step, tokens[:n], 1.0, 1.0, 257)[tokens[n]]) for n in range(1, len(tokens)))
        publication = super().publish(name, step, **{"probe": probe} | changes)
        threading.Timer(0.05, self.push, (name, WeightsVersion(10 * step, step))).start()
        return publication

    def push(self, name: str, version: WeightsVersion) -> None:
        for fake in self.fakes[name]:
            fake.update(version)

    def check(self, queries: int = STEPS * Q) -> None:
        super().check(queries)
        for call, trajectory in zip(self.calls, read(f"{self.run_dir}/trajectories", self.positions), strict=True):
            if call.agent in self.fakes:
                versions = truth(trajectory, versions=VERSIONS)
                assert call.version <= versions.min() and versions.max() <= call.version_last
                assert call.step == call.version / 10

    @property
    def positions(self) -> list[Any]:
        return [call.position for call in self.calls]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "IDLE", (0.001, 0.01))
    monkeypatch.setattr(retry, "PAUSES", (0.001, 0.001))
    monkeypatch.setattr(worker_module, "LOOK", 0.02)
    monkeypatch.setattr(worker_module, "FLUSH", 0.05)
    monkeypatch.setattr(router, "TICK", 0.01)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Any]:
    worlds: list[Served] = []

    def make(*args: Any, **options: Any) -> Served:
        worlds.append(Served(tmp_path, *args, **options))
        return worlds[-1]

    yield make
    for world in worlds:
        for fakes in world.fakes.values():
            for fake in fakes:
                fake.kill()


def test_on_policy_every_call_is_sampled_by_the_weights_of_its_step(served):
    world = served()
    world.worker().run(world)
    world.check()
    assert all(c.step == c.query // Q and c.version == c.version_last == 10 * c.step for c in world.calls)
    assert list(world.store.roles.evaluations()) == [0, STEPS]
    assert all(fake.requests and not fake.running for fakes in world.fakes.values() for fake in fakes)
    rows = [row for row in read_metrics(world.run_dir / "workers/w/metrics.jsonl") if "rollouts/scored" in row]
    assert [row["rollouts/scored"] for row in rows] == [Q * K] * STEPS
    assert all(row["main/servers"] == 2 and row["main/server_faults"] == 0 for row in rows)


def test_one_agent_may_be_sampled_in_process_and_another_by_servers(served):
    world = served(served=("clerk",))
    world.worker().run(world)
    world.check()
    assert all(c.step == c.query // Q and c.version == c.version_last == 10 * c.step for c in world.calls)


def test_weights_that_come_amid_turns_are_recorded_as_spans(served):
    world = served({"max_staleness": 1}, pace=0.005)
    done: list[int] = []

    def stop() -> bool:
        """Step 1 is published while turns run."""
        if min(world.steps.values()) == 0 and world.fakes["clerk"][0].running and 0 in world.store.roles.evaluations():
            for name in world.config.agents:
                world.publish(name, 1)
            done.append(1)
        return world()

    world.worker().run(stop)
    world.check(Q)
    assert done and any(call.version < call.version_last for call in world.calls)


def kill_and_start(fake: FakeVLLM) -> None:
    """Replace the server's process by a new one, which lacks the trainer's weights until they are sent."""
    fake.kill()
    weights, fake.weights = fake.weights, NO_WEIGHTS
    time.sleep(0.1)
    fake.start()
    time.sleep(0.1)
    if fake.weights == NO_WEIGHTS:
        fake.update(weights)


def go_deaf(fake: FakeVLLM) -> None:
    fake.deaf = True
    time.sleep(1.5)
    fake.deaf = False


@pytest.mark.parametrize("how", [kill_and_start, go_deaf])
def test_servers_that_die_or_hang_among_episodes_cost_no_rollout(served, how, monkeypatch):
    monkeypatch.setattr(router, "ASK", 0.3)
    world = served(pace=0.003)
    threads: list[threading.Thread] = []

    def stop() -> bool:
        waiting = [fakes[0] for fakes in world.fakes.values() if fakes[0].running]
        if waiting and len(threads) < 4 and (not threads or not threads[-1].is_alive()):
            threads.append(threading.Thread(target=how, args=(waiting[0],)))
            threads[-1].start()
        return world()

    world.worker().run(stop)
    for thread in threads:
        thread.join()
    world.check()
    assert threads and {r.status for q in range(world.opened) for r in world.store.groups.rollouts_of(q)} == {"scored"}


def test_a_store_that_fails_now_and_then_gets_everything_once(served):
    world = served({"max_staleness": 1})
    store = Flaky(world.url)
    world.worker(store=store).run(world)
    world.check()
    assert store.failures > 20 and list(world.store.roles.evaluations()) == [0, STEPS]


def test_a_server_whose_weights_are_not_the_trainers_ends_the_run_by_the_probe(served):
    world = served()
    world.fakes["clerk"][1].model_version = lambda version: version + 1
    with pytest.raises(GapError, match=r"agents\.clerk: with version 0 .* differ from the trainer's"):
        world.worker().run(world)


def test_when_no_server_comes_back_the_worker_ends_with_their_urls(served):
    world = served()
    agents = {
        name: msgspec.structs.replace(agent, vllm=msgspec.structs.replace(agent.vllm, patience=0.3))
        for name, agent in world.config.agents.items()
    }
    world.config = msgspec.structs.replace(world.config, agents=agents)

    def stop() -> bool:
        if any(fake.requests for fake in world.fakes["clerk"]):
            while world.fakes["clerk"]:
                world.fakes["clerk"].pop().kill()
        return world()

    url = world.fakes["clerk"][0].url
    with pytest.raises(router.NoServerError, match=rf"agents\.clerk\.vllm: no server for 0\.3 s: {url}"):
        world.worker().run(stop)
    assert [lease.query for lease in world.take("another", 9)] == list(range(Q))


def test_stopped_it_ends_the_turns_on_the_servers(served):
    world = served(pace=0.05)
    fakes = [fake for fakes in world.fakes.values() for fake in fakes]
    world.worker().run(lambda: world() or sum(fake.running for fake in fakes) >= Q * K)
    give_up = time.monotonic() + 10
    while any(fake.running for fake in fakes):
        assert time.monotonic() < give_up
        time.sleep(0.01)
    assert [lease.query for lease in world.take("another", 9)] == list(range(Q))


def test_weights_that_did_not_move_are_of_the_newest_step(served, monkeypatch):
    """A frozen agent keeps its version: its servers are sent nothing, and still its calls are not stale."""
    world = served()
    real = World.publish

    def publish(name: str, step: int) -> Any:
        if name == "clerk" and step:
            first = world.store.roles.publications(0)["clerk"]
            same = {"file": first.file, "checksum": first.checksum, "size": first.size, "probe": first.probe}
            return real(world, name, step, version=0, **same)
        return Served.publish(world, name, step)

    monkeypatch.setattr(world, "publish", publish)
    world.worker().run(world)
    World.check(world)
    assert all(c.step == c.query // Q for c in world.calls)
    assert {c.version for c in world.calls if c.agent == "clerk"} == {0}


def test_without_servers_nothing_that_talks_to_them_is_imported():
    modules = ("rollout.worker", "training.decoupled", "training.launcher")
    code = "import sys\n" + "".join(f"import mgrpo.engine.{name}\n" for name in modules) + "print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "mgrpo.engine.rollout.worker" in loaded and not {"aiohttp", "vllm"} & set(loaded)
