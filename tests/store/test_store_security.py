"""Test the secrets and the TLS of the store, what it refuses, and a server that is away for a while."""

from __future__ import annotations

import logging
import re
import signal
import time
import traceback
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import sqlalchemy as sa

from cases.store import AGENTS, episode
from mgrpo.bench.postgres import PASSWORD, Cluster
from mgrpo.engine.store import Store, database
from mgrpo.engine.store.database import read_password

SECRET = "hunter2-9f"
REMOTE = "postgresql://me@db.example.org/runs"


def texts(error: BaseException) -> str:
    """Return every text of an error that a log could show."""
    return "".join(traceback.format_exception(error)) + repr(error)


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://me:{SECRET}@db.example.org/runs",
        f"postgresql+psycopg://me:{SECRET}@/runs",
        f"postgresql://me@db.example.org/runs?password={SECRET}",
        f"postgresql://me@db.example.org/runs?sslpassword={SECRET}",
        f"postgresql://me@db.example.org/runs?passfile={SECRET}",
        f"postgresql://me:{SECRET}@db.example.org:port/runs",
        f"mysql://me:{SECRET}@db.example.org/runs",
        f"postgresql://me:{SECRET}@db.example.org",
        f"sqlite://me:{SECRET}@host/path",
    ],
)
def test_a_url_with_a_password_is_refused_and_not_repeated(url):
    with pytest.raises(ValueError, match=r"^store: ") as error:
        Store(url, "run")
    assert SECRET not in texts(error.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql://me@host/runs?sslmode=disable", r"url option 'sslmode' given: expected one of \['host', 'port'"),
        ("postgresql://me@host/runs?options=-csearch_path%3Devil", "url option 'options' given"),
        ("postgresql://me@host", "expected the database's name in the url"),
        ("sqlite:////tmp/x.db?mode=memory", "expected 'sqlite:///' and the path of a file"),
        ("postgresql://me@host:port/runs", "the url cannot be parsed"),
    ],
)
def test_urls_that_would_loosen_something_are_refused(url, message):
    with pytest.raises(ValueError, match=message):
        Store(url, "run")


