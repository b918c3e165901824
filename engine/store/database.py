"""Opening the store's database, and its transactions: all of it or nothing, tried again when another came between.

SQLite (WAL, synchronous = FULL; a write takes the only lock when it begins) for the processes of one machine,
PostgreSQL for many. Deadlines are compared on the database's own clock: the machines' clocks may differ.

A password comes beside the URL, never in it, and stands in no message. PostgreSQL on another machine is spoken to by
TLS unless that is turned off, and its certificate verified where a root certificate is given as libpq takes it.
"""

from __future__ import annotations

import errno
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, wraps
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from mgrpo.engine.store.tables import SCHEMA_VERSION, metadata, schema

PASSWORD = "MGRPO_STORE_PASSWORD"
ATTEMPTS = 8
RETRIED = ("40001", "40P01")  # serialization_failure, deadlock_detected
LOCKED = 60.0  # seconds that SQLite waits for its lock, before whoever called may try again
WRITING = 120  # the byte of SQLite's shared memory file that whoever writes has locked
CREATION = 7239540712  # advisory lock: of several processes that find no tables one creates them
URL_OPTIONS = {"host", "port", "sslrootcert"}
PATIENCE = {  # seconds; a server behind a cut link must not hold us for the hours that TCP would
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,  # this one in milliseconds
}
# Nor may a process that was stopped within a transaction hold its locks for ever.
SESSION = "-c idle_in_transaction_session_timeout=60s -c lock_timeout=60s"

Tls = Literal["auto", "require", "off"]
P = ParamSpec("P")
R = TypeVar("R")
D = TypeVar("D", bound="Database")


class Database:
    """One run's rows in the database at `url`. May be shared by threads, and used by many processes at once.

    url: `sqlite:///path` or `postgresql://user@host/database`. Raises ValueError for another kind of URL, one with a
    password, a missing directory or a store of another schema version; OSError when the server cannot be reached.
    """

    def __init__(self, url: str, run: str, *, password: str | None = None, tls: Tls = "auto") -> None:
        self.run = run
        parsed = _parse(url)
        self.name = parsed.render_as_string(hide_password=True)
        self._engine = _engine(parsed, password, tls)
        self.now: sa.ColumnElement[float] = _clock(self._engine.dialect.name)
        self._insert: Any = {"sqlite": sqlite, "postgresql": postgresql}[self._engine.dialect.name].insert
        try:
            versions = self._run(self._create, "write")
        except OSError:
            self.close()
            raise
        if versions != [SCHEMA_VERSION]:
            self.close()
            raise ValueError(
                f"store {self.name}: expected schema version {SCHEMA_VERSION}, found {versions}: "
                "another version of mgrpo began it; go on with that one, or begin a new run"
            )

    def close(self) -> None:
        self._engine.dispose()

    def _create(self, db: sa.Connection) -> list[int]:
        """The schema versions found, or made."""
        if db.dialect.name == "postgresql":
            db.execute(sa.select(sa.func.pg_advisory_xact_lock(CREATION)))
        if not sa.inspect(db).has_table(schema.name):
            metadata.create_all(db)
            db.execute(sa.insert(schema).values(version=SCHEMA_VERSION))
        return list(db.scalars(sa.select(schema.c.version)))

    def _of(self, table: sa.Table, *conditions: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
        return sa.and_(table.c.run == self.run, *conditions)

    def _insert_rows(self, db: sa.Connection, table: sa.Table, rows: Sequence[tuple[Any, ...]]) -> None:
        """Rows with all the table's columns, in their order; those that are there already stay as they are."""
        if not rows:
            return
        if db.dialect.name == "sqlite":
            db.exec_driver_sql(_insert_text(table), list(rows))
        else:
            db.execute(
                _insert_arrays(table), dict(zip(table.c.keys(), map(list, zip(*rows, strict=True)), strict=True))
            )

    def _run(self, work: Callable[[sa.Connection], R], mode: Literal["read", "write"]) -> R:
        """What `work` returns, after its transaction. Raises OSError when the store cannot be read or written."""
        attempt = 1
        while True:
            try:
                with self._engine.connect() as connection:
                    db = _reading(connection) if mode == "read" else connection
                    with db.begin():
                        return work(db)
            except sa.exc.DBAPIError as error:
                if getattr(error.orig, "sqlstate", None) in RETRIED and attempt < ATTEMPTS:
                    time.sleep(random.uniform(0, 0.01 * 2**attempt))
                    attempt += 1
                elif error.connection_invalidated or isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError):
                    reason = " ".join(str(error.orig).split())
                    who = _writer(self._engine.url.database or "") if "is locked" in reason else ""
                    raise OSError(errno.EIO, f"store {self.name}: {reason}{who}") from error
                else:
                    raise


