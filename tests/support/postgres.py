"""The tests' PostgreSQL server, and a new database of either kind for a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mgrpo.bench.postgres import PASSWORD, Cluster, why_not
from mgrpo.engine.store import Store

Connect = Callable[..., Store]


@pytest.fixture(scope="session")
def server() -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    cluster = Cluster()
    yield cluster
    cluster.remove()


@pytest.fixture(params=["sqlite", "postgresql"])
def connect(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Connect]:
    """Open the same new database for a run, as often as the test calls it; once of each kind."""
    url = f"sqlite:///{tmp_path}/store.db" if request.param == "sqlite" else request.getfixturevalue("server").create()
    opened: list[Store] = []

    def open_store(run: str = "run") -> Store:
        opened.append(Store(url, run, password=PASSWORD))
        return opened[-1]

    yield open_store
    for store in opened:
        store.close()
