"""Do what rank 0 of an agent's trainer does for all ranks: the store, the run directory, the list of published weights.

The leader holds the role "trainer:<agent>" in the store. Only one process can hold it at a time; a thread keeps
extending it, and the store refuses every write of this process once another process holds the role. If the store cannot
be reached or the disk is full, the leader tries again, until it is asked to stop.
"""

from __future__ import annotations

import logging
import secrets
import socket
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from mgrpo.engine.batch.advantages import weigh
from mgrpo.engine.config.resume import check_steps
from mgrpo.engine.config.schema import Config
from mgrpo.engine.rollout.curriculum import digest_of
from mgrpo.engine.run.directory import RunDirectory, root_of
from mgrpo.engine.run.scores import best_of, eval_due, keeps_best
from mgrpo.engine.run.trajectories import remove
from mgrpo.engine.run.weights import Published, remove_old
from mgrpo.engine.store import Claim, FencedError, Group, Publication
from mgrpo.engine.store.open import begin, open_store
from mgrpo.engine.system.heartbeat import Heartbeat
from mgrpo.engine.system.memory import peak_resident
from mgrpo.engine.system.process import pause
from mgrpo.engine.system.retry import Retry
from mgrpo.engine.system.words import counted
from mgrpo.engine.training.unscored import Unscored, first_error, has_score
from mgrpo.engine.types import Task

LOOK = 0.1  # seconds between polls of the store for sealed groups
DAMAGED = 2  # damaged groups of one step, as a multiple of those that can be sampled ahead, with which the run ends

log = logging.getLogger(__name__)


class StepGroups(msgspec.Struct):
    """Tell all ranks what rank 0 found in the store.

    groups: those of the step; none: not sealed yet. expired, refilled: groups that were dropped meanwhile, as too old
    and as without any advantage. stop: the trainer was asked to stop.
    """

    groups: list[Group] = []
    expired: int = 0
    refilled: int = 0
    stop: bool = False


class CheckpointInfo(msgspec.Struct):
    """Describe a checkpoint, apart from its weights. folder: "" if there is no checkpoint.

    policy: what `Policy.save_state` returned. groups: how many groups the agent has been trained on in all. unacked:
    the queries of those groups that were not yet acked in the store.
    """

    folder: str = ""
    stage: str = "warmup"
    step: int = 0
    policy: dict[str, Any] = {}
    groups: int = 0
    unacked: list[int] = []


def read_checkpoint_info(checkpoint: Path) -> CheckpointInfo:
    """Read the description of a checkpoint. Raises ValueError if the checkpoint is incomplete or damaged."""
    state = (RunDirectory.open_checkpoint(checkpoint) / "state.json").read_bytes()
    try:
        saved = msgspec.json.decode(state, type=CheckpointInfo)
    except msgspec.DecodeError as error:
        raise ValueError(f"checkpoint {checkpoint}: state.json is damaged: {error}") from error
    return msgspec.structs.replace(saved, folder=str(checkpoint))


