"""Choose some episodes of a step, and write them as text for loggers.

Secrets that this process knows are taken out of the texts: a tool may have shown one to an agent.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgrpo.engine.config.schema import Config
from mgrpo.engine.report.loggers.base import LoggedRollout
from mgrpo.engine.run.directory import root_of
from mgrpo.engine.system import secrets
from mgrpo.engine.types import MAIN

if TYPE_CHECKING:
    from mgrpo.engine.store import CallRecord, RolloutRecord

SECRET = re.compile(r"key|token|secret|passw|credential|auth", re.IGNORECASE)  # in names of what nobody else may see
SHORTEST = 8  # characters of a secret; a shorter value may be a word of any text
HIDDEN = "[hidden]"
LONGEST = 20_000  # characters of an episode's text


class StepEpisodes:
    """Read episodes of a run directory. Loads torch and the agents' tokenizers."""

    def __init__(self, run: Path, config: Config) -> None:
        from mgrpo.engine.model.causal_lm import load_tokenizer
        from mgrpo.engine.model.pieces import for_pieces

        self.run, self.config = run, config
        self.tokenizers = {name: for_pieces(load_tokenizer(name, agent)) for name, agent in config.agents.items()}
        self.secrets = secrets_of(config)

    def of(self, step: int) -> list[LoggedRollout]:
        """Return log.rollouts episodes of a query of the step, from the best reward to the worst; none if it has none.

        The query is the first whose rewards differ, or else the first, as in `mgrpo report`. Raises ValueError or
        OSError if the store or the trajectories cannot be read.
        """
        from mgrpo.engine.batch.advantages import main_reward
        from mgrpo.engine.report.transcript import spread, weights_of
        from mgrpo.engine.store.open import open_copy

        with open_copy(self.config, self.run) as store:
            found = {query: store.groups.rollouts_of(query) for query in store.queries.sealed_of(step)}
            if not found:
                return []
            rewards = {
                q: {main_reward(r, self.config.reward) for r in of if r.status == "scored"} for q, of in found.items()
            }
            query = next((query for query in found if len(rewards[query]) > 1), min(found))
            calls = store.groups.calls_of(query)
        weights = weights_of(self.config, query, found[query], calls)
        some = spread(found[query], self.config, self.config.log.rollouts)
        return [
            LoggedRollout(
                query=query,
                rollout=rollout.rollout,
                status=rollout.status,
                reward=main_reward(rollout, self.config.reward) if rollout.status == "scored" else 0.0,
                text=self._text(rollout, calls, weights),
            )
            for rollout in some
        ]

    def _text(self, rollout: RolloutRecord, calls: Sequence[CallRecord], weights: dict[Any, Any]) -> str:
        from mgrpo.engine.report.transcript import judged, written
        from mgrpo.engine.run.trajectories import read

        order = [MAIN, *self.config.subs]
        mine = sorted((c for c in calls if c.rollout == rollout.rollout), key=lambda call: order.index(call.agent))
        root, digests = root_of(self.config, "trajectories", self.run), [call.sampler_digest for call in mine]
        parts = [f"query {rollout.query}, rollout {rollout.rollout}: {rollout.status} {rollout.error}".strip()]
        for call, trajectory in zip(mine, read(root, [call.position for call in mine], digests), strict=True):
            who = MAIN if call.agent == MAIN else f"{MAIN} -> {call.agent}, call {call.call + 1}"
            head = (
                f"--- {who}, weights {call.version}: {judged(call, weights.get((call.agent, call.rollout, call.call)))}"
            )
            parts += [head, written(trajectory, self.tokenizers[call.agent], ("<<", ">>")).plain]
        return hide("\n".join(parts), self.secrets)[:LONGEST]


def secrets_of(config: Config) -> list[str]:
    """Return the values of variables of this process, and of the environment's options, that are named like secrets.

    The longest come first, so that none is left over of a secret that begins like another one.
    """
    own = {name: secrets.get(name) or "" for name in secrets.NAMES}
    named = {**os.environ, **own, **_texts("", config.environment.options)}
    found = {value for name, value in named.items() if SECRET.search(name) and len(value) >= SHORTEST}
    return sorted(found, key=len, reverse=True)


def hide(text: str, hidden: Collection[str]) -> str:
    """Replace secrets in a text."""
    for secret in hidden:
        text = text.replace(secret, HIDDEN)
    return text


def _texts(name: str, value: Any) -> dict[str, str]:
    """Return all texts in an option's value, by their full names."""
    if isinstance(value, str):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {key: text for part, inner in items for key, text in _texts(f"{name}.{part}", inner).items()}
