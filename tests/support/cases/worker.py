"""Run rollout workers against a store and a run directory, without trainers."""

from __future__ import annotations

import copy
import errno
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mgrpo.engine.config.schema import Config, parse_config
from mgrpo.engine.inference.in_process import InProcessSampler
from mgrpo.engine.model.attention import Packed, hidden_states
from mgrpo.engine.model.causal_lm import load_model, load_tokenizer
from mgrpo.engine.rollout.curriculum import pick
from mgrpo.engine.rollout.worker import Worker
from mgrpo.engine.run.scores import eval_due
from mgrpo.engine.run.trajectories import read
from mgrpo.engine.run.weights import probe_tokens, publish_weights
from mgrpo.engine.store import CallRecord, Lease, Publication, Store
from mgrpo.engine.types import Task, WeightsVersion
from toy import make_model, raw_config

Q, K, STEPS = 3, 2, 2
ENVIRONMENT = '''
from mgrpo.engine.environment.base import Environment
from mgrpo.engine.types import Answer, CallScore, Delegate, Score, Task

class Chatty(Environment):
    """Take whatever the untrained main agent writes as a request to its clerk, twice."""

    def tasks(self, split):
        return [Task(f"{split} {i}", {}) for i in range(7)]

    def prompt(self, call):
        return f"{call.agent} {call.task.id}\\n"

    def parse(self, call, text):
        return (Delegate("clerk", text),) if call.agent == "main" and len(call.turns) < 2 else Answer(text)

    def score(self, episode):
        return Score(True, float(len(episode.main.turns) == 3), tuple(CallScore(True, 0.5) for _ in episode.calls))
'''


