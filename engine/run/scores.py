"""Decide when a run is evaluated, which evaluation was its best, and whether its score has ceased to rise.

Every process of a run, and its report, decides alike from the results by step. A result is what `rollout/evaluation`
makes of an evaluation's episodes; its score is the mean of the first set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from mgrpo.engine.config.schema import Config, EvalConfig

ACCURACY = "eval/held_out_accuracy"  # the score, and the mark of an evaluation's row
Result = Mapping[str, float]  # of an evaluation, by metric


def eval_due(config: Config, step: int, last: int | None = None) -> bool:
    """Return whether the weights after `step` rl steps are evaluated: the first, the last and every eval.every-th.

    last: the step at which the run ends early, if it does.
    """
    every = config.eval.every
    return step in (0, config.steps, last) or bool(every and step % every == 0)


def keeps_best(config: Config) -> bool:
    """Return whether the checkpoint with the best score is kept: of two evaluations alone, none is chosen."""
    return config.checkpoint.best and config.eval.every > 0


def best_of(results: Mapping[int, Result], settings: EvalConfig) -> tuple[int, float] | None:
    """Return the step with the best score and that score, or None if there is none. Of equal ones the earliest counts.

    Only evaluations that measured what the settings say count, on as many tasks as the latest of them.
    """
    found = {step: score for step, one in sorted(results.items()) if (score := score_of(one, settings)) is not None}
    if not found:
        return None
    tasks = results[max(found)].get("eval/questions")
    alike = {step: score for step, score in found.items() if results[step].get("eval/questions") == tasks}
    step = max(alike, key=lambda step: (alike[step], -step))
    return step, alike[step]


def score_of(result: Result, settings: EvalConfig) -> float | None:
    """Return the mean of the first set, or None if the evaluation had other sets, samples or another temperature."""
    first, alone = settings.sets[0], settings.sets == ("held_out",) and settings.samples == 1
    score = result.get(f"eval/{first}/avg@{settings.samples}")
    if alone and "eval/samples" not in result:
        score = result.get(ACCURACY)
    given = (result.get("eval/samples", 1), result.get("eval/temperature", 0.0))
    alike = given == (settings.samples, settings.temperature)
    return score if alike and score is not None and math.isfinite(score) else None


def without_rise(results: Mapping[int, Result], config: Config) -> int:
    """Return how many evaluations in a row have not raised the score. Those after one that is missing do not count."""
    steps: list[int] = []
    for step in range(config.steps + 1):
        if eval_due(config, step):
            if step not in results:
                break
            steps.append(step)
    best = best_of({step: results[step] for step in steps}, config.eval)
    return sum(step > best[0] for step in steps) if best else 0


def ceased(results: Mapping[int, Result], config: Config) -> bool:
    """Return whether the run is to end, since its score has not risen for eval.patience evaluations."""
    return bool(config.eval.patience) and without_rise(results, config) >= config.eval.patience


def why_ended(config: Config, step: int) -> str:
    """Say why a run ends early after `step` rl steps."""
    return (
        f"ends after {step} of {config.steps} rl steps: the held-out score has not risen for {config.eval.patience} "
        "evaluations (eval.patience)"
    )


def had(results: Mapping[int, Result], config: Config) -> list[str]:
    """Say in words which evaluations a resumed run has; nothing if it has none."""
    if not results:
        return []
    best, newest = best_of(results, config.eval), max(results)
    score = score_of(results[newest], config.eval)
    if best is None or score is None:
        return [f"evaluations so far: {len(results)}, none as [eval] is now: they do not count for the best checkpoint"]
    text = f"evaluations so far: {len(results)}, the last after {newest} rl steps with {score:.1%}"
    return [f"{text}, the best after {best[0]} with {best[1]:.1%}"]
