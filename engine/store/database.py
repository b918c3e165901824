"""Open the database of the store and run transactions: whole or not at all, and repeated if another one interfered.

SQLite (WAL, synchronous = FULL; a write takes the only lock when it begins) serves the processes of one machine,
PostgreSQL those of many. Deadlines are compared on the clock of the database, because the machines' clocks may differ.

A password is given beside the URL, never in it, and appears in no message. Connections to PostgreSQL on another machine
use TLS unless that is turned off, and the certificate is verified if a root certificate is given in libpq's way.
"""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable, Sequence
from functools import cache, wraps
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from mgrpo.engine.store.failures import MOVED, code, is_conflict, is_hopeless, is_outage, reason
from mgrpo.engine.store.tables import OLDEST, SCHEMA_VERSION, metadata, queries, roles, schema
from mgrpo.engine.system import secrets

PASSWORD = "MGRPO_STORE_PASSWORD"
AHEAD = 120.0  # seconds; a deadline that is later than by two leases and this was set by a clock that was ahead
ATTEMPTS = 8  # of a transaction that the database rolled back because of another one
LOCKED = 10.0  # seconds that SQLite waits for its lock before the call fails; meanwhile it hears no Ctrl-C
# Connections that a process keeps to PostgreSQL, and how many more it opens while its threads need them at once: 64
# workers then fit the 97 that a server has for us by default.
KEPT, MORE = 1, 4
CREATION = 7239540712  # advisory lock: only one of several processes that find no tables creates them
URL_OPTIONS = {"host", "port", "sslrootcert"}
TIMEOUTS = {  # seconds; without them TCP would wait for hours for a server behind a broken link
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,  # this one in milliseconds
}
LEADER = {"target_session_attrs": "read-write"}  # not a server that only follows another, as before or after a failover
# A process that was stopped within a transaction must not hold its locks forever either.
SESSION = "-c idle_in_transaction_session_timeout=60s -c lock_timeout=60s"

Tls = Literal["auto", "require", "off"]
P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound="Part")


class Database:
    """Run transactions on the rows of one run in the database at `url`. Threads may share it.

    url: `sqlite:///path` or `postgresql://user@host/database`. Raises ValueError for another kind of URL, one with a
    password, a missing directory, a store of another schema version or a password that the server does not accept;
    OSError if the server cannot be reached.
    migrating: take a store of any version as it is, and create no tables.
    """

    def __init__(
        self, url: str, run: str, *, password: str | None = None, tls: Tls = "auto", migrating: bool = False
    ) -> None:
        self.run = run
        self._reached = False  # whether the database has ever been opened
        parsed = _parse(url)
        self.name = parsed.render_as_string(hide_password=True)
        self.engine = _engine(parsed, password, tls)
        self.now: sa.ColumnElement[float] = clock(self.engine.dialect.name)
        self.insert: Any = {"sqlite": sqlite, "postgresql": postgresql}[self.engine.dialect.name].insert
        if not migrating:
            self._open()

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    def _open(self) -> None:
        try:
            versions = self.transact(self._create, "write")
        except (OSError, ValueError):
            self.close()
            raise
        if versions != [SCHEMA_VERSION]:
            self.close()
            older = len(versions) == 1 and OLDEST <= versions[0] < SCHEMA_VERSION
            how = "migrate it (`mgrpo migrate RUN`), or use" if older else "use"
            raise ValueError(
                f"store {self.name}: expected schema version {SCHEMA_VERSION}, found {versions}: "
                f"it was created by another version of mgrpo; {how} that version, or begin a new run"
            )

    def _create(self, db: sa.Connection) -> list[int]:
        """Create the tables if there are none, and return the schema versions found."""
        if db.dialect.name == "postgresql":
            db.execute(sa.select(sa.func.pg_advisory_xact_lock(CREATION)))
        if not sa.inspect(db).has_table(schema.name):
            metadata.create_all(db)
            db.execute(sa.insert(schema).values(version=SCHEMA_VERSION))
        return list(db.scalars(sa.select(schema.c.version)))

    def transact(self, work: Callable[[sa.Connection], R], mode: Literal["read", "write"]) -> R:
        """Return the result of `work`, run in a transaction. Raises OSError if the store cannot be read or written."""
        attempt = 1
        while True:
            try:
                with self.engine.connect() as connection:
                    db = _reading(connection) if mode == "read" else connection
                    with db.begin():
                        self._reached = True
                        return work(db)
            except sa.exc.DBAPIError as error:
                if is_conflict(error) and attempt < ATTEMPTS:
                    time.sleep(random.uniform(0, 0.01 * 2**attempt))
                    attempt += 1
                elif is_outage(error):
                    raise self._outage(error) from error
                else:
                    raise

    def _outage(self, error: sa.exc.DBAPIError) -> OSError | ValueError:
        """Describe an outage: by ValueError if there never was a connection, and the server will not grant one."""
        if code(error) in MOVED:
            self.engine.dispose()  # the next transaction looks for the server anew
        why = f"store {self.name}: {reason(error, self.engine.url.database or '')}"
        if not self._reached and is_hopeless(error):
            return ValueError(f"{why}: expected the url, user and password of a server that lets this process in")
        return OSError(errno.EIO, why)