def test_the_password_comes_from_the_environment_or_a_private_file(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("MGRPO_STORE_PASSWORD", raising=False)
    file = tmp_path / "password"
    file.write_text(f"{SECRET}\n")
    file.chmod(0o600)
    assert (read_password(), read_password(str(file))) == (None, SECRET)
    monkeypatch.setenv("MGRPO_STORE_PASSWORD", "other")
    assert read_password() == read_password(str(file)) == "other"
    monkeypatch.delenv("MGRPO_STORE_PASSWORD")
    file.chmod(0o604)
    with pytest.raises(ValueError, match=r"store\.password_file: .*others may not read") as error:
        read_password(str(file))
    assert SECRET not in texts(error.value)
    latin = tmp_path / "latin"
    latin.write_bytes("pässword\n".encode("latin-1"))
    latin.chmod(0o600)
    with pytest.raises(ValueError, match=r"store\.password_file: .*/latin: expected text in UTF-8") as error:
        read_password(str(latin))
    assert "ssword" not in repr(error.value.__cause__) and error.value.__suppress_context__
    with pytest.raises(ValueError, match=r"store\.password_file: .*/nowhere: cannot be read: No such file"):
        read_password(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("postgresql://me@/runs", True),
        ("postgresql://me@localhost/runs", True),
        ("postgresql://me@127.8.0.1/runs", True),
        ("postgresql://me@[::1]/runs", True),
        ("postgresql://me@/runs?host=/run/postgresql", True),
        ("postgresql://me@/runs?host=db.example.org", False),
        ("postgresql://me@/runs?host=localhost,db.example.org", False),
        ("postgresql://me@/runs?host=localhost&host=db.example.org", False),
        ("postgresql://me@localhost.example.org/runs", False),
        ("postgresql://me@10.0.0.7/runs", False),
        ("postgresql://me@[2001:db8::1]/runs", False),
    ],
)
def test_tls_is_on_for_every_host_that_is_not_this_machine(url, local, monkeypatch, tmp_path):
    for name in ("PGHOST", "PGHOSTADDR", "PGSERVICE", "PGSSLROOTCERT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    parsed = database._parse(url)
    assert database._tls(parsed, "auto") == ({} if local else {"sslmode": "require"})
    assert database._tls(parsed, "require") == {"sslmode": "require"}
    assert database._tls(parsed, "off") == {"sslmode": "disable"}
    monkeypatch.setenv("PGSSLROOTCERT", "/etc/ca.pem")
    assert database._tls(parsed, "auto") == ({} if local else {"sslmode": "verify-full"})


@pytest.mark.parametrize(
    ("name", "value"), [("PGHOST", "db.example.org"), ("PGHOSTADDR", "10.0.0.7"), ("PGSERVICE", "x")]
)
def test_a_host_that_the_environment_names_is_no_way_around_tls(name, value, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(name, value)
    assert database._tls(database._parse("postgresql://me@/runs"), "auto") == {"sslmode": "require"}


def test_a_certificate_that_is_given_is_verified(server: Cluster, monkeypatch):
    if not server.tls:
        pytest.skip("no openssl to make a certificate with, or a server without TLS")
    url = server.url("postgres", "127.0.0.1")
    store = Store(url, "run", password=PASSWORD, tls="require")
    with store.database.engine.begin() as db:
        assert db.exec_driver_sql("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()").scalar() is True
    store.close()
    monkeypatch.setenv("PGSSLROOTCERT", str(server.folder / "tls.crt"))
    Store(url, "run", password=PASSWORD, tls="require").close()
    with pytest.raises(ValueError, match="certificate"):  # it was issued for another name
        Store(url.replace("127.0.0.1", "localhost"), "run", password=PASSWORD, tls="require")


def test_the_password_is_in_no_message_log_or_representation(server: Cluster, caplog):
    caplog.set_level(logging.DEBUG)
    with pytest.raises(ValueError, match=r"store postgresql.*password authentication failed") as error:
        Store(server.create(), "run", password=SECRET)
    store = Store(server.create(), "run", password=PASSWORD)
    store.queries.open([(0, "t")], AGENTS, 2, 0)
    told = texts(error.value) + repr(vars(store.database)) + str(store.database.engine.url) + store.name + caplog.text
    assert SECRET not in told and PASSWORD not in told
    store.close()


def test_hostile_names_are_only_data(connect):
    name = "x'; DROP TABLE groups; --\"%s :run {}"
    store = connect(name)
    store.roles.begin_run([name], 2, name)
    store.roles.hold(f"trainer:{name}", name, 60)
    store.queries.open([(0, name)], [name], 1, 0)
    ended, _ = episode(0, 0)
    store.queries.record(ended, [])
    (group,) = store.groups.claim(name, 1, name).groups
    assert group.task == name and store.audit.status()["agents"][name]["leased"] == 1


# ---- a server that is away


def test_a_lost_server_is_an_oserror_until_it_is_back(server: Cluster):
    store = Store(server.create(), "run", password=PASSWORD)
    store.queries.open([(0, "t")], AGENTS, 2, 0)
    for how in (signal.SIGINT, signal.SIGQUIT):
        server.stop(how)
        try:
            for _ in range(2):
                with pytest.raises(OSError, match=r"store postgresql\+psycopg://mgrpo@/test_") as error:
                    store.queries.record(*episode(0, 0))
                assert PASSWORD not in texts(error.value) and "\n" not in str(error.value)
        finally:
            server.start()
        assert store.audit.status()["agents"]["main"]["open"] == 1
    store.queries.record(*episode(0, 0))
    assert len(store.groups.rollouts_of(0)) == 1
    store.close()


def test_a_server_that_only_follows_is_an_oserror_until_it_leads(server: Cluster):
    """After a failover an open connection leads to the old server, which reads but does not write."""
    url = server.create()
    store = Store(url, "run", password=PASSWORD)
    store.queries.open([(0, "t")], AGENTS, 2, 0)
    (name,) = re.findall(r"test_\w+", url)
    with server.connect() as admin:
        for mode, reason in (("on", "read-only"), ("off", "")):
            admin.execute(sa.text(f"ALTER DATABASE {name} SET default_transaction_read_only = {mode}"))
            if mode == "on":  # as in the session that is open already
                with store.database.engine.connect() as db:
                    db.exec_driver_sql("SET default_transaction_read_only = on")
                    db.commit()
                for _ in range(2):  # first by that session, then by one that finds no server that leads
                    with pytest.raises(OSError, match=reason):
                        store.queries.record(*episode(0, 0))
    store.queries.record(*episode(0, 0))
    store.close()


def test_64_workers_fit_the_connections_of_a_server_as_it_is_installed(server: Cluster):
    """Each needs two at once for a moment, for its loop and its heartbeat, but keeps one."""
    url, stores = server.create(), list[Store]()
    with server.connect() as admin:
        for _ in range(64):
            stores.append(Store(url, "run", password=PASSWORD))
            with stores[-1].database.engine.connect(), stores[-1].database.engine.connect():
                pass
        count = sa.text("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'mgrpo'")
        while admin.scalar(count) != 64:  # the server takes a moment to end those that were closed
            time.sleep(0.05)
    for store in stores:
        store.close()


def test_a_full_server_is_waited_for_and_then_an_oserror(server: Cluster, monkeypatch):
    store = Store(server.create(), "run", password=PASSWORD)
    store.close()
    with ExitStack() as others:
        with suppress(sa.exc.OperationalError):
            while True:
                others.enter_context(server.connect("postgres"))
        pauses: list[float] = []
        monkeypatch.setattr(database.time, "sleep", pauses.append)
        with pytest.raises(OSError, match=r"too many clients|slots are reserved"):
            store.audit.runs()
        assert len(pauses) == database.ATTEMPTS - 1
        monkeypatch.setattr(database.time, "sleep", lambda seconds: others.close())
        assert store.audit.runs() == [], "it waited until there was room"
    store.close()


def test_deadlocks_are_tried_again_and_then_given_up(server: Cluster, monkeypatch):
    store = Store(server.create(), "run", password=PASSWORD)
    runs: list[int] = []

    def work(db: sa.Connection) -> int:
        runs.append(len(runs))
        if len(runs) % 5:
            db.exec_driver_sql("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = 'deadlock_detected'; END $$")
        return len(runs)

    assert store.database.transact(work, "write") == 5
    monkeypatch.setattr(database, "ATTEMPTS", 3)
    with pytest.raises(OSError, match="store postgresql"):
        store.database.transact(work, "write")
    assert len(runs) == 8
    store.close()
