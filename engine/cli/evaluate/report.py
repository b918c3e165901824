"""Say what an evaluation found: a table, JSON, and whole episodes to read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.console import Group as Stack
from rich.panel import Panel
from rich.text import Text

from mgrpo.engine.cli.evaluate.arms import compared
from mgrpo.engine.config.schema import Config
from mgrpo.engine.model.pieces import for_pieces
from mgrpo.engine.report.transcript import COLUMN, side_by_side, visible, written
from mgrpo.engine.rollout.episodes import Rollout
from mgrpo.engine.rollout.evaluation import IntervalEstimate, SetOutcome
from mgrpo.engine.system.words import counted
from mgrpo.engine.types import MAIN, Call, Trajectory

Found = Mapping[str, Mapping[str, SetOutcome]]  # what each set got, by arm


def table(found: Found, samples: int, ks: Sequence[int]) -> list[str]:
    """Return a line for each arm and set: its tasks, episodes without a score, avg@n, and pass@k for some k."""
    several = len(found) > 1
    heads = [*(["arm"] if several else []), "set", "tasks", "failed", f"avg@{samples}", *(f"pass@{k}" for k in ks)]
    rows = [heads]
    for arm, sets in found.items():
        for name, outcome in sets.items():
            counts = [str(len(outcome.asked)), str(outcome.failed)]
            rows.append([*([arm] if several else []), name, *counts, *_cells(outcome, ks)])
    return _aligned(rows)


def differences(found: Found) -> list[str]:
    """Return a table of what the arms differ by, in points, with 95 % intervals over the tasks of both."""
    sets = list(next(iter(found.values())))
    gains = {name: compared(found, name) for name in sets}
    said = list(dict.fromkeys(said for one in gains.values() for said in one))
    if not said:
        return []
    rows = [["gain of", *sets]]
    for one in said:
        rows.append([one, *(_points(gains[name][one]) if one in gains[name] else "-" for name in sets)])
    return ["differences in points, task by task:", *_aligned(rows)]


def as_json(found: Found, samples: int) -> dict[str, Any]:
    """Return all numbers: of each arm and set the estimates of avg@n and of pass@k for every k, and each task's scores.

    NaN stands for an interval that is not known.
    """
    arms = {arm: {name: _outcome(outcome, samples) for name, outcome in sets.items()} for arm, sets in found.items()}
    if len(found) == 1:
        return {"sets": next(iter(arms.values()))}
    names = next(iter(found.values()))
    gains = {name: {said: vars(one) for said, one in compared(found, name).items()} for name in names}
    return {"arms": arms, "differences": gains}


def show_episodes(console: Console, config: Config, tokenizers: Mapping[str, Any], rollouts: Sequence[Rollout]) -> None:
    """Print whole episodes side by side: the main agent's call, then its calls of each sub-agent."""
    marks = ("<<", ">>") if console.color_system is None else ("", "")
    decoders = {name: for_pieces(tokenizer) for name, tokenizer in tokenizers.items()}
    order = [MAIN, *config.subs]
    episodes = [_episode(rollout, order, decoders, marks) for rollout in rollouts]
    beside = max(1, console.width // COLUMN)
    for first in range(0, len(episodes), beside):
        console.print(side_by_side(episodes[first : first + beside]))


def percent(estimate: IntervalEstimate) -> str:
    """Write an estimate as 12.3 % (10.0 to 15.0); without an interval if there is none."""
    value, low, high = (100 * number for number in estimate.values)
    return f"{value:.1f} %" + ("" if math.isnan(low) else f" ({low:.1f} to {high:.1f})")


def _cells(outcome: SetOutcome, ks: Sequence[int]) -> list[str]:
    if not outcome.asked:
        return ["-"] * (1 + len(ks))
    most = max(map(len, outcome.asked))
    shown = [percent(outcome.passed(k)) if outcome.binary and k <= most else "-" for k in ks]
    average = outcome.average()
    plain = all(0 <= value <= 1 for value in average.values if not math.isnan(value))
    return [percent(average) if plain else _number(average), *shown]


def _number(estimate: IntervalEstimate) -> str:
    value, low, high = estimate.values
    return f"{value:.4g}" + ("" if math.isnan(low) else f" ({low:.4g} to {high:.4g})")


def _points(estimate: IntervalEstimate) -> str:
    value, low, high = (100 * number for number in estimate.values)
    return f"{value:+.1f}" + ("" if math.isnan(low) else f" ({low:+.1f} to {high:+.1f})")


def _outcome(outcome: SetOutcome, samples: int) -> dict[str, Any]:
    tasks = [
        {"task": task, "correct": [scores[number] for number in sorted(scores)]}
        for task, scores in zip(outcome.tasks, outcome.correct, strict=True)
        if scores
    ]
    found: dict[str, Any] = {"questions": len(outcome.asked), "failed": outcome.failed}
    if outcome.asked:
        found[f"avg@{samples}"] = vars(outcome.average())
        if outcome.binary:
            most = max(map(len, outcome.asked))
            found |= {f"pass@{k}": vars(outcome.passed(k)) for k in range(1, most + 1)}
    return found | {"tasks": tasks}


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _episode(rollout: Rollout, order: Sequence[str], decoders: Mapping[str, Any], marks: tuple[str, str]) -> Stack:
    job, calls = rollout.job, [rollout.episode.main, *rollout.episode.calls]
    found = f"correct {rollout.score.correct:g}" if rollout.score else f"{rollout.status}: {visible(rollout.error)}"
    head = Text(f"task {visible(job.task.id)}, sample {job.rollout}: {found}, {rollout.seconds:.1f} s", style="bold")
    pairs = sorted(zip(calls, rollout.trajectories, strict=True), key=lambda pair: order.index(pair[0].agent))
    numbers: dict[str, int] = {}
    panels = []
    for call, trajectory in pairs:
        numbers[call.agent] = numbers.get(call.agent, 0) + 1
        who = MAIN if call.agent == MAIN else f"{MAIN} -> {call.agent}, call {numbers[call.agent]}"
        if trajectory is not None:
            text = _call(call, trajectory, decoders[call.agent], marks)
            panels.append(Panel(text, title=Text(who), title_align="left"))
    return Stack(head, *panels)


def _call(call: Call, trajectory: Trajectory, decoder: Any, marks: tuple[str, str]) -> Text:
    size = f"{counted(len(trajectory), 'token')}, {counted(len(call.turns), 'turn')}"
    text = Text.assemble((f"{size}, ended by {call.ended or 'an error'}", "cyan"), "\n\n")
    return text.append_text(written(trajectory, decoder, marks))
