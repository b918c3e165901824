"""Put the parts of the store side by side."""

from __future__ import annotations

from mgrpo.engine.store.audit import Audit
from mgrpo.engine.store.database import Database, Tls
from mgrpo.engine.store.groups import Groups
from mgrpo.engine.store.identities import Identities
from mgrpo.engine.store.queries import Queries
from mgrpo.engine.store.roles import Roles


class Store:
    """Open one run's part of the store at `url`. See `Database` for the arguments and for what is raised.

    queries: opened, leased to workers and recorded. groups: claimed by trainers and acked. roles: which process has
    which role, published weights and evaluations. identities: which run has which name. audit: states, invariants,
    garbage.

    Every method of a part is one transaction, may be called again, and locks in the order roles, queries, groups, each
    by number, and the run last, so that on PostgreSQL two transactions seldom wait for each other in a circle; if they
    do, one of them is tried again. Every method raises OSError if the store cannot be reached or written: then nothing
    has happened, or all of it, and the call can be repeated.
    """

    def __init__(self, url: str, run: str, *, password: str | None = None, tls: Tls = "auto") -> None:
        self.database = Database(url, run, password=password, tls=tls)
        self.roles, self.identities = Roles(self.database), Identities(self.database)
        self.queries = Queries(self.database, self.roles)
        self.groups = Groups(self.database, self.roles)
        self.audit = Audit(self.database, self.roles)

    @property
    def run(self) -> str:
        """The name of the run."""
        return self.database.run

    @property
    def name(self) -> str:
        """The URL of the store, without a password."""
        return self.database.name

    def close(self) -> None:
        """Close all connections."""
        self.database.close()
