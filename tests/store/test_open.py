"""Test where the store of a run is found, and copies of it for reading."""

from __future__ import annotations

from pathlib import Path

import pytest

from mgrpo.engine.config.schema import Config, parse_config
from mgrpo.engine.store.open import begin, location, open_copy, open_store, sqlite_file, sqlite_url


def config_of(folder: Path, **keys: object) -> Config:
    raw = {"run_dir": str(folder / "runs" / "a"), "environment": {"use": "e.py:E"}, "agents": {"main": {"model": "m"}}}
    return parse_config(raw | keys)


@pytest.mark.parametrize("topology", ["colocated", "local", "cluster"])
def test_without_a_url_it_is_a_file_of_the_run(tmp_path, topology):
    config = config_of(tmp_path, topology=topology)
    assert location(config) == (f"sqlite:///{tmp_path}/runs/a/store.db", topology)
    assert location(config, tmp_path / "moved")[0] == f"sqlite:///{tmp_path}/moved/store.db"


def test_in_a_shared_database_a_run_has_the_name_of_its_directory(tmp_path):
    config = config_of(tmp_path, topology="local", store={"url": "postgresql://me@host/runs"})
    assert location(config) == location(config, tmp_path / "moved") == ("postgresql://me@host/runs", "a")


def test_a_colocated_run_has_a_file_of_its_own_whatever_the_url(tmp_path):
    config = config_of(tmp_path, store={"url": "postgresql://me@host/runs"})
    assert location(config) == (f"sqlite:///{tmp_path}/runs/a/store.db", "colocated")
    (tmp_path / "runs" / "a").mkdir(parents=True)
    store = open_store(config)
    assert store.run == "colocated" and (tmp_path / "runs/a/store.db").is_file()
    store.close()


@pytest.mark.parametrize("name", ["store.db", "a b.db", "50%20.db", "é?.db"])
def test_a_sqlite_url_names_its_file(tmp_path, name):
    assert sqlite_file(sqlite_url(tmp_path / name)) == tmp_path / name
    assert sqlite_file("postgresql://me@host/store.db") is None


def test_a_copy_shows_what_the_store_holds_and_changes_nothing(tmp_path):
    config = config_of(tmp_path, topology="local")
    run = Path(config.run_dir)
    with pytest.raises(ValueError, match=r"RUN: .*expected a run directory with a store.db"), open_copy(config, run):
        pass
    run.mkdir(parents=True)
    store = open_store(config)
    begin(store, config)
    store.queries.open([(0, "t")], ["main"], 2, 0)
    with open_copy(config, run) as copy:
        assert copy.audit.status()["agents"]["main"]["open"] == 1
        copy.queries.open([(1, "t")], ["main"], 2, 0)
    assert store.audit.balance()["queries"] == 1
    store.close()


def test_a_file_that_must_be_there_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A relative URL names another file in each directory."""
    for name in "xy":
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        config = config_of(tmp_path, topology="local", store={"url": "sqlite:///store.db"})
        if name == "x":
            open_store(config).close()
            open_store(config, known=True).close()
    with pytest.raises(ValueError, match=r"store .*/y/store\.db: no such file, but checkpoints of run 'a' are in its"):
        open_store(config, known=True)
    assert (tmp_path / "x/store.db").exists() and not list((tmp_path / "y").iterdir())