class World:
    """A run's directory and store, and stand-ins for its trainers, which add noise to the weights each step."""

    def __init__(self, folder: Path, sampling: dict[str, Any] | None = None, **changes: Any) -> None:
        make_model(folder / "model")
        (folder / "chatty.py").write_text(ENVIRONMENT)
        raw = raw_config(folder, **{"topology": "local", "steps": STEPS, "queries_per_step": Q, **changes})
        for agent in raw["agents"].values():
            agent |= {"max_turns": 4, "max_context": 128, "max_new_tokens": 6}
        raw |= {
            "environment": {"use": f"{folder}/chatty.py:Chatty"},
            "eval": {"questions": 3, **changes.get("eval", {})},
        }
        raw |= {"sampling": sampling or {}, "algorithm": {"rollouts": K}, "store": {"lease": 30.0}}
        self.config: Config = parse_config(raw)
        self.run_dir = Path(self.config.run_dir)
        self.weights = f"{self.run_dir}/weights"
        self.run_dir.mkdir()
        self.url = f"sqlite:///{self.run_dir}/store.db"
        self.store = Store(self.url, "run")
        self.store.roles.begin_run(list(self.config.agents), K, "same")
        self.steps = dict.fromkeys(self.config.agents, -1)
        self.asked = 0
        self.base = load_model("main", self.config.agents["main"], self.config.compute)
        for name in self.config.agents:
            self.store.roles.hold(f"trainer:{name}", name, 1000.0)

    def tensors(self, name: str, step: int) -> dict[str, torch.Tensor]:
        """Return the weights that an agent's trainer has after `step` steps."""
        noise = torch.Generator().manual_seed(100 * step + len(name))
        named = self.base.named_parameters()
        return {key: p.detach() + step * 0.05 * torch.randn(p.shape, generator=noise) for key, p in named}

    def model(self, name: str, step: int) -> Any:
        """Return a model with these weights."""
        model = copy.deepcopy(self.base).requires_grad_(False)
        parameters = dict(model.named_parameters())
        for key, tensor in self.tensors(name, step).items():
            parameters[key].copy_(tensor)
        return model

    def samplers(self, step: int) -> dict[str, InProcessSampler]:
        """Return samplers of all agents with these weights."""
        tokenizer, agents = load_tokenizer("main", self.config.agents["main"]), self.config.agents
        version = WeightsVersion(10 * step, step)
        return {n: InProcessSampler(self.model(n, step), tokenizer, agents[n], 16, version) for n in agents}

    def publish(self, name: str, step: int, **changes: Any) -> Publication:
        """Publish an agent's weights after `step` steps. changes: to the record."""
        file, checksum, size = publish_weights(self.weights, name, 10 * step, self.tensors(name, step))
        probe = tuple(logprobs(self.model(name, step), probe_tokens(self.config.seed, 257, 128)))
        row = {"trained": step * Q, "file": file, "checksum": checksum, "size": size, "probe": probe}
        publication = Publication(agent=name, step=step, **{"version": 10 * step, **row, **changes})
        self.store.roles.publish(publication, name)
        if eval_due(self.config, step):
            self.store.roles.open_evaluation(step)
        self.steps[name] = step
        return publication

    def train(self) -> None:
        """Take a step of each agent that finds its groups, and publish its weights."""
        for name, step in self.steps.items():
            if step < 0:
                self.publish(name, 0)
            elif step < self.config.steps:
                groups = self.store.groups.claim(name, Q, name, at_least=Q).groups
                if groups:
                    self.store.groups.ack(name, [group.query for group in groups], name)
                    self.publish(name, step + 1)

    def __call__(self) -> bool:
        """Answer a worker that asks whether to stop: train meanwhile, and say no."""
        self.asked += 1
        if self.asked % 4 == 1:
            self.train()
        return False

    def worker(self, name: str = "w", store: Store | None = None) -> Worker:
        """Return a rollout worker of this run."""
        return Worker(self.config, name, store or Store(self.url, "run"), self.run_dir)

    def take(self, worker: str, count: int, lease: float = 30.0) -> list[Lease]:
        """Take queries as a worker."""
        tasks = [Task(f"train {i}", {}) for i in range(7)]  # as in ENVIRONMENT
        return self.store.queries.take(
            worker, count, ahead=Q, total=STEPS * Q, task_of=lambda q: pick(tasks, self.config.seed, q).id, lease=lease
        )

    @property
    def calls(self) -> list[CallRecord]:
        """All recorded calls."""
        return [call for query in range(self.opened) for call in self.store.groups.calls_of(query)]

    @property
    def opened(self) -> int:
        """How many queries were opened."""
        return self.store.audit.balance()["agents"]["main"]["opened"]

    def check(self, queries: int = STEPS * Q) -> None:
        """Check that every query has K rollouts with a call of main each, and that all tokens are there as sampled."""
        assert self.opened >= queries
        for query in range(self.opened):
            assert [r.rollout for r in self.store.groups.rollouts_of(query)] == list(range(K))
            mains = [c.rollout for c in self.store.groups.calls_of(query) if c.agent == "main"]
            assert mains == list(range(K))
        trajectories = read(f"{self.run_dir}/trajectories", [call.position for call in self.calls])
        for call, trajectory in zip(self.calls, trajectories, strict=True):
            assert (call.tokens, call.actions) == (len(trajectory), trajectory.sampled.sum())
            assert all(getattr(call, name) == getattr(trajectory, name) for name in ("version", "version_last", "step"))
            assert trajectory.sampled[call.rows] and not trajectory.sampled[call.rows + 1 :].any()
            said = trajectory.tokens.tobytes() + trajectory.sampled.tobytes()
            assert call.digest == blake2b(said, digest_size=16).hexdigest()
            assert call.sampler_digest == blake2b(said + trajectory.logprobs.tobytes(), digest_size=16).hexdigest()
        assert not any(self.store.audit.balance()["violations"].values())


@torch.no_grad()
def logprobs(model: Any, tokens: list[int]) -> list[float]:
    """Return log-probs as a trainer computes them: packed."""
    ids = torch.tensor(tokens)
    layout = Packed(torch.tensor([0, len(ids)], dtype=torch.int32), len(ids))
    hidden = hidden_states(model, ids, torch.arange(len(ids)), layout)
    logps = (hidden @ model.get_output_embeddings().weight.T).float().log_softmax(-1)
    return logps[:-1].gather(1, ids[1:, None])[:, 0].tolist()


class Flaky(Store):
    """A store whose methods fail now and then, before or after they have done their work."""

    def __init__(self, url: str) -> None:
        super().__init__(url, "run")
        self.random, self.failures = np.random.default_rng(0), 0
        for name in ("take", "record", "give_back", "extend"):
            setattr(self.queries, name, self._flaky(getattr(self.queries, name)))
        for name in ("publications", "evaluations", "take_evaluation", "finish_evaluation", "open_evaluation"):
            setattr(self.roles, name, self._flaky(getattr(self.roles, name)))

    def _flaky(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before, after = self.random.random(2) < 0.25
            self.failures += before or after
            if before:
                raise OSError(errno.EIO, "store: connection refused")
            result = method(*args, **kwargs)
            if after:
                raise OSError(errno.EIO, "store: connection lost")
            return result

        return call
