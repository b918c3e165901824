"""Bring a store from an earlier schema to the present one: backup first, then one transaction, or nothing.

Version 2 is that of mgrpo 0.1.0. A store may hold several runs; all of them are migrated, and each gets an id, which
its directory takes over when `mgrpo migrate` is called for it.
"""

from __future__ import annotations

import gzip
import json
import os
import secrets
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import sqlalchemy as sa

from mgrpo.engine.store.database import CREATION, Database, at_work, clock
from mgrpo.engine.store.tables import OLDEST, SCHEMA_VERSION, UNKNOWN, identities, schema
from mgrpo.engine.system.files import open_private, replacing

LEASE = 3600.0  # seconds; of all runs in the store, whose own leases are not known here but are hardly longer


def migrate(database: Database, folder: Path) -> str:
    """Migrate the store, and return in words what was done. folder: where the backup is written. Idempotent.

    database: opened with any schema. Raises ValueError if its version cannot be migrated, or if a process of any run is
    at work; OSError if the store or the disk fails: the store is then as it was.
    """
    found = database.transact(_version, "read")
    if found == SCHEMA_VERSION:
        return f"store {database.name} has schema version {found} already"
    if found not in STEPS:
        raise ValueError(
            f"store {database.name}: schema version {found} found: expected one of {[*STEPS, SCHEMA_VERSION]}: begin a "
            "new run, or use the version of mgrpo that made it"
        )
    database.transact(_check_idle, "read")
    backup = _backup(database, folder, found)
    database.transact(_step, "write")
    return f"store {database.name}: schema version {found} became {SCHEMA_VERSION}; what was there is in {backup}"


def _step(db: sa.Connection) -> None:
    """Do the steps that are missing, all of them in this transaction."""
    if db.dialect.name == "postgresql":
        db.execute(sa.select(sa.func.pg_advisory_xact_lock(CREATION)))
    while (version := _version(db)) in STEPS:  # read again: another process may have been faster
        _check_idle(db)
        STEPS[version](db)
        db.execute(sa.update(schema).values(version=version + 1))


def _version(db: sa.Connection) -> int:
    versions = list(db.scalars(sa.select(schema.c.version))) if sa.inspect(db).has_table(schema.name) else []
    if len(versions) != 1:
        raise ValueError(f"store: expected one that mgrpo made, with a schema version, found {versions}")
    return versions[0]


def _check_idle(db: sa.Connection) -> None:
    if held := db.execute(at_work(clock(db.dialect.name), LEASE)).first():
        raise ValueError(f"migrate: run {held[0]!r} in this store is at work ({held[1]}): stop it first")


def _from_2(db: sa.Connection) -> None:
    """Add the ids of runs, and with which checkpoint a group was acked, which is not known of the old ones."""
    if not sa.inspect(db).has_table(identities.name):
        identities.create(db)
    if "trained" not in {column["name"] for column in sa.inspect(db).get_columns("groups")}:
        db.execute(sa.text(f"ALTER TABLE groups ADD COLUMN trained BIGINT NOT NULL DEFAULT {UNKNOWN}"))
    for (run,) in db.execute(sa.text("SELECT run FROM runs UNION SELECT run FROM queries")).all():
        db.execute(sa.insert(identities).values(run=run, id=secrets.token_hex(8), place="", tasks=""))


STEPS: dict[int, Callable[[sa.Connection], None]] = {OLDEST: _from_2}


def _backup(database: Database, folder: Path, version: int) -> Path:
    """Write a copy of a SQLite file, or every row of a server's tables as lines of JSON, for this user alone.

    An earlier backup is replaced: its migration failed, and the run may have gone on since. Raises ValueError if
    another process was faster, so that this may be a copy of what it made; then the earlier one stays.
    """
    url = database.engine.url
    is_file = url.drivername == "sqlite"
    path = folder / f"store-schema-{version}.{'db' if is_file else 'jsonl.gz'}"
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path, writer=f"{os.getpid()}-") as aside:
        os.close(open_private(aside, os.O_CREAT | os.O_WRONLY | os.O_TRUNC))
        if is_file:
            _copy(url.database or "", aside)
        else:
            database.transact(lambda db: _dump(db, aside), "read")
        if database.transact(_version, "read") != version:
            raise ValueError(f"migrate: store {database.name} was migrated by another process meanwhile: call it again")
    return path


def _copy(source: str, aside: Path) -> None:
    with (
        closing(sqlite3.connect(f"{Path(source).as_uri()}?mode=ro", uri=True, timeout=60)) as original,
        closing(sqlite3.connect(aside)) as copy,
    ):
        original.backup(copy)


def _dump(db: sa.Connection, aside: Path) -> None:
    with gzip.open(aside, "wt") as out:
        for name in sa.inspect(db).get_table_names():
            table = sa.Table(name, sa.MetaData(), autoload_with=db)
            for row in db.execute(sa.select(table).execution_options(yield_per=1000)).mappings():
                out.write(json.dumps({"table": name, **row}) + "\n")
