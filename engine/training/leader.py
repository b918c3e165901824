"""What rank 0 of an agent's trainer does for all of them: the store, the run directory, the published weights.

It holds the role "trainer:<agent>" in the store, which one process at a time can, and moves its deadline in a thread;
whatever it writes there is refused once another holds the role. A store that is out of reach is tried again, and so is
a full disk, below whatever it writes.
"""

from __future__ import annotations

import logging
import resource
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import msgspec
from torch import Tensor

from mgrpo.engine.batch.advantages import weigh
from mgrpo.engine.config.schema import Config
from mgrpo.engine.rollout.curriculum import eval_due
from mgrpo.engine.run.directory import RunDirectory
from mgrpo.engine.run.trajectories import remove
from mgrpo.engine.run.weights import Published, publish_weights, remove_old
from mgrpo.engine.store.groups import Claim, FencedError, Group, Publication
from mgrpo.engine.store.open import begin, files_of, open_store
from mgrpo.engine.system.process import doubling

LOOK = 0.1  # seconds between two looks for sealed groups
PATIENCE = 600.0  # seconds that the store may be out of reach, or a disk full
RETRY = (0.5, 15.0)  # seconds between tries: at first, and what doubling leads to

log = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")


class StepGroups(msgspec.Struct):
    """What rank 0 found in the store. No groups: not yet; stop: Ctrl-C. expired, refilled: groups dropped meanwhile."""

    groups: list[Group] = []
    expired: int = 0
    refilled: int = 0
    stop: bool = False


class CheckpointInfo(msgspec.Struct):
    """What a checkpoint says beside the weights. folder "": there is none.

    policy: of `Policy.save`; groups: trained on in all; unacked: the queries of those not acked before it.
    """

    folder: str = ""
    stage: str = "warmup"
    step: int = 0
    policy: dict[str, Any] = {}
    groups: int = 0
    unacked: list[int] = []


def read_checkpoint_info(checkpoint: Path) -> CheckpointInfo:
    """What a checkpoint says. Raises ValueError if it is not whole."""
    state = (RunDirectory.open_checkpoint(checkpoint) / "state.json").read_bytes()
    return msgspec.structs.replace(msgspec.json.decode(state, type=CheckpointInfo), folder=str(checkpoint))


