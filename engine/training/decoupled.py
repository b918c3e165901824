"""Train one agent in its own processes: claim sealed groups from the store, train, publish, save and ack.

Every rank runs `AgentProcess` alike. Rank 0 alone talks to the store and writes files (`Leader`) and broadcasts its
decisions to the other ranks. A group is acked once a complete checkpoint contains its training. After a restart, the
groups that the checkpoint names are acked, and those claimed since are given back and trained on again, because the
weights that had seen them are lost. So each group counts exactly once in the weights that last, also if the trainer
goes back to an earlier checkpoint: what was acked since is trained on again.

If vLLM servers sample the agent, new weights are sent to them after they were published. A server that was restarted
gets them as soon as the trainer looks for groups. A server that cannot be reached delays only itself.

Unlike the colocated run, where one loop samples and trains, an agent's step begins here when its groups are sealed,
independently of the other agents. The store limits how far sampling may run ahead (`store.queries.take`).
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from mgrpo.engine.config.schema import Config
from mgrpo.engine.environment.loader import load_environment
from mgrpo.engine.inference.manifest import manifest_of
from mgrpo.engine.inference.vllm.auth import TOKEN
from mgrpo.engine.inference.vllm.endpoints import find
from mgrpo.engine.inference.vllm.weight_transfer import Transfer
from mgrpo.engine.model.causal_lm import load_tokenizer, pick_device
from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.rollout.curriculum import in_order, load_tasks, warmup_jobs
from mgrpo.engine.rollout.demonstrations import Demonstrations, check_played, check_script
from mgrpo.engine.rollout.records import PLAYED, demonstrated, rollout_counts
from mgrpo.engine.rollout.watched import play
from mgrpo.engine.run.directory import root_of
from mgrpo.engine.run.metrics import Row
from mgrpo.engine.run.scores import eval_due, keeps_best
from mgrpo.engine.run.weights import Published, probe_tokens
from mgrpo.engine.system import distributed, retry, secrets
from mgrpo.engine.system.process import Interrupted, ctrl_c, keep_memory, make_deterministic
from mgrpo.engine.training.leader import CheckpointInfo, Leader, StepGroups
from mgrpo.engine.training.trainer import AgentTrainer, DamagedGroupsError
from mgrpo.engine.types import NO_WEIGHTS, WeightsVersion

ASK = 2.0  # seconds between two checks for servers whose weights are outdated

log = logging.getLogger(__name__)


def run_agent(config: Config, name: str) -> None:
    """Train one agent until its last step, as one of torchrun's ranks or as a single process.

    Raises Interrupted after Ctrl-C or SIGTERM; ValueError for bad input, or while another process acts for the agent;
    FencedError if another process has taken over; OSError if the store or the disk stays unavailable; RuntimeError if
    another rank is gone.
    """
    with ctrl_c() as interrupted, distributed.joined(pick_device(config.compute), 2 * retry.PATIENCE):
        leader = Leader(config, name, interrupted) if distributed.rank() == 0 else None
        with leader or nullcontext():
            AgentProcess(config, name, leader).run()


class AgentProcess:
    """Train one agent as one rank. Every method is a collective: all ranks call it. leader: on rank 0 only."""

    def __init__(self, config: Config, name: str, leader: Leader | None):
        self.config, self.name, self.leader = config, name, leader
        keep_memory()
        make_deterministic(config.seed, config.deterministic)
        self.policy = Policy(name, config.agents[name], config.compute)
        self.trainer = AgentTrainer(config, self.policy, root_of(config, "trajectories"))
        self.published: tuple[int, Published] | None = None  # the last published version, and its file
        self.learnt = True  # whether the last rl step had a gradient
        self.probe: list[float] = []  # log-probs of the probe tokens, by the published weights
        self.servers = Servers(config, name, self.policy) if leader and config.agents[name].vllm else None
        self.sent = NO_WEIGHTS  # the version that the servers got last
        self.together = retry.Retry(agree=_rank_0_agrees, quiet=leader is None)

    def run(self) -> None:
        """Run both stages, from the last checkpoint or from the start."""
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
            self.policy.load_state(Path(saved.folder) / self.name, verified=True)
        if self.leader:
            self.leader.resume(saved)
        return saved

    def _warmup(self, first: int) -> None:
        """Train on the agent's part of scripted episodes; every agent's trainer plays them by itself."""
        config, steps = self.config, self.config.warmup.steps
        environment = load_environment(config.environment)
        check_script(config, environment)
        tasks = load_tasks(environment, "train")
        if self.leader:
            self.leader.settle_tasks(tasks)
        tasks = in_order(tasks, config.run_dir)
        tokenizers = {name: load_tokenizer(name, agent) for name, agent in config.agents.items()}
        demonstrations = Demonstrations(config, environment, tokenizers, judged=False)
        for step in range(first, steps):
            started = time.monotonic()
            rollouts = play(demonstrations, warmup_jobs(tasks, config, step))
            check_played(step, rollouts)
            row = rollout_counts(rollouts, PLAYED)
            if shown := demonstrated(self.name, rollouts):
                row |= self.trainer.learn(shown)
            self._after_step("warmup", step, steps, row, started)

    def _rl(self, first: int) -> None:
        for step in range(first, self.config.steps):
            if self._ends(step):
                break
            self.rl_step(step)

    def _ends(self, step: int) -> bool:
        """Return whether the run ends before the step, because its score has ceased to rise; the state is then saved.

        All agents end at the same step, which the store has set: no agent had passed it.
        """
        if not self.config.eval.patience:
            return False
        end = self.leader.end() if self.leader else None
        over = distributed.broadcast(end is not None and step >= end, bool)
        if over and distributed.broadcast(bool(self.leader and self.leader.saved != ("rl", step)), bool):
            self.save("rl", step)
        return bool(over)

    def rl_step(self, step: int) -> Row:
        """Wait for a step's groups, train on them, publish, log, and save when due. Return the logged metrics."""
        started = time.monotonic()
        found, row = self._train(step)
        self.learnt = bool(row.get("grad_norm"))
        waited = time.monotonic() - started - row["time/train"]
        if self.leader:
            self.leader.trained(found.groups)
        publishing = time.monotonic()
        self.publish(step + 1)
        self._push(step + 1)
        row |= {"time/waiting": waited, "time/publish": time.monotonic() - publishing}
        row |= {"groups/expired": found.expired, "groups/refilled": found.refilled}
        self._after_step("rl", step, self.config.steps, row, started)
        return row

    def _train(self, step: int) -> tuple[StepGroups, Row]:
        """Wait for a step's groups and train on them; damaged ones are discarded, and others waited for."""
        while True:
            found = self._wait_for_groups(step)
            if self.servers:
                self.servers.sleep()
            try:
                return found, self.trainer.train(step, found.groups)
            except DamagedGroupsError as error:
                if self.leader:
                    self.leader.discard(found, error.queries)
            if self.config.agents[self.name].vllm:
                self._send()  # wakes servers that sleep, for the groups that are missing now

    def _wait_for_groups(self, step: int) -> StepGroups:
        """Wait until the step's groups are sealed. Rank 0 broadcasts the outcome of every poll of the store."""
        while True:
            message = self.leader.next_groups(step) if self.leader else None
            found: StepGroups = distributed.broadcast(message, StepGroups)
            if found.stop:
                self._stop("rl", step)
            if found.groups:
                return found
            if distributed.broadcast(bool(self.servers and self.servers.behind()), bool):
                self._send()

    # ---- publishing

    def publish(self, step: int) -> None:
        """Publish the weights after `step` rl steps for the samplers, as a new version only if the weights moved.

        An optimizer step without any gradient may leave them as they are; then the last version is published again.
        While the file cannot be written, all ranks wait and try again together.
        """
        version = self.policy.version
        if self.published is None or (self.published[0] != version and self._moved(self.published[1])):
            if self.leader:
                self.leader.finish_pruning()
            self.published = version, self.together(self.policy.publish, root_of(self.config, "weights"))
            context = self.config.agents[self.name].max_context
            tokens = probe_tokens(self.config.seed, self.policy.model.config.get_text_config().vocab_size, context)
            self.probe = self.policy.logprobs(tokens)
        if self.leader:
            self.leader.publish(step, *self.published, self.probe)

    def _moved(self, last: Published) -> bool:
        """Return whether the weights differ from the published ones, which are compared only if there is a doubt."""
        return self.learnt or self.policy.checksum() != last.checksum

    def _push(self, step: int) -> None:
        """Send the weights after `step` rl steps to the agent's servers, if it has any and the weights moved."""
        assert self.published is not None
        version = self.published[0]
        if self.config.agents[self.name].vllm and version != self.sent.optimizer_steps:
            self.sent = WeightsVersion(version, step)
            self._send()

    def _send(self) -> None:
        weights = self.policy.full_weights(on_host=False)
        if self.servers:
            self.servers.update(weights, self.sent)
        for _ in weights:  # the other ranks take part in gathering each weight
            pass

    # ---- saving

    def _after_step(self, stage: str, step: int, steps: int, row: Row, started: float) -> None:
        done = step + 1
        if self.leader:
            self.leader.log(stage, step, row, started)
        best = stage == "rl" and keeps_best(self.config) and eval_due(self.config, done)
        if done == steps or done % self.config.checkpoint.every == 0 or best:
            self.save(stage, done)
        if distributed.broadcast(bool(self.leader and self.leader.interrupted()), bool):
            self._stop(stage, done)

    def _stop(self, stage: str, step: int) -> None:
        if distributed.broadcast(bool(self.leader and self.leader.saved != (stage, step)), bool):
            self.save(stage, step)
        raise Interrupted(f"agent {self.name}: stopped before {stage} step {step}")

    def save(self, stage: str, step: int) -> None:
        """Save everything before (stage, step) atomically, then ack its groups. All ranks wait for a full disk."""
        self.together(self._save, stage, step)
        if self.leader:
            self.leader.ack(stage, step)

    def _save(self, stage: str, step: int) -> None:
        """Write a checkpoint. Raises OSError on every rank if any rank failed.

        The other ranks write their rows once rank 0 has made the folder; `ready` tells whether it got that far.
        """
        failure, ready = "", False

        def write(folder: Path) -> dict[str, Any]:
            nonlocal ready
            ready = distributed.broadcast(True, bool)
            return self.policy.save_state(folder)

        try:
            if self.leader:
                self.leader.save(stage, step, write)
            elif distributed.broadcast(None, bool):
                self.policy.save_state()
        except (OSError, SafetensorError) as error:
            failure = str(error)
        if self.leader and not ready:
            distributed.broadcast(False, bool)
        if failures := list(filter(None, distributed.gather(failure, str))):
            raise OSError(errno.EIO, failures[0])


