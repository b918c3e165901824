"""Run `mgrpo migrate`: bring a run that an earlier version made to what this version reads and writes."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from mgrpo.engine.config.resume import fingerprint
from mgrpo.engine.config.schema import Config, load_config
from mgrpo.engine.run.directory import RunPaths, locked
from mgrpo.engine.run.identity import keep_identity, read_identity
from mgrpo.engine.store import Store
from mgrpo.engine.store.database import Database, read_password
from mgrpo.engine.store.migrate import migrate as migrate_store
from mgrpo.engine.store.open import identify, location, open_store, sqlite_file


def migrate(target: Path) -> str:
    """Migrate a run and its store, and return lines that say what was done. Idempotent, also after it was killed.

    target: the run directory, or the TOML file of a cluster run. Raises ValueError if the run is at work or was made by
    a version that cannot be migrated.
    """
    config = load_config(target)
    paths = RunPaths(config.run_dir)
    if not paths.path.is_dir():
        raise ValueError(f"migrate: {paths.path} is not there: expected the directory of a run")
    with closing(locked(paths.lock)):
        lines = [_migrate_store(config, paths)]
        with closing(open_store(config)) as store:
            lines.append(_name(config, store))
            store.roles.renew(fingerprint(config))
        return "\n".join(lines)


def _migrate_store(config: Config, paths: RunPaths) -> str:
    url, name = location(config)
    if (file := sqlite_file(url)) is not None and not file.is_file():
        raise ValueError(f"migrate: {file} is not there: expected the store of the run in {paths.path}")
    own = url != config.store.url
    password = None if own else read_password(config.store.password_file)
    tls = "auto" if own else config.store.tls
    with closing(Database(url, name, password=password, tls=tls, migrating=True)) as database:
        return migrate_store(database, paths.path)


def _name(config: Config, store: Store) -> str:
    """Let directory and store agree on the run's id."""
    known, mine = store.identities.known(), read_identity(config.run_dir)
    if mine is None and known is not None and known[1] in ("", config.run_dir):
        keep_identity(config.run_dir, known[0])
    identify(store, config)
    return f"run {store.run!r} in {config.run_dir} has the id {read_identity(config.run_dir)}"