class Leader:
    """The agent's part of a run. As a context it holds the role; ValueError while another process does."""

    def __init__(self, config: Config, name: str, interrupted: Callable[[], bool]):
        self.config, self.name, self.interrupted = config, name, interrupted
        self.index = list(config.agents).index(name)
        run = Path(config.run_dir)
        self.rundir = self._patiently(RunDirectory, run / "agents" / name, resume=True)
        self.weights, self.trajectories = files_of(config, "weights"), files_of(config, "trajectories")
        self.role, self.holder = f"trainer:{name}", _holder(config)
        self.store = self._patiently(open_store, config)
        self.hand: list[Group] = []  # leased for the step to come
        self.in_doubt = False  # whether groups may be leased that we do not know of
        self.expired = self.refilled = self.groups = 0
        self.unacked: list[int] = []
        self.file: Published | None = None
        self.beside = ThreadPoolExecutor(1, "files")
        self.removing: Future[Any] = self.beside.submit(lambda: None)
        self.saved = ("", 0)
        self.leaving = threading.Event()

    def __enter__(self) -> Leader:
        self._patiently(begin, self.store, self.config)
        self._take_role()
        threading.Thread(target=self._beat, daemon=True, name="heartbeat").start()
        return self

    def __exit__(self, *_: object) -> None:
        self.leaving.set()
        self.beside.shutdown()
        try:
            self.store.release_role(self.role, self.holder)
        except OSError as error:
            log.warning("the role %s lapses by itself: %s", self.role, error)
        self.store.close()
        self.rundir.close()

    def _take_role(self) -> None:
        """A killed predecessor's lease lapses by itself, a living one's does not."""
        lease = self.config.store.lease
        give_up = time.monotonic() + 1.5 * lease
        while True:
            try:
                return self._patiently(self.store.hold, self.role, self.holder, lease)
            except ValueError as error:
                if time.monotonic() > give_up or self.interrupted():
                    raise
                log.warning("%s", error)
            time.sleep(min(1.0, lease / 10))

    def _beat(self) -> None:
        """Keeps the role. That it is lost is noticed where it matters: what this process writes is refused."""
        while not self.leaving.wait(self.config.store.lease / 3):
            try:
                self.store.keep(self.role, self.holder, self.config.store.lease)
            except (FencedError, OSError) as error:
                log.warning("heartbeat: %s", error)

    def _patiently(self, what: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        give_up = time.monotonic() + PATIENCE
        for pause in doubling(*RETRY):
            try:
                return what(*args, **kwargs)
            except OSError as error:
                if time.monotonic() + pause > give_up:
                    raise
                log.warning("%s; trying again in %.1f s", error, pause)
            time.sleep(pause)
        raise AssertionError

    # ---- resuming and saving

    def latest(self) -> CheckpointInfo:
        """What the last checkpoint says, verified."""
        checkpoint = self.rundir.latest_checkpoint()
        return read_checkpoint_info(checkpoint) if checkpoint is not None else CheckpointInfo()

    def resume(self, saved: CheckpointInfo) -> None:
        """Make store and metrics agree with the checkpoint."""
        self.groups, self.saved = saved.groups, (saved.stage, saved.step)
        self._patiently(self.store.ack, self.name, saved.unacked, self.holder)
        self._patiently(self.store.release, self.name, self.holder)
        published = saved.step if saved.stage == "rl" else -1
        self._patiently(self.store.rewind, self.name, published, self.holder)
        self._patiently(self.rundir.rewind_metrics, saved.step, saved.stage)

    def save(self, stage: str, step: int, write_policy: Callable[[Path], dict[str, Any]]) -> None:
        """A whole checkpoint. Raises OSError, and leaves those before it, when it cannot be written."""

        def write(folder: Path) -> None:
            policy = write_policy(folder / self.name)
            saved = CheckpointInfo(stage=stage, step=step, policy=policy, groups=self.groups, unacked=self.unacked)
            (folder / "state.json").write_bytes(msgspec.json.encode(saved))

        self.rundir.save_checkpoint(f"{stage}-{step:05d}", write, self.config.checkpoint.keep)

    def ack(self, stage: str, step: int) -> None:
        """After `save`: the store may know which groups are in the checkpoint."""
        self.saved = (stage, step)
        self._patiently(self.store.ack, self.name, self.unacked, self.holder)
        self.unacked = []
        if not self.config.sampling.keep_trajectories:
            gone = remove(self.trajectories, self._patiently(self.store.garbage))
            self._patiently(self.store.forget, gone)

    # ---- groups

    def order(self, step: int) -> StepGroups:
        """One look at the store: all of the step's groups, or none."""
        if self.interrupted():
            return StepGroups(stop=True)
        self._claim(step)
        if len(self.hand) < self.config.queries_per_step:
            self._patiently(self.store.seal_overdue, self.config.sampling.timeout)
            time.sleep(LOOK)
            return StepGroups()
        order = StepGroups(self.hand, self.expired, self.refilled)
        self.hand, self.expired, self.refilled = [], 0, 0
        return order

    def _claim(self, step: int) -> None:
        """More groups into the hand. With dynamic sampling one by one: those without any advantage are replaced."""
        missing, refill = self.config.queries_per_step - len(self.hand), self.config.sampling.refill_zero_std
        oldest = step - self.config.sampling.max_staleness
        claim = self._patiently(self._lease, missing, oldest, 1 if refill else missing)
        useless = self._without_advantage(claim.groups) if refill else set()
        if useless:
            self._patiently(self.store.refill, self.name, useless, self.holder)
        self.hand += [group for group in claim.groups if group.query not in useless]
        self.expired += len(claim.expired)
        self.refilled += len(useless)

    def _lease(self, missing: int, oldest: int, at_least: int) -> Claim:
        """A call that failed may have leased groups all the same: sealed again, or nobody would train on them."""
        if self.in_doubt:
            known = [*self.unacked, *(group.query for group in self.hand)]
            self.store.release(self.name, self.holder, keep=known)
        self.in_doubt = True
        claim = self.store.claim(self.name, missing, self.holder, oldest_step=oldest, at_least=at_least)
        self.in_doubt = False
        return claim

    def _without_advantage(self, groups: list[Group]) -> set[int]:
        config = self.config
        weighted = weigh(self.name, self.index, groups, config.algorithm, config.reward, config.seed)
        return {group.query for group, zero in zip(groups, weighted.zero_std.tolist(), strict=True) if zero}

    def trained(self, groups: Sequence[Group]) -> None:
        self.unacked += [group.query for group in groups]
        self.groups += len(groups)

    # ---- what others see

    def publish(self, step: int, version: int, weights: Mapping[str, Tensor] | None, probe: Sequence[float]) -> None:
        """weights: None if they are those of the last publication. Old files go while the next step begins."""
        self.removing.result()
        if weights is not None:
            self.file = self._patiently(publish_weights, self.weights, self.name, version, weights)
        assert self.file is not None
        publication = Publication(
            agent=self.name, step=step, version=version, trained=self.groups, probe=tuple(probe), **self.file._asdict()
        )
        self._patiently(self.store.publish, publication, self.holder)
        if eval_due(self.config, step):
            self._patiently(self.store.open_evaluation, step)
        self.removing = self.beside.submit(remove_old, self.weights, self.name, self._files_needed(step))

    def _files_needed(self, step: int) -> list[str]:
        """The last, and those of steps that are still to be evaluated."""
        assert self.file is not None
        done = self._patiently(self.store.evaluations)
        waiting = [s for s in range(step) if eval_due(self.config, s) and s not in done]
        published = (self._patiently(self.store.publications, s).get(self.name) for s in waiting)
        return [self.file.file, *(publication.file for publication in published if publication)]

    def log(self, stage: str, step: int, row: dict[str, float], started: float) -> None:
        row["time/step"] = time.monotonic() - started
        row["perf/peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self._patiently(self.rundir.log_metrics, {"stage": stage, "step": step, **row})


def _holder(config: Config) -> str:
    """Who this is. Of a local run, whose launcher lets one process act for an agent, a restarted one is the same and
    takes its killed predecessor's place at once; elsewhere it must wait until the lease is over."""
    host = socket.gethostname()
    return host if config.topology == "local" else f"{host}-{secrets.token_hex(4)}"
