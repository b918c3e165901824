"""Test the trainer's part of `mgrpo bench store` with a toy model: it measures what a run does, with right sums."""

from __future__ import annotations

import math
import os
from contextlib import closing

import pytest

from mgrpo.bench.step.models import TINY
from mgrpo.bench.step.targets import Plan
from mgrpo.bench.store import trainer as bench
from mgrpo.bench.store.trainer import Parts
from mgrpo.engine.run.metrics import read_metrics
from mgrpo.engine.store.open import open_store

SIZES = {**TINY, "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
QUERIES = 3


@pytest.fixture
def case(tmp_path):
    return bench.make_case(Plan("a toy", SIZES, 512, QUERIES, 4, {"max_tokens": 128}, 0, 2), tmp_path)


def test_the_parts_of_a_step_are_those_of_a_run(case, tmp_path):
    steps = bench.steps_of(case, 2)
    assert len(steps) == 2
    for step in steps:
        # The last part is a remainder: it is positive only if the others do not overlap.
        assert all(math.isfinite(part) and part > 0 for part in step)
        assert step.step == pytest.approx(math.fsum(step[:5]))
        assert 0 < step.overhead < 100
    rows = read_metrics(tmp_path / "agents" / "main" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["tokens_trained"] > 0 and row["groups/expired"] == 0 for row in rows)
    assert [row["time/forward_backward"] for row in rows[1:]] == [pytest.approx(step.model) for step in steps]
    with closing(open_store(bench.run_of(case, 3))) as store:
        books, published = store.audit.balance(), store.roles.publications()["main"]
    assert books["agents"]["main"]["acked"] == books["queries"] == 3 * QUERIES
    assert not any(books["violations"].values())
    assert (published.step, published.version, len(published.probe)) == (3, 3, 31)
    assert (tmp_path / "weights" / published.file).stat().st_size == published.size


def test_medians_and_the_share_are_of_all_but_the_model():
    parts = [
        Parts(1.0, 1.0, 6.0, 1.0, 1.0, 50.0),
        Parts(0.0, 0.5, 9.5, 0.0, 0.0, 70.0),
        Parts(1.0, 2.0, 5.0, 1.0, 1.0, 60.0),
    ]
    results = bench.overhead("m", parts, 39.0)
    assert [result.value for result in results] == pytest.approx([10.0, 1.0, 1.0, 6.0, 1.0, 1.0, 60.0, 40.0])
    assert [result.met for result in results] == [None] * 7 + [False]
    assert bench.overhead("m", parts, 41.0)[-1].met


@pytest.mark.parametrize("ranks", bench.RANKS)
def test_ranks_share_a_step(case, ranks):
    seconds = bench.seconds_of(case, ranks, 1)
    assert len(seconds) == 1 and math.isfinite(seconds[0]) and seconds[0] > 0


def test_scaling_is_the_ratio_of_the_medians(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(bench, "seconds_of", lambda case, ranks, count: [9.0, 6.0 / ranks, 0.1])
    assert [result.value for result in bench.scaling("m", None, 3)] == [6.0, 3.0, 2.0]


def test_two_ranks_do_not_share_a_core(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert [(r.value, r.why) for r in bench.scaling("m", None, 3)] == [(None, "1 core for 2 ranks")] * 3