class Part:
    """Serve as the base of the store's parts, whose methods are transactions on one database."""

    def __init__(self, database: Database) -> None:
        self.database = database

    @property
    def run(self) -> str:
        """The name of the run."""
        return self.database.run

    @property
    def now(self) -> sa.ColumnElement[float]:
        """The time on the clock of the database, in seconds since 1970."""
        return self.database.now

    def _of(self, table: sa.Table, *conditions: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
        """Restrict a table to the rows of this run for which the conditions hold."""
        return sa.and_(table.c.run == self.run, *conditions)

    def _insert(self, table: sa.Table) -> Any:
        return self.database.insert(table)

    def _insert_rows(self, db: sa.Connection, table: sa.Table, rows: Sequence[tuple[Any, ...]]) -> None:
        """Insert rows with all columns of the table, in its order. Rows that are there already stay unchanged."""
        if not rows:
            return
        if db.dialect.name == "sqlite":
            db.exec_driver_sql(_insert_text(table), list(rows))
        else:
            by_column = dict(zip(table.c.keys(), map(list, zip(*rows, strict=True)), strict=True))
            db.execute(_insert_arrays(table), by_column)


def writes(method: Callable[Concatenate[S, sa.Connection, P], R]) -> Callable[Concatenate[S, P], R]:
    """Run the method as one transaction. The method may run more than once, so it must not use up its arguments."""

    @wraps(method)
    def transaction(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.database.transact(lambda db: method(self, db, *args, **kwargs), "write")

    return transaction


def reads(method: Callable[Concatenate[S, sa.Connection, P], R]) -> Callable[Concatenate[S, P], R]:
    """Run the method as one read-only transaction on one snapshot, which blocks no writer."""

    @wraps(method)
    def transaction(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.database.transact(lambda db: method(self, db, *args, **kwargs), "read")

    return transaction


def read_password(file: str = "") -> str | None:
    """Return MGRPO_STORE_PASSWORD of the environment, else the first line of the file, else None.

    Raises ValueError if the file cannot be read, or if other users may read it.
    """
    given = secrets.get(PASSWORD)
    if given is not None or not file:
        return given
    path = Path(file)
    try:
        if path.stat().st_mode & 0o007:
            raise ValueError(f"store.password_file: {file}: expected a file that others may not read (chmod 600)")
        return path.read_text().partition("\n")[0]
    except OSError as error:
        raise ValueError(f"store.password_file: {file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ValueError(f"store.password_file: {file}: expected text in UTF-8") from None  # the error has the bytes


def _parse(url: str) -> sa.URL:
    """Parse a URL. Error messages do not repeat it unless it is known to hold no password."""
    kind = url.partition(":")[0]
    if kind not in ("sqlite", "postgresql", "postgresql+psycopg"):
        raise ValueError("store: expected a url that begins with 'sqlite:///' or 'postgresql://'")
    try:
        parsed = sa.make_url(url)
    except (ValueError, sa.exc.ArgumentError):
        raise ValueError(f"store: the url cannot be parsed: expected one such as '{kind}://…'") from None
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
    arguments = TIMEOUTS | LEADER | {"options": SESSION, "application_name": "mgrpo"} | _tls(url, tls) | secret
    try:
        return sa.create_engine(url, connect_args=arguments, hide_parameters=True, pool_size=KEPT, max_overflow=MORE)
    except ModuleNotFoundError as error:
        raise ValueError(f"store: PostgreSQL needs psycopg: pip install 'mgrpo[postgres]' ({error})") from error


def _tls(url: sa.URL, tls: Tls) -> dict[str, Any]:
    if tls == "off":
        return {"sslmode": "disable"}
    if tls == "auto" and all(map(_is_local, _hosts(url))):
        return {}
    default = Path.home() / ".postgresql" / "root.crt"  # libpq's default
    verified = "sslrootcert" in url.query or "PGSSLROOTCERT" in os.environ or default.is_file()
    return {"sslmode": "verify-full" if verified else "require"}


def _hosts(url: sa.URL) -> list[str]:
    """Return every host that libpq may connect to, including those that the environment names."""
    query = url.query.get("host", ())
    named = [url.host or "", *([query] if isinstance(query, str) else query)]
    given = [host for host in named if host]
    if not given:  # the file of a service may name any host
        given = ["a service's"] if "PGSERVICE" in os.environ else [os.environ.get("PGHOST", "")]
    given.append(os.environ.get("PGHOSTADDR", ""))
    return [part.strip() for host in given for part in host.split(",")]


def _is_local(host: str) -> bool:
    """Return whether the host is loopback or a unix socket (an empty name or a path)."""
    if host in ("", "localhost") or host.startswith(("/", "@")):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


@cache
def _insert_text(table: sa.Table) -> str:
    """Return SQL for the driver itself, which takes tuples: SQLAlchemy's work on each row costs more than SQLite's."""
    return str(sqlite.insert(table).on_conflict_do_nothing().compile(dialect=sqlite.dialect()))


@cache
def _insert_arrays(table: sa.Table) -> postgresql.Insert:
    """Build one statement for all rows, given as an array per column: a statement per row costs several times more."""
    arrays = [sa.bindparam(column.name, type_=postgresql.ARRAY(column.type)) for column in table.c]
    rows = sa.func.unnest(*arrays).table_valued(*table.c.keys()).render_derived()
    return postgresql.insert(table).from_select(table.c.keys(), sa.select(*rows.c)).on_conflict_do_nothing()


def clock(dialect: str) -> sa.ColumnElement[float]:
    """Return an expression for the seconds since 1970 on the clock of the database."""
    if dialect == "sqlite":
        return sa.literal_column("(julianday('now') - 2440587.5) * 86400.0", sa.Double)
    return sa.literal_column("CAST(extract(epoch FROM clock_timestamp()) AS double precision)", sa.Double)


def lapsed(deadline: sa.Column[Any], now: sa.ColumnElement[float], lease: Any) -> sa.ColumnElement[bool]:
    """Return whether a deadline has passed, or is so far ahead that the clock must have gone back since it was set.

    lease: the seconds for which it is set, as a number or a parameter. A living holder sets it anew long before it
    matters that the clock went back.
    """
    return sa.or_(deadline < now, deadline > now + 2 * lease + AHEAD)


def at_work(now: sa.ColumnElement[float], lease: float, run: str | None = None) -> sa.Executable:
    """Select run and name of each role that is held and of each worker that leases queries; run: only those of one.

    lease: as in `lapsed`.
    """

    def found(table: sa.Table, name: sa.Column[Any], *conditions: sa.ColumnElement[bool]) -> sa.Select[Any]:
        mine = () if run is None else (table.c.run == run,)
        alive = sa.not_(lapsed(table.c.deadline, now, lease))
        return sa.select(table.c.run, name.label("name")).where(*mine, *conditions, alive)

    return sa.union(
        found(roles, roles.c.role), found(queries, queries.c.worker, ~queries.c.sealed, queries.c.worker != "")
    ).order_by("run", "name")


def _reading(connection: sa.Connection) -> sa.Connection:
    if connection.dialect.name == "sqlite":
        return connection.execution_options(mgrpo_reads=True)
    return connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)


def _configure(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # otherwise pysqlite begins transactions late, and not before a SELECT
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")


def _begin(connection: sa.Connection) -> None:
    reads_only = connection.get_execution_options().get("mgrpo_reads")
    # A write that began without the lock and then asked for it would end in SQLITE_BUSY.
    connection.exec_driver_sql("BEGIN" if reads_only else "BEGIN IMMEDIATE")
