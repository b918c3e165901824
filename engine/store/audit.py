"""Inspect a run in the store: the states of its groups, violated invariants, and files that are no longer needed."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Any

import sqlalchemy as sa

from mgrpo.engine.store.database import Database, Part, at_work, reads, writes
from mgrpo.engine.store.roles import Roles
from mgrpo.engine.store.tables import (
    FORGOTTEN,
    STATES,
    calls,
    groups,
    metadata,
    publications,
    queries,
    roles,
    rollouts,
    runs,
)

FINISHED = ("acked", "expired")  # states that a group never leaves

Counts = dict[str, dict[str, int]]


class Audit(Part):
    """Answer what the command line, tests and reports ask about a run."""

    def __init__(self, database: Database, roles: Roles) -> None:
        super().__init__(database)
        self.roles = roles

    @reads
    def runs(self, db: sa.Connection) -> list[str]:
        """Return the names of all runs in the database, including colocated ones."""
        return sorted(db.scalars(sa.union(sa.select(runs.c.run), sa.select(queries.c.run))))

    @reads
    def balance(self, db: sa.Connection) -> dict[str, Any]:
        """Count everything in the run, on one snapshot, and check its invariants.

        Returns "agents" (for each, the number of its groups in each of STATES, "opened", and "refilled", a part of the
        expired), "queries", "rollouts", "calls", "late" (records that came too late), and "violations" by kind, which
        are all 0 in a run that lost nothing and did nothing twice.
        """
        found: dict[str, Any] = {"agents": self._states(db)}
        for agent, counts in found["agents"].items():
            counts["opened"] = sum(counts.values())
            refilled = (groups.c.agent == agent, groups.c.state == "expired", groups.c.reason == "zero_std")
            counts["refilled"] = self._count(db, groups, *refilled)
        for table in (queries, rollouts, calls):
            found[table.name] = self._count(db, table)
        late = sa.select(sa.func.coalesce(sa.func.sum(queries.c.late), 0)).where(self._of(queries))
        found["late"] = int(db.scalar(late) or 0)
        found["violations"] = {kind: self._count(db, *rule) for kind, rule in self._violations().items()}
        return found

    @reads
    def status(self, db: sa.Connection) -> dict[str, Any]:
        """Return "agents" (groups by state), "publications" (the latest of each agent), "roles" and "leases".

        Roles and leases come with the seconds until they lapse, negative if they have.
        """
        left = sa.func.max(queries.c.deadline) - self.now
        leased = self._of(queries, ~queries.c.sealed, queries.c.worker != "")
        workers = sa.select(queries.c.worker, sa.func.count(), left).where(leased).group_by(queries.c.worker)
        held = sa.select(roles.c.role, roles.c.holder, roles.c.deadline - self.now).where(self._of(roles))
        return {
            "agents": self._states(db),
            "publications": {
                agent: vars(publication) for agent, publication in self.roles.read_publications(db).items()
            },
            "roles": {role: {"holder": holder, "seconds": left} for role, holder, left in db.execute(held)},
            "leases": {worker: {"queries": count, "seconds": left} for worker, count, left in db.execute(workers)},
        }

    @reads
    def at_work(self, db: sa.Connection, lease: float) -> list[str]:
        """Return the roles that are held and the workers that lease queries. lease: the seconds for which they are."""
        return [name for _, name in db.execute(at_work(self.now, lease, self.run))]

    @reads
    def dump(self, db: sa.Connection, write: Callable[[str], object]) -> None:
        """Pass every row of the run to `write`, as a line of JSON with its "table"; hold only some rows at a time."""
        for table in metadata.sorted_tables:
            if "run" in table.c:
                rows = sa.select(table).where(self._of(table)).execution_options(yield_per=1000)
                for row in db.execute(rows).mappings():
                    write(json.dumps({"table": table.name, **row}))

    @reads
    def garbage(self, db: sa.Connection) -> list[str]:
        """Return the trajectory files whose calls all belong to acked or expired groups.

        A file that its writer has not closed yet may be among them; the caller must not delete such files.
        """
        waiting = sa.case((groups.c.state.in_(FINISHED), 0), else_=1)
        files = sa.select(calls.c.file).join(groups, _same(groups, calls, "run", "agent", "query"))
        done = files.where(self._of(calls)).group_by(calls.c.file).having(sa.func.sum(waiting) == 0)
        return list(db.scalars(done.order_by(calls.c.file)))

    @writes
    def forget(self, db: sa.Connection, files: Collection[str]) -> int:
        """Delete the finished calls in files that are gone, and return their number. Rollouts and groups stay.

        The groups are marked: none of them can be trained on again.
        """
        group = _same(groups, calls, "run", "agent", "query")
        gone = sa.exists().where(group, self._of(calls, calls.c.file.in_(files)))
        db.execute(sa.update(groups).where(self._of(groups, groups.c.state == "acked", gone)).values(reason=FORGOTTEN))
        finished = sa.exists().where(group, groups.c.state.in_(FINISHED))
        return db.execute(sa.delete(calls).where(self._of(calls, calls.c.file.in_(files), finished))).rowcount

    # ---- within a transaction

    def _count(self, db: sa.Connection, table: sa.Table, *conditions: sa.ColumnElement[bool]) -> int:
        return db.scalar(sa.select(sa.func.count()).select_from(table).where(self._of(table, *conditions))) or 0

    def _states(self, db: sa.Connection) -> Counts:
        """Count each agent's groups in each of STATES."""
        counts = sa.select(groups.c.agent, groups.c.state, sa.func.count()).where(self._of(groups))
        by_agent: Counts = {}
        for agent, state, count in db.execute(counts.group_by(groups.c.agent, groups.c.state).order_by("agent")):
            by_agent.setdefault(agent, dict.fromkeys(STATES, 0))[state] = count
        return by_agent

    def _violations(self) -> dict[str, tuple[Any, ...]]:
        """Return the violations to look for, by kind: a table, and the conditions that only its wrong rows meet."""
        query_of = {table: sa.exists().where(_same(queries, table, "run", "query")) for table in (rollouts, groups)}
        sealed = {state: query_of[groups].where(queries.c.sealed == state) for state in (False, True)}
        ended = _number(rollouts, queries, "run", "query")
        agents = sa.select(sa.func.count(groups.c.agent.distinct())).where(self._of(groups)).scalar_subquery()
        before = queries.alias()
        follows = sa.exists().where(before.c.run == queries.c.run, before.c.query == queries.c.query - 1)
        begun = sa.exists().where(self._of(runs))
        acked = _number(groups, publications, "run", "agent", also=groups.c.state == "acked")
        later = publications.alias()
        newer = sa.exists().where(_same(later, publications, "run", "agent"), later.c.step > publications.c.step)
        return {
            "rollouts without a query": (rollouts, ~query_of[rollouts]),
            "rollouts beyond K": (rollouts, query_of[rollouts].where(rollouts.c.rollout >= queries.c.rollouts)),
            "calls without a rollout": (calls, ~sa.exists().where(_same(rollouts, calls, "run", "query", "rollout"))),
            "groups without a query": (groups, ~query_of[groups]),
            "queries without a group of each agent": (queries, _number(groups, queries, "run", "query") != agents),
            "open groups of sealed queries": (groups, groups.c.state == "open", sealed[True]),
            "closed groups of open queries": (groups, groups.c.state != "open", sealed[False]),
            "open queries that are whole": (queries, ~queries.c.sealed, ended >= queries.c.rollouts),
            "queries sealed too early": (
                queries,
                queries.c.sealed,
                ended < sa.case((queries.c.rollouts < 2, queries.c.rollouts), else_=2),
            ),
            "numbers left out": (queries, begun, queries.c.query > 0, ~follows),
            "acked, but not once": (groups, groups.c.acks != sa.case((groups.c.state == "acked", 1), else_=0)),
            "agents with more acked than published": (publications, ~newer, acked > publications.c.trained),
        }


def _same(one: sa.FromClause, other: sa.FromClause, *names: str) -> sa.ColumnElement[bool]:
    return sa.and_(*(one.c[name] == other.c[name] for name in names))


def _number(
    of: sa.Table, each: sa.Table, *names: str, also: sa.ColumnElement[bool] | None = None
) -> sa.ScalarSelect[int]:
    """Count the rows of table `of` that have the same `names` as each row of table `each`."""
    conditions = [_same(of, each, *names)] + ([] if also is None else [also])
    return sa.select(sa.func.count()).select_from(of).where(*conditions).correlate(each).scalar_subquery()
