"""One agent's trainer in processes of its own: takes sealed groups from the store, trains, publishes, saves, and acks.

Every rank runs `AgentProcess` alike. Rank 0 alone deals with the store and writes files (`Leader`); what it decides
goes to the other ranks as bytes. A group is acked when a checkpoint that was trained on it is whole. After a restart
the groups that the checkpoint names are acked and those claimed since are given back, to be trained on again: the
weights that had seen them are lost. So each group counts once in the weights that last.

If vLLM servers sample the agent, new weights go to them after they were published, and again to a server that was
started anew, as soon as the trainer looks for groups. A server that is out of reach holds up nothing but itself.

Departs from the colocated run, where one loop samples and trains: here an agent's step begins when its groups are
sealed, whatever the other agents do. How far sampling may run ahead is the store's gate (`Intake.take`).
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from torch import Tensor

from mgrpo.engine.config.schema import Config
from mgrpo.engine.inference.sampler import Sampler, Session
from mgrpo.engine.inference.vllm.auth import TOKEN
from mgrpo.engine.inference.vllm.endpoints import find
from mgrpo.engine.inference.vllm.weight_transfer import Transfer
from mgrpo.engine.model.causal_lm import load_tokenizer, pick_device
from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.rollout.curriculum import load_tasks, warmup_jobs
from mgrpo.engine.rollout.episodes import Demonstrations, load_environment
from mgrpo.engine.rollout.records import demonstrated, rollout_counts
from mgrpo.engine.run.weights import probe_tokens
from mgrpo.engine.store.open import files_of
from mgrpo.engine.system import distributed
from mgrpo.engine.system.process import Interrupted, ctrl_c, doubling, keep_memory, make_deterministic
from mgrpo.engine.training.leader import PATIENCE, RETRY, CheckpointInfo, Leader, StepGroups
from mgrpo.engine.training.trainer import AgentTrainer, Row

ASK = 2.0  # seconds between two looks for servers that came back

log = logging.getLogger(__name__)


def run_agent(config: Config, name: str) -> None:
    """Train one agent until its last step, as one of torchrun's ranks or alone.

    Raises Interrupted after Ctrl-C or SIGTERM; ValueError for bad input, or while another process acts for the agent;
    FencedError when another has taken over; OSError when store or disk stay out of reach; RuntimeError when another
    rank is gone.
    """
    with ctrl_c() as interrupted, distributed.joined(pick_device(config.compute), 2 * PATIENCE):
        leader = Leader(config, name, interrupted) if distributed.rank() == 0 else None
        with leader or nullcontext():
            AgentProcess(config, name, leader).run()


class AgentProcess:
    """One rank. leader: rank 0's; every method is called by all ranks."""

    def __init__(self, config: Config, name: str, leader: Leader | None):
        self.config, self.name, self.leader = config, name, leader
        keep_memory()
        make_deterministic(config.seed, config.deterministic)
        self.policy = Policy(name, config.agents[name], config.compute)
        self.trainer = AgentTrainer(config, self.policy, files_of(config, "trajectories"))
        self.published = -1  # the version whose weights are in a file
        self.probe: list[float] = []  # of those weights
        self.servers = Servers(config, name, self.policy) if leader and config.agents[name].vllm else None
        self.sent = (-1, -1)  # to the servers: version, step

    def run(self) -> None:
        """Both stages, from the last checkpoint or from the start."""
        saved = self._restore()
        step = saved.step
        if saved.stage == "warmup":
            self._warmup(step)
            self.policy.reset_optimizer()
            if self.config.algorithm.kl_coef:
                self.policy.keep_reference()
            step = 0
            self.save("rl", step)
        self.publish(step)
        self._push(step)
        self._rl(step)

    def _restore(self) -> CheckpointInfo:
        saved: CheckpointInfo = distributed.broadcast(self.leader.latest() if self.leader else None, CheckpointInfo)
        if saved.folder:
            self.policy.load_state(Path(saved.folder) / self.name)
        if self.leader:
            self.leader.resume(saved)
        return saved

    def _warmup(self, first: int) -> None:
        """Supervised steps on the agent's part of scripted episodes, which every agent's trainer plays by itself."""
        config, steps = self.config, self.config.warmup.steps
        environment = load_environment(config.environment)
        tasks = load_tasks(environment, "train")
        speakers = {name: cast(Sampler, _Speaker(load_tokenizer(name, agent))) for name, agent in config.agents.items()}
        demonstrations = Demonstrations(config, environment, speakers)
        for step in range(first, steps):
            started = time.monotonic()
            rollouts = demonstrations.run(warmup_jobs(tasks, config, step))
            row = rollout_counts(rollouts)
            if shown := demonstrated(self.name, rollouts):
                row |= self.trainer.learn(shown)
            self._after_step("warmup", step, steps, row, started)

    def _rl(self, first: int) -> None:
        for step in range(first, self.config.steps):
            self.rl_step(step)

    def rl_step(self, step: int) -> Row:
        """Wait for a step's groups, train on them, publish, log, save when due. Returns what was logged."""
        started = time.monotonic()
        order = self._next_groups(step)
        waited = time.monotonic() - started
        if self.servers:
            self.servers.rest()
        row = self.trainer.train(step, order.groups)
        if self.leader:
            self.leader.trained(order.groups)
        publishing = time.monotonic()
        self.publish(step + 1)
        self._push(step + 1)
        row |= {"time/waiting": waited, "time/publish": time.monotonic() - publishing}
        row |= {"groups/expired": order.expired, "groups/refilled": order.refilled}
        self._after_step("rl", step, self.config.steps, row, started)
        return row

    def _next_groups(self, step: int) -> StepGroups:
        """Waits until the step's groups are sealed. The others hear of every look that rank 0 takes at the store."""
        while True:
            order: StepGroups = distributed.broadcast(self.leader.order(step) if self.leader else None, StepGroups)
            if order.stop:
                self._stop("rl", step)
            if order.groups:
                return order
            if distributed.broadcast(bool(self.servers and self.servers.behind()), bool):
                self._send()

    def publish(self, step: int) -> None:
        """The weights after `step` rl steps, for the samplers; in a new file only if they moved."""
        weights = None
        if self.policy.version != self.published:
            weights, context = dict(self.policy.full_weights()), self.config.agents[self.name].max_context
            tokens = probe_tokens(self.config.seed, self.policy.model.config.vocab_size, context)
            self.published, self.probe = self.policy.version, self.policy.logprobs(tokens)
        if self.leader:
            self.leader.publish(step, self.policy.version, weights, self.probe)

    def _push(self, step: int) -> None:
        """The weights after `step` rl steps to the agent's servers, if it has any; only if they moved."""
        if self.config.agents[self.name].vllm and self.policy.version != self.sent[0]:
            self.sent = (self.policy.version, step)
            self._send()

    def _send(self) -> None:
        weights = self.policy.full_weights()
        if self.servers:
            self.servers.update(weights, *self.sent)
        for _ in weights:  # the other ranks have their part in gathering each
            pass

    def _after_step(self, stage: str, step: int, steps: int, row: Row, started: float) -> None:
        done = step + 1
        if self.leader:
            self.leader.log(stage, step, row, started)
        if done == steps or done % self.config.checkpoint.every == 0:
            self.save(stage, done)
        if distributed.broadcast(bool(self.leader and self.leader.interrupted()), bool):
            self._stop(stage, done)

    def _stop(self, stage: str, step: int) -> None:
        if distributed.broadcast(bool(self.leader and self.leader.saved != (stage, step)), bool):
            self.save(stage, step)
        raise Interrupted(f"agent {self.name}: stopped before {stage} step {step}")

    def save(self, stage: str, step: int) -> None:
        """Everything before (stage, step), atomically; then the store may know. All wait for a full disk."""
        give_up = time.monotonic() + PATIENCE
        for pause in doubling(*RETRY):
            if not (failure := self._try_to_save(stage, step)):
                break
            if distributed.broadcast(time.monotonic() + pause > give_up, bool):
                raise OSError(errno.EIO, failure)
            if self.leader:
                log.warning("%s; trying again in %.1f s", failure, pause)
            time.sleep(pause)
        if self.leader:
            self.leader.ack(stage, step)

    def _try_to_save(self, stage: str, step: int) -> str:
        """What failed, on whichever rank; "" if nothing did. The ranks write their rows when rank 0 has come to it."""
        failure, together = "", False

        def write(folder: Path) -> dict[str, Any]:
            nonlocal together
            together = distributed.broadcast(True, bool)
            return self.policy.save_state(folder)

        try:
            if self.leader:
                self.leader.save(stage, step, write)
            elif distributed.broadcast(None, bool):
                self.policy.save_state()
        except (OSError, SafetensorError) as error:
            failure = str(error)
        if self.leader and not together:
            distributed.broadcast(False, bool)
        return next(filter(None, distributed.gather(failure, str)), "")


