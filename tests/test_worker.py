"""The rollout worker beside trainers that are played by the test: the gate, the weights, and each rollout once.

The worker asks between steps whether to stop; in answering, the test does what the trainers would have done meanwhile.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mgrpo.engine import worker as worker_module
from mgrpo.engine.arrivals import Heartbeat
from mgrpo.engine.config import Config, parse_config
from mgrpo.engine.model import Packed, hidden_states, load_model
from mgrpo.engine.rollout import Episodes, Job
from mgrpo.engine.run import read_metrics
from mgrpo.engine.sampler import InProcessSampler
from mgrpo.engine.store import CallRecord, Publication, Store
from mgrpo.engine.tasks import pick
from mgrpo.engine.trajectories import TrajectoryWriter, read
from mgrpo.engine.weights import DamagedWeights, GapError, load_weights, probe_tokens, publish_weights
from mgrpo.engine.worker import Worker
from toy import make_model, raw_config

Q, K, STEPS = 3, 2, 2
ENVIRONMENT = '''
from mgrpo.engine.environment import Environment
from mgrpo.engine.types import Answer, CallScore, Delegate, Score, Task

class Chatty(Environment):
    """Whatever the untrained main agent writes is a request to its clerk, three times."""

    def tasks(self, split):
        return [Task(f"{split} {i}", {}) for i in range(7)]

    def prompt(self, call):
        return f"{call.agent} {call.task.id}\\n"

    def parse(self, call, text):
        return (Delegate("clerk", text),) if call.agent == "main" and len(call.turns) < 3 else Answer(text)

    def score(self, episode):
        return Score(True, float(len(episode.main.turns) == 4), tuple(CallScore(True, 0.5) for _ in episode.calls))
'''


class World:
    """A run's directory and store, and the trainers of its agents: each step they add a little noise to the weights."""

    def __init__(self, folder: Path, sampling: dict[str, Any] | None = None, **changes: Any) -> None:
        make_model(folder / "model")
        (folder / "chatty.py").write_text(ENVIRONMENT)
        raw = raw_config(folder, **{"topology": "local", "steps": STEPS, "queries_per_step": Q, **changes})
        for agent in raw["agents"].values():
            agent |= {"max_turns": 4, "max_context": 128, "max_new_tokens": 8}
        raw |= {"environment": {"use": f"{folder}/chatty.py:Chatty"}, "eval": {"questions": 3}}
        raw |= {"sampling": sampling or {}, "algorithm": {"rollouts": K}, "store": {"lease": 30.0}}
        self.config: Config = parse_config(raw)
        self.run_dir = Path(self.config.run_dir)
        (self.run_dir / "weights").mkdir(parents=True)
        self.url = f"sqlite:///{self.run_dir}/store.db"
        self.store = Store(self.url, "run")
        self.store.begin_run(list(self.config.agents), K, "same")
        self.steps = dict.fromkeys(self.config.agents, -1)
        self.stopped: Callable[[], bool] = lambda: False
        for name in self.config.agents:
            self.store.hold(f"trainer:{name}", name, 1000.0)

    def tensors(self, name: str, step: int) -> dict[str, torch.Tensor]:
        model = load_model(name, self.config.agents[name], self.config.compute)
        noise = torch.Generator().manual_seed(100 * step + len(name))
        return {
            key: (p + step * 0.05 * torch.randn(p.shape, generator=noise)).detach()
            for key, p in model.named_parameters()
        }

    def model(self, name: str, step: int) -> Any:
        """As the trainer holds it after `step` steps."""
        model = load_model(name, self.config.agents[name], self.config.compute)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for key, tensor in self.tensors(name, step).items():
                parameters[key].copy_(tensor)
        return model

    def publish(self, name: str, step: int, **changes: Any) -> Publication:
        tensors = self.tensors(name, step)
        file, checksum, size = publish_weights(f"{self.run_dir}/weights", name, 10 * step, tensors)
        probe = tuple(logprobs(self.model(name, step), probe_tokens(self.config.seed, 257, 128)))
        row = {"trained": step * Q, "file": file, "checksum": checksum, "size": size, "probe": probe} | changes
        publication = Publication(agent=name, step=step, version=10 * step, **row)
        self.store.publish(publication, name)
        self.store.open_evaluation(step) if step in (0, self.config.steps) else None
        self.steps[name] = step
        return publication

    def train(self) -> None:
        """Each agent that finds the groups of a step takes it, and publishes."""
        for name, step in self.steps.items():
            if step < 0:
                self.publish(name, 0)
            elif step < self.config.steps:
                groups = self.store.claim(name, Q, name, at_least=Q).groups
                if groups:
                    self.store.ack(name, [group.query for group in groups], name)
                    self.publish(name, step + 1)

    def __call__(self) -> bool:
        self.train()
        return self.stopped()

    def work(self, name: str = "w", stop: Callable[[], bool] | None = None) -> Worker:
        worker = Worker(self.config, name, Store(self.url, "run"), self.run_dir)
        worker.run(stop or self)
        return worker

    @property
    def calls(self) -> list[CallRecord]:
        return [call for query in range(self.opened) for call in self.store.calls_of(query)]

    @property
    def opened(self) -> int:
        return sum(self.store.accounting()["main"].values())

    def check(self) -> None:
        """Every query has its K rollouts, each with its main call, and all tokens are there, as sampled."""
        assert self.opened == self.config.steps * Q
        for query in range(self.opened):
            assert [r.rollout for r in self.store.rollouts_of(query)] == list(range(K))
            mains = [c.rollout for c in self.store.calls_of(query) if c.agent == "main"]
            assert mains == list(range(K))
        trajectories = read(f"{self.run_dir}/trajectories", [call.position for call in self.calls])
        for call, trajectory in zip(self.calls, trajectories, strict=True):
            assert (call.tokens, call.actions) == (len(trajectory), trajectory.sampled.sum())
            assert (call.version, call.version_last, call.step) == (
                trajectory.version,
                trajectory.version_last,
                trajectory.step,
            )
            assert trajectory.sampled[call.rows] and not trajectory.sampled[call.rows + 1 :].any()
        assert not any(self.store.balance()["violations"].values())


@torch.no_grad()
def logprobs(model: Any, tokens: list[int]) -> list[float]:
    """As a trainer computes them: packed."""
    ids = torch.tensor(tokens)
    layout = Packed(torch.tensor([0, len(ids)], dtype=torch.int32), len(ids))
    hidden = hidden_states(model, ids, torch.arange(len(ids)), layout)
    logps = (hidden @ model.get_output_embeddings().weight.T).float().log_softmax(-1)
    return logps[:-1].gather(1, ids[1:, None])[:, 0].tolist()


def test_on_policy_every_call_of_a_step_is_sampled_by_the_weights_of_that_step(tmp_path):
    world = World(tmp_path)
    world.work()
    world.check()
    assert all(call.step == call.query // Q and call.version == call.version_last == 10 * call.step for call in world.calls)
    print(world.store.evaluations(), read_metrics(world.run_dir / "workers/w/metrics.jsonl"), world.store.balance())
    assert 0
