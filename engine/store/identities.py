"""Know which run the rows of a name belong to: by an id, not by the name, which other runs may have too."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from mgrpo.engine.store.database import Part, at_work, reads, writes
from mgrpo.engine.store.tables import identities, metadata, queries, runs


class Identities(Part):
    """Let a run take its name in the store, and compare its tasks."""

    @writes
    def take(
        self, db: sa.Connection, id: str, place: str, lease: float, *, known: bool = False, alone: bool = False
    ) -> None:
        """Take the run's name for the run of this id, in the directory `place`. Idempotent.

        An earlier run of this directory, which was deleted since, gives its name up: its rows stay under its name and
        id. lease: the seconds for which the run's processes hold roles and queries. known: the run has been here
        before. alone: only one directory at a time may be at work on it. Raises ValueError if the name is that of
        another run, if a known run is not here, or if a copy of it is at work.
        """
        db.execute(sa.select(identities.c.run).where(self._of(identities)).with_for_update())
        found = self._found(db)
        if found is None:
            self._check_free(db, known)
        elif found.id != id:
            self._retire(db, found, id, place, lease)
        elif alone and found.place not in ("", place) and self._at_work(db, lease):
            raise ValueError(
                f"run_dir: {place} given: expected {found.place}, where the same run {id} is at work: was it copied?"
            )
        insert = self._insert(identities).values(run=self.run, id=id, place=place, tasks="")
        db.execute(insert.on_conflict_do_update(index_elements=["run"], set_={"place": place}))

    @writes
    def settle_tasks(self, db: sa.Connection, digest: str, *, anew: bool = False) -> None:
        """Note the digest of the tasks to train on, when the first process of a run has loaded them.

        anew: the run begins anew, so that any tasks will do. Raises ValueError if the run has others.
        """
        mine = self._of(identities)
        found = db.scalar(sa.select(identities.c.tasks).where(mine).with_for_update())
        if found == "" or (anew and found is not None):
            db.execute(sa.update(identities).where(mine).values(tasks=digest))
        elif found not in (None, digest):
            raise ValueError(
                f"environment: tasks('train') of run {self.run!r} has digest {digest}: expected {found}, as when the "
                "run was begun: the same ids with the same data in every process, in any order if each id is there once"
            )

    @reads
    def known(self, db: sa.Connection) -> tuple[str, str] | None:
        """Return the id and the directory of the run that has this name, or None if there is none."""
        found = self._found(db)
        return (found.id, found.place) if found else None

    # ---- within a transaction

    def _found(self, db: sa.Connection) -> Any:
        return db.execute(sa.select(identities).where(self._of(identities))).first()

    def _check_free(self, db: sa.Connection, known: bool) -> None:
        """Check that no rows are here that belong to a run without an id, and that the run's own rows are not lost."""
        if known:
            raise ValueError(
                f"store {self.database.name}: no run {self.run!r} in it, but checkpoints of it are in its directory: "
                "expected the store that they were made with"
            )
        for table in (runs, queries):
            if db.execute(sa.select(table.c.run).where(self._of(table)).limit(1)).first() is not None:
                raise ValueError(f"store {self.database.name}: run {self.run!r} has no id: run `mgrpo migrate RUN`")

    def _retire(self, db: sa.Connection, found: Any, id: str, place: str, lease: float) -> None:
        """Move the rows of the earlier run to its name and id, if it was in this directory and is over."""
        busy = self._at_work(db, lease)
        if busy or found.place != place:
            state = "is at work" if busy else "may go on"
            raise ValueError(
                f"store {self.database.name}: the name {self.run!r} is that of run {found.id} in {found.place}, which "
                f"{state}: expected another last part of run_dir than that of {place} (run {id}), or another store.url"
            )
        for table in metadata.sorted_tables:
            if "run" in table.c:
                db.execute(sa.update(table).where(self._of(table)).values(run=f"{self.run}-{found.id}"))

    def _at_work(self, db: sa.Connection, lease: float) -> bool:
        """Return whether any process holds a role or leases a query."""
        return db.execute(at_work(self.now, lease, self.run)).first() is not None
