"""Test `mgrpo migrate` on runs that version 0.1.0 made (fixtures/run-0.1.0.tar.gz), and that they go on after it.

The fixture holds two small runs, colocated and local, of two steps each: everything but the weights, in whose place the
tests put those of the toy model.
"""

from __future__ import annotations

import gzip
import json
import os
import sqlite3
import sys
import tarfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cases.launcher import Recording
from mgrpo.bench.postgres import PASSWORD
from mgrpo.engine.cli import main
from mgrpo.engine.cli.migrate import migrate
from mgrpo.engine.config.schema import load_config
from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.run.directory import RunPaths, checkpoints_in, locked
from mgrpo.engine.run.identity import read_identity
from mgrpo.engine.run.metrics import read_metrics
from mgrpo.engine.store import Store
from mgrpo.engine.store import migrate as steps
from mgrpo.engine.store.database import Database
from mgrpo.engine.store.open import open_store
from mgrpo.engine.training import colocated
from mgrpo.engine.training.leader import Leader
from toy import make_model

FIXTURE = Path(__file__).parent / "fixtures" / "run-0.1.0.tar.gz"
SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Return a folder with both runs, with stand-ins for the weights."""
    with tarfile.open(FIXTURE) as tar:
        tar.extractall(tmp_path, filter="data")
    for file in [*tmp_path.rglob("*.json"), *tmp_path.rglob("*.toml")]:
        file.write_text(file.read_text().replace("@FOLDER@", str(tmp_path)))
    make_model(tmp_path / "model", num_key_value_heads=1, **SIZES)
    for manifest in tmp_path.rglob("manifest.json"):
        _fill(manifest.parent, load_config(tmp_path / "colocated"), manifest)
    return tmp_path


def _fill(checkpoint: Path, config: Any, manifest: Path) -> None:
    """Write weights and moments that have the sizes which the manifest names, as it knows nothing else of them."""
    for folder in (path.parent for path in checkpoint.rglob("policy.json")):
        weights = Policy(folder.name, config.agents[folder.name], config.compute).masters.weights
        tensors = {name: weight.detach().clone() for name, weight in weights.items()}
        moments = {
            f"{key}/{name}": torch.zeros_like(w) for key in ("exp_avg", "exp_avg_sq") for name, w in tensors.items()
        }
        moments |= {f"step/{name}": torch.tensor(2.0) for name in tensors}
        save_file(tensors, folder / "weights.safetensors")
        save_file(moments, folder / "moments.safetensors")
    for name, size in json.loads(manifest.read_text())["files"].items():
        assert (checkpoint / name).stat().st_size == size


def rows(url: str, sql: str) -> list[Any]:
    with closing(sqlite3.connect(url)) as db:
        return db.execute(sql).fetchall()


def test_an_old_store_is_refused_and_the_command_that_mends_it_is_named(made: Path, monkeypatch, capsys):
    for topology in ("colocated", "local"):
        monkeypatch.setattr(sys, "argv", ["mgrpo", "train", str(made / topology), "--resume", "--set", "steps=3"])
        with pytest.raises(SystemExit) as stop:
            main.main()
        assert stop.value.code == 1
        assert (
            "expected schema version 3, found [2]" in (told := capsys.readouterr().err) and "mgrpo migrate RUN" in told
        )


@pytest.mark.parametrize("topology", ["colocated", "local"])
def test_a_store_is_migrated_once_with_a_backup_and_again_without_harm(made: Path, topology: str):
    run = made / topology
    before = {table: rows(run / "store.db", f"select * from {table}") for table in ("queries", "rollouts", "calls")}
    told = migrate(run)
    assert "schema version 2 became 3" in told and f"has the id {read_identity(run)}" in told
    assert rows(run / "store-schema-2.db", "select version from schema_version") == [(2,)]
    again = migrate(run)
    assert "has schema version 3 already" in again and again.splitlines()[-1] == told.splitlines()[-1]
    with closing(open_store(load_config(run))) as store:
        assert store.identities.known() == (read_identity(run), str(run))
        assert store.audit.balance()["violations"] == dict.fromkeys(store.audit.balance()["violations"], 0)
    assert {table: rows(run / "store.db", f"select * from {table}") for table in before} == before
    assert set(rows(run / "store.db", "select trained from groups")) == {(-1,)}


@pytest.mark.parametrize("last", ["backup", "table", "step"])
def test_a_migration_that_is_killed_is_run_again(made: Path, monkeypatch, last: str):
    run = made / "local"
    ends: dict[str, Callable[[], Any]] = {
        "backup": lambda: monkeypatch.setattr(steps, "replacing", lambda *_, **__: os._exit(9)),
        "table": lambda: monkeypatch.setattr(steps.secrets, "token_hex", lambda _: os._exit(9)),
        "step": lambda: monkeypatch.setattr(Database, "close", lambda _: os._exit(9)),
    }
    if not (child := os.fork()):
        ends[last]()
        migrate(run)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    found = rows(run / "store.db", "select version from schema_version")
    assert found == [(3 if last == "step" else 2,)]
    if last != "step":
        assert "trained" not in {column for _, column, *_ in rows(run / "store.db", "pragma table_info(groups)")}
    migrate(run)
    assert rows(run / "store.db", "select version from schema_version") == [(3,)]
    assert rows(run / "store-schema-2.db", "select version from schema_version") == [(2,)]


def test_a_run_at_work_is_left_alone(made: Path):
    run = made / "local"
    with closing(locked(RunPaths(run).lock)), pytest.raises(ValueError, match="is in use by process"):
        migrate(run)
    with closing(sqlite3.connect(run / "store.db")) as db:
        db.execute("insert into roles values ('local', 'trainer:main', 'host', ?)", [time.time() + 600])
        db.commit()
    with pytest.raises(
        ValueError, match=r"migrate: run 'local' in this store is at work \(trainer:main\): stop it first"
    ):
        migrate(run)
    assert rows(run / "store.db", "select version from schema_version") == [(2,)]
    with closing(sqlite3.connect(run / "store.db")) as db:
        db.execute("update roles set deadline = ?", [time.time() + 1e6])  # the clock was ahead when the run died
        db.commit()
    assert "schema version 2 became 3" in migrate(run)


def test_a_backup_is_of_what_was_there_at_the_last_attempt_and_for_this_user_alone(made: Path, monkeypatch):
    run = made / "local"
    monkeypatch.setitem(steps.STEPS, 2, lambda _: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="the disk is full"):
        migrate(run)
    monkeypatch.undo()
    with closing(sqlite3.connect(run / "store.db")) as db:
        db.execute("insert into roles values ('local', 'later', 'host', 0.0)")
        db.commit()
    migrate(run)
    backup = run / "store-schema-2.db"
    assert rows(backup, "select role from roles where role = 'later'") == [("later",)]
    assert backup.stat().st_mode & 0o777 == 0o600


def test_a_backup_is_no_copy_of_what_a_faster_process_made(made: Path, monkeypatch):
    run, copy = made / "local", steps._copy
    (run / "store-schema-2.db").write_text("an earlier backup")

    def late(source: str, aside: Path) -> None:
        with closing(sqlite3.connect(source)) as db:
            db.execute("update schema_version set version = 3")
            db.commit()
        copy(source, aside)

    monkeypatch.setattr(steps, "_copy", late)
    with pytest.raises(ValueError, match="was migrated by another process meanwhile: call it again"):
        migrate(run)
    assert (run / "store-schema-2.db").read_text() == "an earlier backup"


def test_a_store_of_a_version_that_nobody_knows_is_refused(made: Path):
    with closing(sqlite3.connect(made / "local/store.db")) as db:
        db.execute("update schema_version set version = 1")
        db.commit()
    with pytest.raises(ValueError, match=r"schema version 1 found: expected one of \[2, 3\]: begin a new run"):
        migrate(made / "local")


def test_a_shared_server_is_migrated_with_all_its_runs(server, tmp_path: Path):
    url = server.create()
    for name in ("a", "b"):
        with closing(Store(url, name, password=PASSWORD)) as store:
            store.roles.begin_run(["main"], 2, "print")
            store.queries.open([(0, "t")], ["main"], 2, 0)
    with closing(Database(url, "a", password=PASSWORD)) as database, database.engine.begin() as db:
        for statement in ("ALTER TABLE groups DROP COLUMN trained", "DROP TABLE identities"):
            db.exec_driver_sql(statement)
        db.exec_driver_sql("UPDATE schema_version SET version = 2")
    for told in ("schema version 2 became 3", "has schema version 3 already"):
        with closing(Database(url, "a", password=PASSWORD, migrating=True)) as database:
            assert told in steps.migrate(database, tmp_path)
    with gzip.open(tmp_path / "store-schema-2.jsonl.gz", "rt") as lines:
        assert {json.loads(line)["table"] for line in lines} == {"runs", "queries", "groups", "schema_version"}
    for name in ("a", "b"):
        with closing(Store(url, name, password=PASSWORD)) as store:
            known = store.identities.known()
            assert known is not None and known[1] == "" and store.audit.balance()["queries"] == 1


def test_a_colocated_run_goes_on_after_it(made: Path):
    migrate(made / "colocated")
    colocated.train(load_config(made / "colocated", ["steps=3"]), True, Recording())
    steps_made = [row["step"] for row in read_metrics(made / "colocated/metrics.jsonl") if "main/grad_norm" in row]
    assert steps_made == [0, 1, 2]


def test_a_trainer_of_a_local_run_finds_its_checkpoint_and_its_groups(made: Path):
    run = made / "local"
    migrate(run)
    with Leader(load_config(run), "main", lambda: False) as leader:
        leader.resume(leader.latest())
        states = leader.store.audit.status()["agents"]["main"]
        assert (leader.groups, states["acked"], states["leased"]) == (4, 4, 0)


def test_an_old_run_cannot_go_back_to_an_earlier_checkpoint_and_says_so(made: Path):
    run = made / "local"
    migrate(run)
    with Leader(load_config(run), "main", lambda: False) as leader:
        (last,) = checkpoints_in(run / "agents/main/checkpoints")
        state = json.loads((last / "state.json").read_text()) | {"step": 1, "groups": 2, "unacked": []}
        saved = leader.latest()
        earlier = type(saved)(
            **{**{f: getattr(saved, f) for f in saved.__struct_fields__}, **state, "folder": str(last)}
        )
        with pytest.raises(ValueError, match=r"was trained on 2 groups in it, and the store has 4 as acked: .*0\.1\.0"):
            leader.resume(earlier)
