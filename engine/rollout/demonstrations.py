"""Play episodes in which the environment's own script takes every action; nothing is sampled."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from mgrpo.engine.config.schema import Config
from mgrpo.engine.environment.base import Environment
from mgrpo.engine.inference.sampler import Completion, Session
from mgrpo.engine.rollout.episodes import EpisodeRunner, Rollout
from mgrpo.engine.types import Call

log = logging.getLogger(__name__)


def check_script(config: Config, environment: Environment) -> None:
    """Check that the warm-up has something to learn from. Raises ValueError if the environment has no script."""
    if config.warmup.steps and type(environment).script is Environment.script:
        raise ValueError(
            f"warmup.steps: {config.warmup.steps} given: {type(environment).__name__} has no script(): expected one, "
            "which writes the demonstrations of the warm-up, or warmup.steps = 0"
        )


def check_played(step: int, rollouts: Sequence[Rollout]) -> None:
    """Check that a warm-up step has anything to learn from. Raises ValueError if every scripted episode failed."""
    if all(rollout.status == "failed" for rollout in rollouts):
        raise ValueError(
            f"warmup: step {step}: each of {len(rollouts)} scripted episodes failed: the first error: "
            f"{rollouts[0].error}"
        )


class Demonstrations(EpisodeRunner):
    """Run scripted episodes: the environment's `script` writes what every agent says.

    tokenizers: one per agent, by the agent's name; no model and no sampler is needed. Log-probs are recorded as 0. As
    in sampled episodes, a call ends when its context is full: a turn that has no room is left out.
    """

    async def _act(self, call: Call, session: Session) -> Completion:
        text = await self.code.text(self.environment.script, call)
        tokens = self._encode(call, text)
        if len(session.tokens) + len(tokens) > self.config.agents[call.agent].max_context:
            self._log_full(call, len(session.tokens) + len(tokens))
            return Completion("", 0, truncated=True)
        session.append(tokens, [0.0] * len(tokens))
        return Completion(text, len(tokens), truncated=False)

    def _log_full(self, call: Call, tokens: int) -> None:
        """Log the first scripted call of each agent that has no room."""
        key, most = f"agents.{call.agent}.max_context", self.config.agents[call.agent].max_context
        if key not in self.logged:
            self.logged.add(key)
            which = f"turn {len(call.turns) + 1} of a scripted call of task {call.task.id!r}"
            log.warning("%s: %d given: %s would end at token %d: such turns are left out", key, most, which, tokens)
