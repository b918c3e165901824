"""Load the newest published weights into a worker's samplers.

The weights of an agent are read from the published file into its sampler in this process. If vLLM servers sample the
agent, its trainer sends them the weights; here we only tell the sampler which version to expect and wait for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from mgrpo.engine.config.schema import Config
from mgrpo.engine.inference.in_process import InProcessSampler
from mgrpo.engine.inference.sampler import WeightsCheck
from mgrpo.engine.run.weights import check_probe, load_weights, probe_tokens
from mgrpo.engine.store import Publication, Store
from mgrpo.engine.types import WeightsVersion

if TYPE_CHECKING:  # it imports the client of the servers, which few runs need
    from mgrpo.engine.inference.vllm.client import VLLMSampler

log = logging.getLogger(__name__)


class WeightLoader:
    """Keep every agent's sampler supplied with published weights.

    samplers: of the agents sampled in this process; served: of those that servers sample. root: folder or URL of the
    published files.
    """

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
        self.loads = dict.fromkeys(config.agents, 0)  # how often each agent's weights were replaced
        self._seconds = 0.0
        self._read: dict[str, tuple[Publication, dict[str, Tensor]]] = {}  # read, but held up by running turns

    @property
    def step(self) -> int:
        """The rl step that every agent has published; -1 if an agent has published nothing."""
        return min(self.published[name].step if name in self.published else -1 for name in self.config.agents)

    @property
    def outdated(self) -> bool:
        """Whether a sampler in this process lacks the newest weights."""
        return any(not self._has(name, self.published[name]) for name in self.published.keys() & self.samplers.keys())

    @property
    def held(self) -> bool:
        """Whether a sampler in this process holds back new turns until it can take over new weights."""
        return any(sampler.held for sampler in self.samplers.values())

    def poll(self) -> None:
        """Ask the store for the newest publications."""
        self.published = self.store.roles.publications()

    def load(self, publications: Mapping[str, Publication]) -> bool:
        """Load these weights into the samplers of this process; return whether all samplers are ready.

        It returns False while running turns hold up new weights (no new turn begins until then) and while servers lack
        the newest weights, regardless of the publications given; the caller tries again later. Raises GapError if a
        probe fails; DamagedWeightsError or OSError if a file cannot be read; ValueError if the weights are of another
        model: the sampler then keeps the weights it has.
        """
        began = time.monotonic()
        ready = [self._load(name, publications[name]) for name in publications.keys() & self.samplers.keys()]
        ready += [self._expect(name, self.published[name]) for name in self.published.keys() & self.served.keys()]
        self._seconds += time.monotonic() - began
        return all(ready)

    def take_seconds(self) -> float:
        """Return the seconds spent on loading and checking weights since the last call, and start again at 0."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _expect(self, name: str, new: Publication) -> bool:
        """Return whether the agent's servers have the newest weights and passed the check of them."""
        sampler, version = self.served[name], _version(new)
        sampler.expect(version, self._check(name, new, sampler.vocabulary))
        if sampler.version.optimizer_steps != new.version:
            return False
        self.loads[name] += not self._has(name, new)
        self.loaded[name] = new
        return True

    def _load(self, name: str, new: Publication) -> bool:
        """Return whether the agent's sampler has these weights now."""
        sampler = self.samplers[name]
        if self._has(name, new) and not sampler.held:  # the step changed no weight: a frozen agent, or no call was made
            sampler.version = _version(new)
            self.loaded[name] = new
            return True
        if name not in self._read or self._read[name][0] != new:
            self._read[name] = new, load_weights(self.root, new.file, new.checksum, new.size)
        if not sampler.update(self._read[name][1], _version(new)):
            return False
        del self._read[name]
        self.loaded[name] = new
        check = self._check(name, new, sampler.model.config.get_text_config().vocab_size)
        if check and check.due:
            check.judge("the worker's sampler", sampler.logprobs(check.tokens))
        self.loads[name] += 1
        return True

    def _has(self, name: str, publication: Publication) -> bool:
        return name in self.loaded and self.loaded[name].checksum == publication.checksum

    def _check(self, name: str, new: Publication, vocabulary: int) -> WeightsCheck | None:
        """Return the check of these weights, due for every probe_every-th version, or None if there is none."""
        every, limit = self.config.sampling.probe_every, self.config.sampling.max_gap
        if not every or not new.probe:
            return None

        def judge(who: str, logprobs: Sequence[float]) -> None:
            gap = check_probe(name, new.version, new.probe, logprobs, limit)
            log.info("%s: %s has version %d, gap to the trainer %.2g nats", name, who, new.version, gap)

        tokens = probe_tokens(self.config.seed, vocabulary, self.config.agents[name].max_context)
        return WeightsCheck(tokens, judge, self.loads[name] % every == 0)


def _version(publication: Publication) -> WeightsVersion:
    return WeightsVersion(publication.version, publication.step)