class Servers:
    """Rank 0's hand on the vLLM servers of its agent. Raises ValueError when it is not said where they are."""

    def __init__(self, config: Config, name: str, policy: Policy):
        agent = config.agents[name]
        place = find(name, agent)
        token = os.environ.get(TOKEN)
        if not token:
            raise ValueError(
                f"{TOKEN} is not set: expected the token that the servers of agents.{name} were started with"
            )
        manifest = {key: (tuple(param.shape), policy.dtype) for key, param in policy.masters.params.items()}
        self.transfer = Transfer(place.urls, token, place.transfer, manifest)
        self.asked_at = 0.0

    def update(self, weights: Iterator[tuple[str, Tensor]], version: int, step: int) -> None:
        updated = self.transfer.update(weights, version, step)
        log.info("version %d, step %d: %s have it", version, step, updated or "no servers")

    def rest(self) -> None:
        """On one GPU with the trainer they make room for a step; the next weights wake them."""
        if self.transfer.kind == "ipc":
            self.transfer.sleep()

    def behind(self) -> bool:
        """Whether a server answers that has not the newest weights; looked at now and then."""
        if time.monotonic() - self.asked_at < ASK:
            return False
        self.asked_at = time.monotonic()
        return bool(self.transfer.behind())


@dataclass
class _Speaker:
    """All that scripted episodes need of a sampler: how an agent's words become tokens."""

    tokenizer: Any
    version: int = 0
    weights_step: int = 0
    pending: int = 0

    def close(self, session: Session) -> None: ...