def writes(method: Callable[Concatenate[D, sa.Connection, P], R]) -> Callable[Concatenate[D, P], R]:
    """Makes the method one transaction. It may run more than once: its arguments must not be used up by a run."""

    @wraps(method)
    def run(self: D, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._run(lambda db: method(self, db, *args, **kwargs), "write")

    return run


def reads(method: Callable[Concatenate[D, sa.Connection, P], R]) -> Callable[Concatenate[D, P], R]:
    """Makes the method one read-only transaction on one snapshot, which holds up no writer."""

    @wraps(method)
    def run(self: D, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._run(lambda db: method(self, db, *args, **kwargs), "read")

    return run


def read_password(file: str = "") -> str | None:
    """From the environment's MGRPO_STORE_PASSWORD, else the first line of the file, else None.

    Raises ValueError when the file cannot be read, or others may read it.
    """
    if PASSWORD in os.environ or not file:
        return os.environ.get(PASSWORD)
    path = Path(file)
    try:
        if path.stat().st_mode & 0o007:
            raise ValueError(f"store.password_file: {file}: expected a file that others may not read (chmod 600)")
        return path.read_text().partition("\n")[0]
    except OSError as error:
        raise ValueError(f"store.password_file: {file}: cannot be read: {error.strerror}") from error


def _parse(url: str) -> sa.URL:
    """The URL as SQLAlchemy takes it. What was given is not repeated unless it is known to hold no password."""
    kind = url.partition(":")[0]
    if kind not in ("sqlite", "postgresql", "postgresql+psycopg"):
        raise ValueError("store: expected a url that begins with 'sqlite:///' or 'postgresql://'")
    try:
        parsed = sa.make_url(url)
    except (ValueError, sa.exc.ArgumentError):
        raise ValueError(f"store: expected a url such as '{kind}://…', this one cannot be read") from None
    if parsed.password is not None or any("pass" in key for key in parsed.query):
        raise ValueError(f"store: the url holds a password: expected it in {PASSWORD} or store.password_file")
    return _sqlite_file(url, parsed) if kind == "sqlite" else _postgresql(parsed)


def _sqlite_file(url: str, parsed: sa.URL) -> sa.URL:
    if not url.startswith("sqlite:///") or parsed.database in (None, "", ":memory:") or parsed.query:
        raise ValueError(f"store: expected 'sqlite:///' and the path of a file, got {url!r}")
    directory = Path(parsed.database or "").parent
    if not directory.is_dir():
        raise ValueError(f"store: {url!r} is in a directory that does not exist: {directory}")
    return parsed


def _postgresql(parsed: sa.URL) -> sa.URL:
    if unknown := sorted(set(parsed.query) - URL_OPTIONS):
        raise ValueError(f"store: url option {unknown[0]!r} given: expected one of {sorted(URL_OPTIONS)}")
    if not parsed.database:
        raise ValueError("store: expected the database's name in the url, as in postgresql://user@host/database")
    return parsed.set(drivername="postgresql+psycopg")


def _engine(url: sa.URL, password: str | None, tls: Tls) -> sa.Engine:
    if url.drivername == "sqlite":
        engine = sa.create_engine(url, connect_args={"timeout": LOCKED})
        sa.event.listen(engine, "connect", _configure)
        sa.event.listen(engine, "begin", _begin)
        return engine
    secret = {} if password is None else {"password": password}
    arguments = PATIENCE | {"options": SESSION, "application_name": "mgrpo"} | _tls(url, tls) | secret
    try:
        return sa.create_engine(url, connect_args=arguments, hide_parameters=True)
    except ModuleNotFoundError as error:
        raise ValueError(f"store: PostgreSQL needs psycopg: pip install 'mgrpo[postgres]' ({error})") from error


def _tls(url: sa.URL, tls: Tls) -> dict[str, Any]:
    if tls == "off":
        return {"sslmode": "disable"}
    if tls == "auto" and all(map(_is_local, _hosts(url))):
        return {}
    default = Path.home() / ".postgresql" / "root.crt"  # where libpq looks by itself
    verified = "sslrootcert" in url.query or "PGSSLROOTCERT" in os.environ or default.is_file()
    return {"sslmode": "verify-full" if verified else "require"}


def _hosts(url: sa.URL) -> list[str]:
    """Every host that libpq may connect to, also those that the environment names."""
    query = url.query.get("host", ())
    named = [url.host or "", *([query] if isinstance(query, str) else query)]
    given = [host for host in named if host]
    if not given:  # a service's file may name any host
        given = ["a service's"] if "PGSERVICE" in os.environ else [os.environ.get("PGHOST", "")]
    given.append(os.environ.get("PGHOSTADDR", ""))
    return [part.strip() for host in given for part in host.split(",")]


def _is_local(host: str) -> bool:
    """Loopback, or a unix socket, which an empty name and a path stand for."""
    if host in ("", "localhost") or host.startswith(("/", "@")):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


@cache
def _insert_text(table: sa.Table) -> str:
    """For tuples, straight to the driver: SQLAlchemy's work on each row costs more than SQLite's."""
    return str(sqlite.insert(table).on_conflict_do_nothing().compile(dialect=sqlite.dialect()))


@cache
def _insert_arrays(table: sa.Table) -> postgresql.Insert:
    """One statement for all rows, which come as an array a column: a statement a row costs several times as much."""
    arrays = [sa.bindparam(column.name, type_=postgresql.ARRAY(column.type)) for column in table.c]
    rows = sa.func.unnest(*arrays).table_valued(*table.c.keys()).render_derived()
    return postgresql.insert(table).from_select(table.c.keys(), sa.select(*rows.c)).on_conflict_do_nothing()


def _clock(dialect: str) -> sa.ColumnElement[float]:
    """Seconds since 1970 by the database's clock."""
    if dialect == "sqlite":
        return sa.literal_column("(julianday('now') - 2440587.5) * 86400.0", sa.Double)
    return sa.literal_column("CAST(extract(epoch FROM clock_timestamp()) AS double precision)", sa.Double)


def _writer(file: str) -> str:
    """In words, which process holds the lock of a SQLite file; "" where no kernel tells, or nobody does any more.

    One that is stopped in a transaction (SIGSTOP, a debugger) holds it until it goes on, and nothing is lost by that.
    """
    with suppress(OSError):
        lock = rf"^\d+: POSIX +ADVISORY +WRITE (\d+) \w+:\w+:{os.stat(f'{file}-shm').st_ino} (\d+) (\d+)$"
        for pid, first, last in re.findall(lock, Path("/proc/locks").read_text(), re.MULTILINE):
            if int(first) <= WRITING <= int(last):
                state = re.search(r"(?m)^State:\s+\w \((.*)\)$", Path(f"/proc/{pid}/status").read_text())
                return f": process {pid} writes" + (f" ({state[1]})" if state else "")
    return ""


def _reading(connection: sa.Connection) -> sa.Connection:
    if connection.dialect.name == "sqlite":
        return connection.execution_options(mgrpo_reads=True)
    return connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)


def _configure(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # pysqlite would begin transactions late, and not before a SELECT
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")


def _begin(connection: sa.Connection) -> None:
    reads_only = connection.get_execution_options().get("mgrpo_reads")
    # A write that began without the lock and then asked for it would end in SQLITE_BUSY.
    connection.exec_driver_sql("BEGIN" if reads_only else "BEGIN IMMEDIATE")