class Servers:
    """Rank 0's access to the vLLM servers of its agent. Raises ValueError if their URLs or the token are unknown."""

    def __init__(self, config: Config, name: str, policy: Policy):
        place = find(name, config.agents[name])
        token = secrets.get(TOKEN)
        if not token:
            raise ValueError(
                f"{TOKEN} is not set: expected the token that the servers of agents.{name} were started with"
            )
        manifest = manifest_of(policy.masters.params, policy.dtype)
        self.transfer = Transfer(place.urls, token, place.transfer, manifest)
        self.asked_at = 0.0

    def update(self, weights: Iterator[tuple[str, Tensor]], version: WeightsVersion) -> None:
        """Send the weights to all servers that can be reached."""
        updated = self.transfer.update(weights, version)
        log.info("weights %s: sent to %s", version, updated or "no servers")

    def sleep(self) -> None:
        """Let servers that share the trainer's GPU free its memory for a step; the next weights wake them."""
        if self.transfer.kind == "ipc":
            self.transfer.sleep()

    def behind(self) -> bool:
        """Return whether a reachable server has outdated weights; checked at most every ASK seconds."""
        if time.monotonic() - self.asked_at < ASK:
            return False
        self.asked_at = time.monotonic()
        return bool(self.transfer.behind())


def _rank_0_agrees(over: bool) -> bool:
    """Return on every rank what rank 0 passed, so that all ranks give up or go on together."""
    agreed: bool = distributed.broadcast(over, bool)
    return agreed
