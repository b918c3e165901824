"""Test which evaluation counts as the best one, and when a score has ceased to rise."""

from __future__ import annotations

import msgspec
import pytest

from mgrpo.engine.config.schema import AgentConfig, CheckpointConfig, Config, EnvironmentConfig, EvalConfig
from mgrpo.engine.run.scores import ACCURACY, best_of, ceased, eval_due, had, keeps_best, score_of, without_rise


def config(steps: int = 6, **changes) -> Config:
    made = Config(run_dir="", environment=EnvironmentConfig(use=""), agents={"main": AgentConfig(model="")})
    return msgspec.structs.replace(made, steps=steps, eval=EvalConfig(**{"every": 1} | changes))


def results(*scores: float | None) -> dict[int, dict[str, float]]:
    """Return results at steps 0, 1, …; none where the score is None."""
    return {i: {ACCURACY: score, "eval/questions": 5} for i, score in enumerate(scores) if score is not None}


def test_the_best_is_the_earliest_of_the_highest():
    assert best_of(results(0.1, 0.4, 0.4, 0.2), EvalConfig()) == (1, 0.4)
    assert best_of({}, EvalConfig()) is None
    assert best_of({0: {ACCURACY: None}}, EvalConfig()) is None  # type: ignore[dict-item]  (NaN is stored as null)


def test_only_what_was_measured_alike_is_compared():
    several = EvalConfig(samples=4, temperature=1.0)
    old = results(0.9)
    new = {1: {ACCURACY: 0.2, "eval/samples": 4, "eval/temperature": 1.0, "eval/held_out/avg@4": 0.2}}
    assert best_of(old | new, several) == (1, 0.2) and best_of(old | new, EvalConfig()) == (0, 0.9)
    assert score_of(new[1], EvalConfig(samples=4, temperature=0.5)) is None
    fewer = {1: {ACCURACY: 0.2, "eval/questions": 3}}
    assert best_of(old | fewer, EvalConfig()) == (1, 0.2)


def test_the_score_is_that_of_the_first_set():
    row = {ACCURACY: 0.5, "eval/samples": 1, "eval/temperature": 0.0, "eval/nq/avg@1": 0.5, "eval/held_out/avg@1": 0.3}
    assert score_of(row, EvalConfig(sets=("nq", "held_out"))) == 0.5
    assert score_of(row, EvalConfig(sets=("held_out", "nq"))) == score_of(row, EvalConfig()) == 0.3
    del row["eval/held_out/avg@1"]
    assert score_of(row, EvalConfig()) is None  # the accuracy is that of another set


def test_evaluations_without_a_rise_are_counted_up_to_the_first_that_is_missing():
    assert without_rise(results(0.1, 0.3, 0.2, 0.3), config()) == 2
    assert without_rise(results(0.1, None, 0.2, 0.3), config()) == 0
    assert without_rise({}, config()) == 0
    assert without_rise(results(0.3, 0.1, 0.2), config(every=2)) == 1  # an evaluation at step 1 is not one of them


@pytest.mark.parametrize("patience, over", [(0, False), (1, True), (2, True), (3, False)])
def test_a_run_ends_after_so_many(patience: int, over: bool):
    assert ceased(results(0.1, 0.3, 0.2, 0.3), config(patience=patience)) is over


def test_evaluations_are_due_at_the_start_the_end_and_in_between():
    assert [step for step in range(8) if eval_due(config(7, every=3), step)] == [0, 3, 6, 7]
    assert [step for step in range(8) if eval_due(config(7, every=0), step, 5)] == [0, 5, 7]


def test_the_best_of_regular_evaluations_is_kept():
    assert keeps_best(config()) and not keeps_best(config(every=0))
    assert not keeps_best(msgspec.structs.replace(config(), checkpoint=CheckpointConfig(best=False)))


def test_a_resumed_run_says_what_it_had():
    assert had({}, config()) == []
    (line,) = had(results(0.1, 0.3, 0.2), config())
    assert line == "evaluations so far: 3, the last after 2 rl steps with 20.0%, the best after 1 with 30.0%"
    (line,) = had(results(0.1), config(samples=2, temperature=1.0))
    assert line == "evaluations so far: 1, none as [eval] is now: they do not count for the best checkpoint"
