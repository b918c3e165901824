"""Copy episodes, so that what is recorded of one does not change while a judge has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mgrpo.engine.types import Call, Episode, Turn


def copy_of(episode: Episode) -> Episode:
    """Return a copy of an episode with copies of its calls and turns; the task is the same object."""
    main, *calls = (replace(call, turns=_copies(call)) for call in (episode.main, *episode.calls))
    return Episode(main, calls)


def as_recorded(calls: Sequence[Call], kept: Episode) -> Episode:
    """Return an episode of these very calls, by whose identity environments know them, as they were when copied."""
    for call, copy in zip(calls, (kept.main, *kept.calls), strict=True):
        vars(call).update(vars(copy) | {"turns": _copies(copy)})
    return Episode(calls[0], list(calls[1:]))


def _copies(call: Call) -> list[Turn]:
    return [replace(turn) for turn in call.turns]