class Leader:
    """Act for one agent in the store and in its run directory.

    As a context manager it holds the agent's role. Entering raises ValueError if another process holds it.
    """

    def __init__(self, config: Config, name: str, interrupted: Callable[[], bool]):
        self.config, self.name, self.interrupted = config, name, interrupted
        self.index = list(config.agents).index(name)
        self.patiently = Retry(wait=self._wait)
        run = Path(config.run_dir)
        self.rundir = self.patiently(RunDirectory, run / "agents" / name, resume=True, shared=True)
        self.weights, self.trajectories = root_of(config, "weights"), root_of(config, "trajectories")
        self.role, self.holder = f"trainer:{name}", _holder(config)
        try:
            self.store = self.patiently(open_store, config)
        except BaseException:
            self.rundir.close()
            raise
        self.leased: list[Group] = []  # groups claimed for the coming step
        self.lease_in_doubt = False  # whether the store may have leased groups to us that we do not know of
        self.expired = self.refilled = self.groups = 0
        self.damaged = 0  # groups discarded since the last step
        self.unscored = Unscored(False)
        self.barren: list[Group] = []  # groups without any score that were claimed in a row
        self.look_again = 0.0  # when to look for groups again after a step without any score
        self.unacked: list[int] = []
        self.executor = ThreadPoolExecutor(1, "files")
        self.pruning: Future[Any] = self.executor.submit(lambda: None)
        self.saved = ("", 0)  # stage and step of the last checkpoint
        self.heartbeat = Heartbeat(self._extend_role, config.store.lease / 3, errors=(FencedError, OSError))

    def __enter__(self) -> Leader:
        try:
            known = self.rundir.latest_checkpoint() is not None
            self.patiently(begin, self.store, self.config, known=known)
            self._take_role()
        except BaseException:
            self._close()
            raise
        self.rundir.clear_aside()
        self.heartbeat.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.executor.shutdown()  # it may be deleting weights, which are a successor's once the role is free
        self.heartbeat.stop()
        try:
            self.rundir.waiting.unlink(missing_ok=True)
        except OSError as error:
            log.warning("what agent %s waited for is shown until it goes on: %s", self.name, error)
        try:
            self.store.roles.release(self.role, self.holder)
        except OSError as error:
            log.warning("the role %s was not given back and will lapse: %s", self.role, error)
        self._close()

    def _close(self) -> None:
        self.executor.shutdown()
        self.store.close()
        self.rundir.close()

    def _take_role(self) -> None:
        """Take the role, waiting for the lease of a killed predecessor to lapse; a living one keeps its lease."""
        lease = self.config.store.lease
        give_up = time.monotonic() + 1.5 * lease
        while True:
            try:
                return self.patiently(self.store.roles.hold, self.role, self.holder, lease)
            except ValueError as error:
                if time.monotonic() > give_up:
                    raise
                log.warning("%s", error)
            self._wait(min(1.0, lease / 10))

    def _extend_role(self) -> None:
        """Extend the role. If it is lost, nothing needs to be done: the store refuses all writes of this process."""
        self.store.roles.keep(self.role, self.holder, self.config.store.lease)

    def _check_role(self) -> None:
        """Raise FencedError if another process holds the role by now."""
        self.patiently(self.store.roles.check, self.name, self.holder)

    def _wait(self, seconds: float) -> None:
        """Sleep. Raises Interrupted as soon as the trainer is asked to stop: what it waits for may not come back."""
        pause(seconds, self.interrupted, f"agent {self.name}: ")

    # ---- resuming and saving

    def latest(self) -> CheckpointInfo:
        """Return the description of the last complete checkpoint, or an empty one if there is none."""
        checkpoint = self.rundir.latest_checkpoint()
        return read_checkpoint_info(checkpoint) if checkpoint is not None else CheckpointInfo()

    def settle_tasks(self, tasks: Sequence[Task]) -> None:
        """Compare the tasks to train on with those that the run was begun with. Raises ValueError if they differ."""
        self.patiently(self.store.identities.settle_tasks, digest_of(tasks))

    def resume(self, saved: CheckpointInfo) -> None:
        """Take the store and the metrics back to the checkpoint, also if later ones have been removed.

        Raises ValueError if the run has taken more steps than it is to have now, or if the store has acked other groups
        than the checkpoint was trained on.
        """
        check_steps(self.config, saved.stage, saved.step)
        self._show_wait("")  # a killed predecessor may have left it
        self.groups, self.saved = saved.groups, (saved.stage, saved.step)
        self.unscored = Unscored(saved.groups > 0)
        published = saved.step if saved.stage == "rl" else -1
        undone = self.patiently(self.store.groups.undo, self.name, max(published, 0), self.holder)
        if undone:
            again = counted(undone, "group")
            log.warning("agent %s: goes back to %s: trains on %s again", self.name, saved.folder, again)
        self.patiently(self.store.groups.ack, self.name, saved.unacked, self.holder, max(published, 0))
        self.patiently(self.store.groups.release, self.name, self.holder)
        self._check_lineage(saved)
        self.patiently(self.store.roles.rewind, self.name, published, self.holder)
        self.patiently(self.rundir.rewind_metrics, saved.step, saved.stage)

    def _check_lineage(self, saved: CheckpointInfo) -> None:
        acked = self.patiently(self.store.groups.acked, self.name)
        if acked != saved.groups:
            raise ValueError(
                f"checkpoint {saved.folder}: agent {self.name} was trained on {saved.groups} groups in it, and the "
                f"store has {acked} as acked: expected the last checkpoint of this run, and the store that it was made "
                "with (runs of mgrpo 0.1.0 cannot go back to earlier checkpoints)"
            )

    def save(self, stage: str, step: int, write_policy: Callable[[Path], dict[str, Any]]) -> None:
        """Write a complete checkpoint. Raises OSError if it cannot be written; earlier checkpoints then stay.

        Raises FencedError, with nothing changed, if another process acts for the agent by now.
        """

        def write(folder: Path) -> None:
            policy = write_policy(folder / self.name)
            saved = CheckpointInfo(stage=stage, step=step, policy=policy, groups=self.groups, unacked=self.unacked)
            (folder / "state.json").write_bytes(msgspec.json.encode(saved))

        name, spared = f"{stage}-{step:05d}", self._spared(step)
        self.rundir.save_checkpoint(name, write, self.config.checkpoint.keep, self._check_role, spared)

    def _spared(self, step: int) -> list[str]:
        """Return the checkpoints to keep beside the newest: the best so far, and those that wait for their score."""
        if not keeps_best(self.config):
            return []
        results = self.patiently(self.store.roles.evaluations)
        best = best_of(results, self.config.eval)
        waiting = [s for s in range(step) if eval_due(self.config, s) and s not in results]
        return [f"rl-{s:05d}" for s in [*waiting, *best[:1]]] if best else [f"rl-{s:05d}" for s in waiting]

    def end(self) -> int | None:
        """Return the step at which the run ends early, since its score has ceased to rise; None: it does not."""
        patience = self.config.eval.patience
        end: int | None = self.patiently(self.store.roles.end, patience) if patience else None
        return end

    def ack(self, stage: str, step: int) -> None:
        """Ack in the store the groups that the checkpoint just saved was trained on."""
        self.saved = (stage, step)
        self.patiently(self.store.groups.ack, self.name, self.unacked, self.holder, step if stage == "rl" else 0)
        self.unacked = []
        if not self.config.sampling.keep_trajectories:
            removed = self.patiently(remove, self.trajectories, self.patiently(self.store.audit.garbage))
            self.patiently(self.store.audit.forget, removed)

    # ---- groups

    def next_groups(self, step: int) -> StepGroups:
        """Look into the store once; return all groups of the step, or none if some are not sealed yet."""
        if self.interrupted():
            return StepGroups(stop=True)
        if time.monotonic() < self.look_again:
            time.sleep(LOOK)
            return StepGroups()
        self._claim(step)
        if len(self.leased) < self.config.queries_per_step:
            self.patiently(self.store.queries.seal_overdue, self.config.sampling.timeout)
            time.sleep(LOOK)
            return StepGroups()
        if not any(map(has_score, self.leased)):
            self._drop_unscored(step)
            return StepGroups()
        self._show_wait("")
        found = StepGroups(self.leased, self.expired, self.refilled)
        self.leased, self.expired, self.refilled = [], 0, 0
        return found

    def _claim(self, step: int) -> None:
        """Claim missing groups. With dynamic sampling, groups without any advantage are replaced one by one."""
        missing, refill = self.config.queries_per_step - len(self.leased), self.config.sampling.refill_zero_std
        oldest = step - self.config.sampling.max_staleness
        claim = self.patiently(self._lease, missing, oldest, 1 if refill else missing)
        self._note_scores(claim.groups, step)
        useless = self._without_advantage(claim.groups) if refill else set()
        if useless:
            self.patiently(self.store.groups.refill, self.name, useless, self.holder)
        self.leased += [group for group in claim.groups if group.query not in useless]
        self.expired += len(claim.expired)
        self.refilled += len(useless)

    def _lease(self, missing: int, oldest: int, at_least: int) -> Claim:
        """Lease groups. An earlier call that failed may still have leased some: release them, or they would be lost."""
        if self.lease_in_doubt:
            known = [*self.unacked, *(group.query for group in self.leased)]
            self.store.groups.release(self.name, self.holder, keep=known)
        self.lease_in_doubt = True
        claim = self.store.groups.claim(self.name, missing, self.holder, oldest_step=oldest, at_least=at_least)
        self.lease_in_doubt = False
        return claim

    def _note_scores(self, groups: list[Group], step: int) -> None:
        """Note whether claimed groups have scores. While groups are replaced, a step may never be whole without any."""
        self.barren += groups
        if any(map(has_score, groups)):
            self.unscored.scored()
            self.barren = []
        if self.config.sampling.refill_zero_std and len(self.barren) >= self.config.queries_per_step:
            self._pause(step)

    def _drop_unscored(self, step: int) -> None:
        """Expire the groups of a step without any score, for others to be sampled after a while."""
        queries = [group.query for group in self.leased]
        self.patiently(self.store.groups.discard, self.name, queries, self.holder, "unscored")
        self.leased, self.expired = [], self.expired + len(queries)
        self._pause(step)

    def _pause(self, step: int) -> None:
        """Look for no groups for a while, because none of the last ones had a score. Raises ValueError in the end."""
        tried = sum(len(group.rollouts) for group in self.barren)
        what = f"step {step}: none of {tried} rollouts was scored; the first error: {first_error(self.barren)}"
        seconds = self.unscored.missed(what)
        self.barren, self.look_again = [], time.monotonic() + seconds
        log.warning("agent %s: %s; others are sampled in %.1f s", self.name, what, seconds)
        self._show_wait(what)

    def _show_wait(self, reason: str) -> None:
        """Let the launcher's display show what the agent waits for."""
        if reason:
            self.patiently(self.rundir.waiting.write_text, f"{reason}\n")
        else:
            self.patiently(self.rundir.waiting.unlink, missing_ok=True)

    def _without_advantage(self, groups: list[Group]) -> set[int]:
        """Return the queries of those groups whose rewards are all alike."""
        config = self.config
        credit = weigh(self.name, self.index, groups, config.algorithm, config.reward, config.seed)
        return {group.query for group, zero in zip(groups, credit.zero_std.tolist(), strict=True) if zero}

    def discard(self, found: StepGroups, damaged: Collection[int]) -> None:
        """Expire those groups of a step whose trajectories are damaged, and keep the others for `next_groups`.

        Raises ValueError if so many were damaged, without a step in between, that it cannot be single files.
        """
        self.patiently(self.store.groups.discard, self.name, damaged, self.holder)
        self.leased = [group for group in found.groups if group.query not in damaged]
        self.expired, self.refilled = found.expired + len(damaged), found.refilled
        self.damaged += len(damaged)
        if self.damaged > DAMAGED * (self.config.sampling.max_staleness + 1) * self.config.queries_per_step:
            raise ValueError(
                f"store.files: {self.trajectories}: {self.damaged} groups of one step with lost or damaged "
                "trajectories: expected the files that the workers wrote"
            )

    def trained(self, groups: Sequence[Group]) -> None:
        """Note that the weights have been trained on these groups."""
        self.damaged = 0
        self.unacked += [group.query for group in groups]
        self.groups += len(groups)

    # ---- what other processes see

    def _prune(self, needed: Collection[str]) -> None:
        """Delete old weights; those that cannot be deleted now are when the next ones have been published.

        Raises FencedError if another process acts for the agent by now: then they are not ours to delete.
        """
        try:
            self.store.roles.check(self.name, self.holder)
            remove_old(self.weights, self.name, needed)
        except OSError as error:
            log.warning("agent %s: old weights were not deleted: %s", self.name, error)

    def finish_pruning(self) -> None:
        """Wait until old weights are deleted. It also deletes unfinished files, so no file may be written meanwhile."""
        self.pruning.result()

    def publish(self, step: int, version: int, file: Published, probe: Sequence[float]) -> None:
        """Tell the store which file holds the weights after `step` rl steps, then delete old files in the background.

        version: optimizer steps behind these weights. probe: the trainer's log-probs of the probe tokens.
        """
        publication = Publication(
            agent=self.name, step=step, version=version, trained=self.groups, probe=tuple(probe), **file._asdict()
        )
        self.patiently(self.store.roles.publish, publication, self.holder)
        if eval_due(self.config, step, self.end()):
            self.patiently(self.store.roles.open_evaluation, step)
        needed = [file.file, *self._files_to_evaluate(step)]
        self.pruning = self.executor.submit(self._prune, needed)

    def _files_to_evaluate(self, step: int) -> list[str]:
        """Return the weight files of earlier steps whose evaluation is not done yet."""
        done = self.patiently(self.store.roles.evaluations)
        waiting = [s for s in range(step) if eval_due(self.config, s) and s not in done]
        published = (self.patiently(self.store.roles.publications, s).get(self.name) for s in waiting)
        return [publication.file for publication in published if publication]

    def log(self, stage: str, step: int, row: dict[str, float], started: float) -> None:
        """Append a row of metrics, with the seconds since `started` and the peak memory of this process."""
        row["time/step"] = time.monotonic() - started
        row["perf/peak_memory_gib"] = peak_resident() / 2**30
        self.patiently(self.rundir.log_metrics, {"stage": stage, "step": step, **row})


def _holder(config: Config) -> str:
    """Return the name under which this process holds its role.

    The launcher of a run directory lets only one process act for an agent, so a restarted one uses the same name and
    takes its killed predecessor's place at once. Elsewhere a restarted process must wait until the lease lapses.
    """
    host = socket.gethostname()
    return f"{host}:{config.run_dir}" if config.topology == "local" else f"{host}-{secrets.token_hex(4)}"
