"""Tell apart what a database's errors mean: try again at once, wait for the server, or give up."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

import sqlalchemy as sa

CONFLICTS = ("40001", "40P01")  # serialization_failure, deadlock_detected: another transaction interfered
FULL = re.compile("too many clients|too many connections|connection slots are reserved")  # max_connections are open
# read_only_sql_transaction: after a failover the connection leads to a server that only follows;
# idle_in_transaction_session_timeout: this process was stopped within a transaction.
MOVED = ("25006", "25P03")
# What waiting does not mend. PostgreSQL gives no code for a connection that it refuses.
HOPELESS = re.compile(
    r"authentication failed|no password supplied|(?:database|role) \".*\" does not exist|no pg_hba\.conf entry"
    r"|certificate verify failed|root certificate file|does not match host name|does not support SSL"
)
WRITING = 120  # the byte of SQLite's shared memory file that a writing process has locked


def code(error: sa.exc.DBAPIError) -> str:
    """Return the SQLSTATE of an error of PostgreSQL, or "" if it has none."""
    return getattr(error.orig, "sqlstate", None) or ""


def is_conflict(error: sa.exc.DBAPIError) -> bool:
    """Return whether the transaction should be run again at once: others were in its way, or held all connections."""
    return code(error) in CONFLICTS or bool(FULL.search(str(error.orig)))


def is_outage(error: sa.exc.DBAPIError) -> bool:
    """Return whether the store cannot be read or written now, but perhaps later."""
    known = isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError)
    return known or error.connection_invalidated or code(error) in MOVED


def is_hopeless(error: sa.exc.DBAPIError) -> bool:
    """Return whether the server, at each of its addresses, refuses connections such as this one."""
    attempts = str(error.orig).split("\n- ")  # of several addresses; before the first, how many there were
    return all(map(HOPELESS.search, attempts[1:] or attempts))


def reason(error: sa.exc.DBAPIError, file: str) -> str:
    """Describe an error in one line. file: of a SQLite database, whose lock another process may hold."""
    said = " ".join(str(error.orig).split())
    return said + (_writer(file) if "is locked" in said else "")


def _writer(file: str) -> str:
    """Describe the process that holds the lock of a SQLite file; "" if the kernel does not tell or it was released.

    A process that is stopped within a transaction (SIGSTOP, a debugger) holds the lock until it continues.
    """
    with suppress(OSError):
        lock = rf"^\d+: POSIX +ADVISORY +WRITE (\d+) \w+:\w+:{os.stat(f'{file}-shm').st_ino} (\d+) (\d+)$"
        for pid, first, last in re.findall(lock, Path("/proc/locks").read_text(), re.MULTILINE):
            if int(first) <= WRITING <= int(last):
                state = re.search(r"(?m)^State:\s+\w \((.*)\)$", Path(f"/proc/{pid}/status").read_text())
                return f": process {pid} writes" + (f" ({state[1]})" if state else "")
    return ""
