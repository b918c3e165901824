"""Around a worker's loop: published weights on their way into its samplers, its signs of life, what it has done.

An agent's weights are read from the published file into its sampler here, unless vLLM servers sample it: those get them
from its trainer, and all there is to do is to say what they are to be known by, and to wait until they have them.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from threading import Event, Thread
from typing import TYPE_CHECKING

from torch import Tensor

from mgrpo.engine.config.schema import Config
from mgrpo.engine.inference.in_process import InProcessSampler
from mgrpo.engine.inference.sampler import WeightsCheck
from mgrpo.engine.run.weights import check_probe, load_weights, probe_tokens
from mgrpo.engine.store.groups import CallRecord, Publication, Store

if TYPE_CHECKING:  # imports what talks to servers: only where there are some
    from mgrpo.engine.inference.vllm.client import VLLMSampler

log = logging.getLogger(__name__)


class WeightLoader:
    """The newest published weights of every agent, on their way into its sampler. served: those that servers sample."""

    def __init__(
        self,
        config: Config,
        store: Store,
        samplers: Mapping[str, InProcessSampler],
        root: str,
        served: Mapping[str, VLLMSampler] | None = None,
    ) -> None:
        self.config, self.store, self.samplers, self.root, self.served = config, store, samplers, root, served or {}
        self.published: dict[str, Publication] = {}
        self.loaded: dict[str, Publication] = {}
        self.loads = dict.fromkeys(config.agents, 0)
        self.seconds = 0.0  # spent on reading, copying and probing
        self._read: dict[str, tuple[Publication, dict[str, Tensor]]] = {}  # what waits for running turns

    @property
    def step(self) -> int:
        """The rl step that every agent has published; -1 when one has published nothing."""
        return min(self.published[name].step if name in self.published else -1 for name in self.config.agents)

    @property
    def outdated(self) -> bool:
        """Whether there are other weights than those loaded."""
        return any(not self._has(name, self.published[name]) for name in self.published.keys() & self.samplers.keys())

    @property
    def held(self) -> bool:
        return any(sampler.held for sampler in self.samplers.values())

    def look(self) -> None:
        self.published = self.store.publications()

    def bring(self, publications: Mapping[str, Publication]) -> bool:
        """Loads them; False while turns run that hold some up: then no new turn begins, and this is to be called again.

        False too until servers have the newest of theirs, whichever was asked for. Raises GapError when a probe fails;
        DamagedWeightsError or OSError when a file cannot be read, ValueError when one is of another model: then the
        sampler keeps what it has.
        """
        began = time.monotonic()
        arrived = [self._bring(name, publications[name]) for name in publications.keys() & self.samplers.keys()]
        arrived += [self._follow(name, self.published[name]) for name in self.published.keys() & self.served.keys()]
        self.seconds += time.monotonic() - began
        return all(arrived)

    def _follow(self, name: str, new: Publication) -> bool:
        """Whether its servers have the newest weights, and were found to."""
        sampler = self.served[name]
        sampler.expect(new.version, new.step, self._proof(name, new, sampler.vocabulary))
        if sampler.version != new.version:
            return False
        self.loads[name] += not self._has(name, new)
        self.loaded[name] = new
        return True

    def _bring(self, name: str, new: Publication) -> bool:
        sampler = self.samplers[name]
        if self._has(name, new) and not sampler.held:  # a frozen agent's, or it had no call to learn from
            sampler.version, sampler.weights_step = new.version, new.step
            self.loaded[name] = new
            return True
        if name not in self._read or self._read[name][0] != new:
            self._read[name] = new, load_weights(self.root, new.file, new.checksum, new.size)
        if not sampler.update(self._read[name][1], new.version, new.step):
            return False
        del self._read[name]
        self.loaded[name] = new
        proof = self._proof(name, new, sampler.model.config.vocab_size)
        if proof and proof.due:
            proof.judge("the worker's sampler", sampler.logprobs(proof.tokens))
        self.loads[name] += 1
        return True

    def _has(self, name: str, publication: Publication) -> bool:
        return name in self.loaded and self.loaded[name].checksum == publication.checksum

    def _proof(self, name: str, new: Publication, vocabulary: int) -> WeightsCheck | None:
        """None when nothing is to be probed. It is due for every n-th version."""
        every, limit = self.config.sampling.probe_every, self.config.sampling.max_gap
        if not every or not new.probe:
            return None

        def judge(who: str, logprobs: Sequence[float]) -> None:
            gap = check_probe(name, new.version, new.probe, logprobs, limit)
            log.info("%s: %s has version %d, gap to the trainer %.2g nats", name, who, new.version, gap)

        tokens = probe_tokens(self.config.seed, vocabulary, self.config.agents[name].max_context)
        return WeightsCheck(tokens, judge, self.loads[name] % every == 0)


class Heartbeat:
    """A thread that extends a worker's leases at a third of their length, however long a step of the sampler takes."""

    def __init__(self, store: Store, worker: str, lease: float) -> None:
        self.store, self.worker, self.lease = store, worker, lease
        self.evaluating = False
        self._over = Event()
        self._thread = Thread(target=self._beat, daemon=True, name="heartbeat")

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(self.lease)

    def _beat(self) -> None:
        while not self._over.wait(self.lease / 3):
            try:
                self.store.extend(self.worker, self.lease)
                if self.evaluating:
                    self.store.take_evaluation(self.worker, self.lease)
            except OSError as error:  # what lapses may be taken by others: sampled twice, recorded once
                log.warning("leases not extended: %s", error)


class WorkerMetrics:
    """What a worker did since its last row of metrics. busy: seconds that its samplers took for rollouts, in all."""

    def __init__(self, arrivals: WeightLoader, busy: Callable[[], float]) -> None:
        self.arrivals, self.busy, self.recorded = arrivals, busy, 0
        self._begin()

    def _begin(self) -> None:
        self.began, self.waited, self.arrivals.seconds, self.busy_before = time.monotonic(), 0.0, 0.0, self.busy()
        self.counts: Counter[str] = Counter()
        self.actions, self.recorded_since = 0, 0
        self.staleness: list[int] = []

    def add(self, counts: Mapping[str, float], calls: Sequence[CallRecord]) -> None:
        """What was recorded: how many rollouts of each status, and their calls."""
        self.counts.update(counts)
        self.recorded += int(sum(counts.values()))
        self.recorded_since += int(sum(counts.values()))
        self.actions += sum(call.actions for call in calls)
        self.staleness += [self.arrivals.published[call.agent].step - call.step for call in calls]

    def row(self) -> dict[str, float | str]:
        """staleness: by how many published steps the weights behind a call were old when it was recorded."""
        seconds = time.monotonic() - self.began
        row: dict[str, float | str] = {
            "stage": "rl",
            "step": self.arrivals.step,
            **self.counts,
            "perf/rollouts_per_second": self.recorded_since / seconds,
            "perf/tokens_per_second": self.actions / seconds,
            "time/rollout": self.busy() - self.busy_before,
            "time/waiting": self.waited,
            "time/weights": self.arrivals.seconds,
            "staleness_mean": sum(self.staleness) / max(len(self.staleness), 1),
            "staleness_worst": max(self.staleness, default=0),
            **{f"{agent}/version": publication.version for agent, publication in self.arrivals.loaded.items()},
        }
        for agent, sampler in self.arrivals.served.items():  # since the worker began
            row |= {f"{agent}/{key}": value for key, value in sampler.counts().items()}
        self._begin()
        return row
