"""Make two hosts of network namespaces on this machine, with a cable between them and PostgreSQL on the first."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mgrpo.bench.postgres import Cluster

HERE, THERE = "10.213.77.1", "10.213.77.2"
CLONE_NEWNET = 0x40000000


class Hosts:
    """Two hosts: while they are open, this thread and the processes that it starts are on the first."""

    def __init__(self) -> None:
        self.names = [f"mgrpo-{os.getpid()}-{which}" for which in "ab"]

    def open(self) -> None:
        """Create both hosts and enter the first. Raises CalledProcessError or OSError if that is not allowed here."""
        for name in self.names:
            self._ip("netns", "add", name)
        self._ip(
            "link", "add", "cable", "netns", self.names[0], "type", "veth", "peer", "cable", "netns", self.names[1]
        )
        for name, address in zip(self.names, (HERE, THERE), strict=True):
            self._ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for link in ("lo", "cable"):
                self._ip("-n", name, "link", "set", link, "up")
        self.home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        _enter(f"/run/netns/{self.names[0]}")

    def close(self) -> None:
        """Return to this machine's own network and delete both hosts."""
        if hasattr(self, "home"):
            _enter(f"/proc/self/fd/{self.home}")
            os.close(self.home)
        for name in self.names:
            with suppress(subprocess.CalledProcessError, FileNotFoundError):
                self._ip("netns", "delete", name)

    def on_the_second(self) -> list[str]:
        """Return the words that run the command after them on the second host."""
        return ["ip", "netns", "exec", self.names[1]]

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Disconnect the hosts for a while."""
        self._ip("-n", self.names[1], "link", "set", "cable", "down")
        yield
        self._ip("-n", self.names[1], "link", "set", "cable", "up")

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Server(Cluster):
    """A PostgreSQL server that the second host can reach."""

    listens = f"127.0.0.1, {HERE}"

    def start(self) -> None:
        with Path(self.data, "pg_hba.conf").open("a") as rules:
            rules.write(f"host{'ssl' if self.tls else ''} all all {THERE}/24 scram-sha-256\n")
        super().start()


def _enter(namespace: str) -> None:
    file = os.open(namespace, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(file, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns", namespace)
    finally:
        os.close(file)
