"""Compare arms that differ in whose weights are new, to see whether the main agent or its sub-agents bring the gain.

All arms ask the same tasks with the same random numbers, so that they are compared task by task.
"""

from __future__ import annotations

from collections.abc import Mapping

from mgrpo.engine.cli.evaluate.weights import Weights
from mgrpo.engine.config.schema import Config
from mgrpo.engine.rollout.evaluation import IntervalEstimate, SetOutcome
from mgrpo.engine.system.statistics import bootstrap
from mgrpo.engine.types import MAIN

OLD, MAIN_ONLY, BOTH, SUBS_ONLY = "old main, old subs", "new main, old subs", "new main, new subs", "old main, new subs"
ORDER = (OLD, MAIN_ONLY, BOTH, SUBS_ONLY)  # from each to the next one, weights change on one side only
DIFFERENCES = (  # what is said of two arms: the gain of the first over the second
    ("all new", BOTH, OLD),
    ("new main, beside old subs", MAIN_ONLY, OLD),
    ("new main, beside new subs", BOTH, SUBS_ONLY),
    ("new subs, beside old main", SUBS_ONLY, OLD),
    ("new subs, beside new main", BOTH, MAIN_ONLY),
)


def arms_of(config: Config, old: Mapping[str, Weights], new: Mapping[str, Weights]) -> dict[str, dict[str, Weights]]:
    """Return the weights of all agents in each arm, in the order in which they are played.

    Raises ValueError without sub-agents, or if old and new are the same on one of the two sides.
    """
    if not config.subs:
        raise ValueError("--arms: given for agents ['main']: expected a sub-agent, whose weights make a difference")
    for side in ([MAIN], config.subs):
        if all(old[name] == new[name] for name in side):
            raise ValueError(f"--arms: the old and the new weights of {side} are the same: {new[side[0]].said}")
    main, subs = {OLD: old, SUBS_ONLY: old}, {OLD: old, MAIN_ONLY: old}
    return {
        arm: {name: (main if name == MAIN else subs).get(arm, new)[name] for name in config.agents} for arm in ORDER
    }


def difference(new: SetOutcome, old: SetOutcome) -> IntervalEstimate | None:
    """Return the mean over tasks of the difference of their means, with its interval; None if they share no task.

    The interval is by the bootstrap over tasks; it has no width if the arms differ alike on every task.
    """
    pairs = zip(new.by_task(), old.by_task(), strict=True)
    gains = [a - b for a, b in pairs if a is not None and b is not None]
    return IntervalEstimate(sum(gains) / len(gains), *bootstrap(gains)) if gains else None


def compared(found: Mapping[str, Mapping[str, SetOutcome]], name: str) -> dict[str, IntervalEstimate]:
    """Return the differences between the arms that were played, on one set."""
    pairs = {said: (found[a][name], found[b][name]) for said, a, b in DIFFERENCES if a in found and b in found}
    return {said: gain for said, (a, b) in pairs.items() if (gain := difference(a, b)) is not None}
