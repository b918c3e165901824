"""Play episodes in which the environment's own script takes every action; nothing is sampled."""

from __future__ import annotations

from mgrpo.engine.environment.calls import ask_text
from mgrpo.engine.inference.sampler import Completion, Session
from mgrpo.engine.rollout.episodes import EpisodeRunner
from mgrpo.engine.types import Call


class Demonstrations(EpisodeRunner):
    """Run scripted episodes: the environment's `script` writes what every agent says.

    tokenizers: one per agent, by the agent's name; no model and no sampler is needed. Log-probs are recorded as 0.
    """

    async def _act(self, call: Call, session: Session) -> Completion:
        text = await ask_text(self.environment.script, call)
        tokens = self._encode(call, text)
        session.append(tokens, [0.0] * len(tokens))
        return Completion(text, len(tokens), truncated=False)
