"""Know where the store of each run is: its URL, its password, and the name of the run in it."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import sqlalchemy as sa

from mgrpo.engine.config.resume import fingerprint
from mgrpo.engine.config.schema import Config
from mgrpo.engine.run.directory import RunPaths
from mgrpo.engine.run.identity import draw_identity
from mgrpo.engine.store.database import read_password
from mgrpo.engine.store.store import Store


def location(config: Config, run_dir: str | Path = "") -> tuple[str, str]:
    """Return the URL of a run's store, and the name of the run in it.

    A run with its own file is named after its topology; a colocated run always has one. In a database that several runs
    may share, a run is named after its run_dir. run_dir: where the run directory is now, if it was moved.
    """
    if config.colocated or not config.store.url:
        return sqlite_url(RunPaths(run_dir or config.run_dir).store), config.topology
    return config.store.url, Path(config.run_dir).name


def open_store(config: Config, *, known: bool = False) -> Store:
    """Open the store of a run, as each process of the run does. A SQLite file that is not there is made.

    known: it must be there, because checkpoints of the run are. Raises ValueError if it is not.
    """
    url, run = location(config)
    if known and (file := sqlite_file(url)) is not None and not file.exists():
        raise ValueError(
            f"store {file}: no such file, but checkpoints of run {run!r} are in its directory: expected the store that "
            "they were made with"
        )
    if url != config.store.url:
        return Store(url, run)
    return Store(url, run, password=read_password(config.store.password_file), tls=config.store.tls)


@contextmanager
def open_copy(config: Config, run_dir: Path) -> Iterator[Store]:
    """Open the store as it is now, for reading: a copy of it, if it is a SQLite file.

    Reading the file itself would block the writes of a training. Raises ValueError if there is no such file.
    """
    url, run = location(config, run_dir)
    source = sqlite_file(url)
    if source is None:
        with closing(open_store(config)) as store:
            yield store
        return
    if not source.is_file():
        raise ValueError(f"RUN: {run_dir} given: expected a run directory with a {source.name}")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "store.db"
        with (
            closing(sqlite3.connect(f"{source.as_uri()}?mode=ro", uri=True, timeout=60)) as original,
            closing(sqlite3.connect(target)) as copy,
        ):
            original.backup(copy)
        with closing(Store(sqlite_url(target), run)) as store:
            yield store


def begin(store: Store, config: Config, *, known: bool = False) -> None:
    """Create the run in its store, unless it is there. known: it must be there, because checkpoints of it are.

    Raises ValueError if it was created with another config, if it is missing, or if its name is that of another run.
    """
    identify(store, config, known=known)
    store.roles.begin_run(list(config.agents), config.algorithm.rollouts, fingerprint(config))


def identify(store: Store, config: Config, *, known: bool = False) -> None:
    """Take the run's name in its store for the id in its directory, which is drawn now if there is none.

    Raises ValueError as `Identities.take` does.
    """
    alone = config.topology == "local" and bool(config.store.url)
    run, lease = draw_identity(config.run_dir), config.store.lease
    store.identities.take(run, config.run_dir, lease, known=known, alone=alone)


def sqlite_url(file: Path) -> str:
    """Return the URL of a SQLite file."""
    return sa.URL.create("sqlite", database=str(file.absolute())).render_as_string()


def sqlite_file(url: str) -> Path | None:
    """Return the file of a SQLite URL, or None for the URL of a server."""
    return Path(sa.make_url(url).database or "").absolute() if url.startswith("sqlite:///") else None
