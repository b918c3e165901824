"""Test what an evaluation asks, and the numbers that it makes of what its episodes got."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from mgrpo.engine.config.schema import EvalConfig
from mgrpo.engine.environment.base import Environment
from mgrpo.engine.rollout.episodes import Job, Rollout
from mgrpo.engine.rollout.evaluation import Evaluation, SetOutcome, load_sets, powers
from mgrpo.engine.system.statistics import pass_at_k, wilson
from mgrpo.engine.types import MAIN, Call, Episode, Score, Task


def tasks(name: str, count: int) -> list[Task]:
    return [Task(f"{name} {i}", {}) for i in range(count)]


def rollout(job: Job, correct: float | None) -> Rollout:
    score = None if correct is None else Score(True, correct)
    status = "scored" if score else "failed"
    return Rollout(job, Episode(Call(MAIN, job.task)), status=status, score=score)


def outcome(*scores: list[float]) -> SetOutcome:
    """Return what tasks with these samples got."""
    found = SetOutcome([f"t{i}" for i in range(len(scores))])
    for place, samples in enumerate(scores):
        for number, correct in enumerate(samples):
            found.add(place, rollout(Job(place, number, Task(f"t{place}", {})), correct))
    return found


def test_the_plain_evaluation_has_the_metrics_of_one_greedy_answer_per_task():
    evaluation = Evaluation({"held_out": tasks("t", 5)}, EvalConfig(questions=4), seed=3)
    assert all(job.greedy and job.evaluated and job.temperature is None for job in evaluation.jobs)
    row = evaluation.row([rollout(job, score) for job, score in zip(evaluation.jobs, (1, 0, 1, None), strict=True)])
    low, high = wilson(2, 4)
    assert row == {
        "eval/held_out_accuracy": 0.5,
        "eval/low": low,
        "eval/high": high,
        "eval/questions": 4,
        "eval/failed": 1,
        "eval/calls_mean": 0.0,
    }


def test_several_sets_and_samples_are_summed_up_apart_and_the_first_is_the_score():
    settings = EvalConfig(sets=("nq", "held_out"), samples=4, temperature=0.7)
    evaluation = Evaluation({"nq": tasks("n", 3), "held_out": tasks("t", 2)}, settings, seed=0)
    assert len(evaluation.jobs) == 5 * 4 and {job.temperature for job in evaluation.jobs} == {0.7}
    assert not any(job.greedy for job in evaluation.jobs)
    right = {"n 0": 4, "n 1": 1, "n 2": 0, "t 0": 0, "t 1": 2}
    played = [rollout(job, float(job.rollout < right[job.task.id])) for job in evaluation.jobs]
    row = evaluation.row(list(reversed(played)))  # they end in any order
    assert row["eval/held_out_accuracy"] == row["eval/nq/avg@4"] == pytest.approx(5 / 12)
    assert row["eval/nq/pass@2"] == pytest.approx(np.mean([1.0, pass_at_k(4, 1, 2), 0.0]))
    assert row["eval/nq/pass@4"] == pytest.approx(2 / 3) and row["eval/held_out/pass@4"] == 0.5
    assert (row["eval/questions"], row["eval/samples"], row["eval/temperature"]) == (3, 4, 0.7)
    assert row["eval/nq/low"] <= row["eval/nq/avg@4"] <= row["eval/nq/high"]


def test_a_task_draws_the_same_numbers_beside_other_sets_and_another_set_others():
    one = Evaluation({"held_out": tasks("t", 6)}, EvalConfig(), 1).jobs
    both = Evaluation({"nq": tasks("t", 6), "held_out": tasks("t", 6)}, EvalConfig(sets=("nq", "held_out")), 1)
    mine = [job for job in both.jobs if job.query < 1 << 34]
    assert mine == one and {job.query for job in one}.isdisjoint(job.query for job in both.jobs if job not in mine)


def test_ragged_samples_are_averaged_by_task_and_count_for_the_k_that_they_have():
    found = outcome([1, 0, 0, 1], [1], [])
    assert found.by_task() == [0.5, 1.0, None]
    assert found.average().value == 0.75
    assert found.passed(1).value == 0.75
    assert found.passed(3).value == 1.0  # of the one task that has 3 samples
    with pytest.raises(ValueError, match="k = 5 given: expected 1 to 4, the number of samples of a task"):
        found.passed(5)


def test_an_empty_set_and_one_without_any_episode_are_refused():
    with pytest.raises(ValueError, match="no task has been asked"):
        outcome([], []).average()
    with pytest.raises(ValueError, match="k = 1 given: expected 1 to 0"):
        outcome().passed(1)


def test_one_task_has_a_mean_and_no_interval_of_several_samples():
    estimate = outcome([1, 0, 1, 1]).average()
    assert estimate.value == 0.75 and math.isnan(estimate.low) and math.isnan(estimate.high)


def test_equal_tasks_have_an_interval_with_a_width():
    assert outcome(*[[1, 1]] * 10).average().values == (1.0, *wilson(10, 10))
    assert outcome([1], [0], [0]).average().values == (pytest.approx(1 / 3), *wilson(1, 3))


def test_scores_between_0_and_1_have_a_mean_only():
    found = outcome([0.5, 1.0], [0.25, 0.0])
    assert not found.binary and found.average().value == 0.4375
    assert sorted(found.metrics(2)) == ["avg@2", "failed", "high", "low", "questions"]
    with pytest.raises(ValueError, match="pass@2: scores other than 0 and 1 found"):
        found.passed(2)
    assert outcome([-3.0], [5.0]).average().value == 1.0


def test_the_powers_of_two_and_the_number_of_samples_are_shown():
    assert [powers(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


class Careless(Environment):
    def tasks(self, split: str) -> Any:
        return tasks("train" if split == "train" else "held_out", 3)


def test_an_environment_that_takes_any_name_for_the_held_out_set_is_found_out():
    with pytest.raises(ValueError, match=r"'nq' and 'held_out' given: Careless.tasks returns the same tasks for both"):
        load_sets(Careless(), ["held_out", "nq"])
    assert list(load_sets(Careless(), ["held_out", "train"])) == ["held_out", "train"]
