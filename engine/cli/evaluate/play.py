"""Play an evaluation with the weights of one arm, as far as the user lets it go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from mgrpo.engine.cli.evaluate.weights import Weights, make_sampler
from mgrpo.engine.config.schema import Config
from mgrpo.engine.environment.base import Environment
from mgrpo.engine.inference.sampler import Sampler
from mgrpo.engine.inference.vllm.router import NoServerError
from mgrpo.engine.rollout.episodes import Episodes, Job, Rollout
from mgrpo.engine.rollout.evaluation import Evaluation
from mgrpo.engine.rollout.watched import watched
from mgrpo.engine.system.process import Interrupted


@dataclass
class Played:
    """Hold what was played: all rollouts that have ended, and whether they are all that were asked for.

    Only the first `keep` rollouts keep their tokens.
    """

    keep: int
    rollouts: list[Rollout] = field(default_factory=list)
    whole: bool = False

    def add(self, rollout: Rollout) -> None:
        """Add a rollout that has ended."""
        if len(self.rollouts) >= self.keep:
            rollout.trajectories = []
        self.rollouts.append(rollout)


class Samplers:
    """Keep one sampler per agent from arm to arm, and make another one only where the weights change."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.weights: dict[str, Weights] = {}
        self.samplers: dict[str, Sampler] = {}

    def use(self, weights: Mapping[str, Weights]) -> dict[str, Sampler]:
        """Return samplers with these weights. What is no longer used is freed first: both need not fit together."""
        for name in [name for name in self.samplers if self.weights[name] != weights[name]]:
            self._drop(name)
        for name, one in weights.items():
            if name not in self.samplers:
                self.samplers[name], self.weights[name] = make_sampler(name, one, self.config), one
        return self.samplers

    def close(self) -> None:
        """End the connections to servers."""
        for name in list(self.samplers):
            self._drop(name)

    def _drop(self, name: str) -> None:
        sampler = self.samplers.pop(name)
        if self.weights[name].server:
            sampler.stop()  # type: ignore[attr-defined]


def play(
    config: Config,
    environment: Environment,
    samplers: Mapping[str, Sampler],
    evaluation: Evaluation,
    keep: int,
    stopped: Callable[[], bool],
) -> Played:
    """Play the episodes side by side, and return those that ended before the user asked to stop.

    If an async function of the environment does not let go of the event loop, the process ends and names it. Raises
    StuckError if too many plain functions have not returned, ValueError if an agent's server does not answer.
    """
    runner, played, jobs = Episodes(config, environment, samplers), Played(keep), iter([evaluation.jobs])

    def more(_: int) -> Sequence[Job]:
        if stopped():
            raise Interrupted
        return next(jobs, [])

    try:
        with suppress(Interrupted), watched(runner):
            runner.stream(more, played.add)
            played.whole = True
    except NoServerError as error:
        raise ValueError(f"--model: {error}: expected a server that `mgrpo serve` started") from error
    runner.check_stuck()
    return played
