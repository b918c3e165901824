"""Test `mgrpo bench store`: a tiny run ends in the line of JSON, and says why if there is no server; never a time."""

from __future__ import annotations

import json

import pytest

from mgrpo.bench.harness import Result
from mgrpo.bench.store import run as bench
from mgrpo.bench.store import trainer
from mgrpo.engine.store import Store


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(bench, "QUICK_SCALING", (1, 2))
    monkeypatch.setattr(bench, "QUICK_SECONDS", 0.2)
    monkeypatch.setattr(trainer, "measure", lambda quick: [Result("trainer", 1.0, "s")])
    monkeypatch.setattr(bench, "TARGETS", {("sqlite", 2): 1e9, ("postgresql", 2): 1.0})


def line(capsys) -> dict:
    bench.main(quick=True)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_both_databases_are_measured_against_their_targets(tiny, capsys, server):
    found = line(capsys)
    assert found["bench"] == "store"
    results = {result["name"]: result for result in found["results"]}
    assert len(results) == 9 and all(result["value"] > 0 for result in results.values())
    assert results["sqlite, 2 workers: rollouts taken and recorded"]["met"] is False
    assert results["postgresql, 2 workers: rollouts taken and recorded"]["met"] is True
    assert results["postgresql, 1 workers: rollouts taken and recorded"]["target"] is None


def test_without_a_server_it_says_so(tiny, capsys, monkeypatch):
    monkeypatch.setattr(bench, "why_not", lambda: "no server")
    results = {result["name"]: result for result in line(capsys)["results"]}
    missing = results["postgresql, 2 workers: rollouts taken and recorded"]
    assert (missing["value"], missing["met"], missing["why"]) == (None, None, "no server")


def test_what_is_measured_is_what_a_run_does(tmp_path):
    """Check that a worker's batches complete its queries, and that the trainers' side returns what was recorded."""
    url = f"sqlite:///{tmp_path}/store.db"
    store = Store(url, bench.begin(url))
    assert bench.sample(store)[0] == bench.QUERIES * bench.ROLLOUTS
    books = store.audit.balance()
    assert books["calls"] == 3 * books["rollouts"] == 3 * bench.QUERIES * bench.ROLLOUTS
    assert books["agents"]["main"]["sealed"] == bench.QUERIES
    store.roles.publish(
        bench.Publication(agent="main", step=1, version=1, trained=99, file="", checksum="", size=0), "bench"
    )
    done = bench.work(store, bench.Task("groups", url, store.run, bench.time.time(), 60))
    assert done.operations == store.audit.balance()["agents"]["main"]["acked"] == bench.QUERIES
    assert not any(store.audit.balance()["violations"].values())
