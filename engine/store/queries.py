"""Open queries, lease them to workers, record their rollouts one by one, and seal their groups.

A transaction that changes a query or its rollouts first locks the query's row, in the order of the numbers: if two of
them record the last two rollouts of a query at the same time, the second one sees both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import Any

import sqlalchemy as sa

from mgrpo.engine.store.database import AHEAD, Database, Part, lapsed, reads, writes
from mgrpo.engine.store.roles import LATEST, Roles
from mgrpo.engine.store.tables import (
    UNKNOWN,
    CallRecord,
    Lease,
    RolloutRecord,
    call_row,
    calls,
    groups,
    publications,
    queries,
    rollout_row,
    rollouts,
)

# Statements that run for every batch of rollouts are built once: building one costs more than running it.
_THIS: sa.BindParameter[str] = sa.bindparam("this")
_THESE: sa.BindParameter[list[int]] = sa.bindparam("these", expanding=True)
_LOCKED = (
    sa.select(queries.c.query, queries.c.rollouts, queries.c.sealed, groups.c.agent)
    .join(groups, sa.and_(groups.c.run == queries.c.run, groups.c.query == queries.c.query))
    .where(queries.c.run == _THIS, queries.c.query.in_(_THESE))
    .order_by(queries.c.query)
    .with_for_update(of=queries)
)
_RECORDED = sa.select(rollouts.c.query, rollouts.c.rollout).where(rollouts.c.run == _THIS, rollouts.c.query.in_(_THESE))
_SEAL_QUERIES = sa.update(queries).where(queries.c.run == _THIS, queries.c.query.in_(_THESE)).values(sealed=True)
_SEAL_GROUPS = (
    sa.update(groups)
    .where(groups.c.run == _THIS, groups.c.query.in_(_THESE), groups.c.state == "open")
    .values(state="sealed")
)
_DROPPED = sa.select(sa.func.count()).where(
    groups.c.run == _THIS, groups.c.agent == publications.c.agent, groups.c.state == "expired"
)
_OPENED = sa.select(sa.func.coalesce(sa.func.max(queries.c.query) + 1, 0)).where(queries.c.run == _THIS)


@cache
def _standing(now: sa.ColumnElement[float]) -> sa.Select[Any]:
    """Select what the gate needs to know of each agent's latest publication."""
    return sa.select(
        publications.c.agent,
        publications.c.trained,
        publications.c.step,
        _DROPPED.scalar_subquery().label("dropped"),
        _OPENED.scalar_subquery().label("opened"),
        now.label("now"),
    ).where(publications.c.run == _THIS, publications.c.step == LATEST)


@cache
def _lapsed(now: sa.ColumnElement[float]) -> sa.Select[Any]:
    """Select the lowest queries whose lease has lapsed, except those that another transaction has locked."""
    free = lapsed(queries.c.deadline, now, sa.bindparam("lease", type_=sa.Double))
    lowest = sa.select(queries.c.query).where(queries.c.run == _THIS, ~queries.c.sealed, free)
    return lowest.order_by(queries.c.query).limit(sa.bindparam("count")).with_for_update(skip_locked=True)


class Queries(Part):
    """Hand out queries to workers and take in their rollouts."""

    def __init__(self, database: Database, roles: Roles) -> None:
        super().__init__(database)
        self.roles = roles

    @writes
    def open(
        self, db: sa.Connection, tasks: Sequence[tuple[int, str]], agents: Sequence[str], rollouts: int, step: int
    ) -> None:
        """Open queries, given as (number, task id), with a group for each agent. Idempotent.

        The groups of a query are sealed when it has `rollouts` rollouts.
        """
        self._open(db, tasks, agents, (step, rollouts, False, "", None, None, 0))

    @writes
    def take(
        self,
        db: sa.Connection,
        worker: str,
        count: int,
        *,
        ahead: int,
        total: int,
        task_of: Callable[[int], str],
        lease: float,
        loaded: Mapping[str, int] | None = None,
    ) -> list[Lease]:
        """Lease at most `count` queries for `lease` seconds: those whose lease has lapsed, then new ones.

        This is the gate that limits how far sampling runs ahead. Agent a has published weights trained on trained_a
        groups and has dropped dropped_a groups. New queries are opened as long as there are fewer than
        min_a(trained_a + dropped_a) + ahead  and fewer than  total + max_a(dropped_a), over the agents with
        trained_a < total; and none before all agents have published. task_of: returns the task id of a query number.
        loaded: the step of the weights that the worker has, by agent. A worker with outdated weights gets no queries,
        because the newer weights may be what opened the gate.
        """
        agents, size = self.roles.begun(db)
        free = list(db.scalars(_lapsed(self.now), {"this": self.run, "count": count, "lease": lease}))
        latest = db.execute(
            _standing(self.now), {"this": self.run}
        ).all()  # read now: no older than what opened the free queries
        if loaded is not None and any(row.step > loaded.get(row.agent, -1) for row in latest):
            return []
        if free:
            mine = sa.update(queries).where(self._of(queries, queries.c.query.in_(free)))
            db.execute(mine.values(worker=worker, taken=self.now, deadline=self.now + lease))
        again = self._leases(db, free)
        limit, step, now = _gate(latest, agents, ahead, total)
        new = [(query, task_of(query)) for query in self._numbers(db, limit, count - len(free))]
        self._open(db, new, agents, (step, size, False, worker, now, now + lease, 0))
        return again + [Lease(query, task, list(range(size))) for query, task in new]

    @writes
    def extend(self, db: sa.Connection, worker: str, lease: float) -> int:
        """Extend all leases of the worker to `lease` seconds from now, and return their number. This is a heartbeat."""
        mine = self._locked(db, self._of(queries, ~queries.c.sealed, queries.c.worker == worker))
        if mine:
            leased = sa.update(queries).where(self._of(queries, queries.c.query.in_(mine)))
            db.execute(leased.values(deadline=self.now + lease))
        return len(mine)

    @writes
    def give_back(self, db: sa.Connection, worker: str) -> None:
        """Release the worker's queries, which others may take at once."""
        mine = self._locked(db, self._of(queries, ~queries.c.sealed, queries.c.worker == worker))
        if mine:
            leased = sa.update(queries).where(self._of(queries, queries.c.query.in_(mine)))
            db.execute(leased.values(worker="", deadline=0.0))

    @writes
    def seal_overdue(self, db: sa.Connection, timeout: float) -> list[int]:
        """Seal the queries taken more than `timeout` seconds ago that have at least two rollouts, and return them."""
        self._forget_future(db)
        old = self._of(queries, ~queries.c.sealed, queries.c.taken < self.now - timeout)
        ended = Counter(query for query, _ in self._recorded(db, self._locked(db, old)))
        overdue = sorted(query for query, count in ended.items() if count >= 2)
        self._seal(db, overdue)
        return overdue

    @writes
    def record(self, db: sa.Connection, ended: Sequence[RolloutRecord], made: Sequence[CallRecord]) -> None:
        """Record ended rollouts with all of their calls, and seal the groups whose last rollout this was. Idempotent.

        Only the first record of a rollout counts: nothing is taken from a later one, not even calls that the first did
        not make. A rollout that comes after its query was sealed without it is counted as late and ignored. It does not
        matter which worker leases the query. Raises ValueError if a query was not opened for this run's agents.
        """
        assert {(c.query, c.rollout) for c in made} <= {(r.query, r.rollout) for r in ended}
        if not ended:
            return
        size, sealed = self._check_opened(db, ended, made)
        known = self._recorded(db, size)
        first = {(r.query, r.rollout): r for r in reversed(ended)}
        late = [key for key in first if key[0] in sealed and key not in known]
        new = {key: r for key, r in first.items() if key[0] not in sealed and key not in known}
        self._insert_rows(db, rollouts, [rollout_row(r, self.run) for r in new.values()])
        self._insert_rows(db, calls, [call_row(c, self.run) for c in made if (c.query, c.rollout) in new])
        count = Counter(query for query, _ in known | new.keys())
        self._seal(db, sorted({query for query, _ in new if count[query] == size[query]}))
        self._count_late(db, late)

    @reads
    def sealed_of(self, db: sa.Connection, step: int) -> list[int]:
        """Return the sealed queries that were opened for an rl step, by number."""
        mine = sa.and_(queries.c.step == step, queries.c.sealed)
        return list(db.scalars(sa.select(queries.c.query).where(self._of(queries, mine)).order_by(queries.c.query)))

    # ---- within a transaction

    def _open(
        self, db: sa.Connection, tasks: Sequence[tuple[int, str]], agents: Sequence[str], rest: tuple[Any, ...]
    ) -> None:
        """Open queries. rest: the columns of a query's row after its task."""
        for query, task in tasks:
            if "\0" in task:
                raise ValueError(f"task of query {query}: {task!r} given: expected an id without NUL")
        self._insert_rows(db, queries, [(self.run, query, task, *rest) for query, task in tasks])
        made = [(self.run, query, agent, "open", "", "", 0, UNKNOWN) for query, _ in tasks for agent in agents]
        self._insert_rows(db, groups, made)

    def _numbers(self, db: sa.Connection, limit: int, count: int) -> range:
        """Return new query numbers.

        Lock the run's row last, and only if numbers are available, so that its holder never waits. The limit was read
        before the lock, when the worker's weights were the newest; a later, higher one is ignored on purpose.
        """
        if not limit or not count:
            return range(0)
        self.roles.begun(db, lock=True)
        first = db.scalar(_OPENED, {"this": self.run}) or 0
        return range(first, min(limit, first + count))

    def _leases(self, db: sa.Connection, taken: Sequence[int]) -> list[Lease]:
        """Return the leases of queries that were opened before, with the rollouts that are still missing."""
        if not taken:
            return []
        recorded = self._recorded(db, taken)
        rows = sa.select(queries.c.query, queries.c.task, queries.c.rollouts)
        mine = rows.where(self._of(queries, queries.c.query.in_(taken))).order_by(queries.c.query)
        return [
            Lease(q, task, [k for k in range(size) if (q, k) not in recorded]) for q, task, size in db.execute(mine)
        ]

    def _recorded(self, db: sa.Connection, numbers: Collection[int]) -> set[tuple[int, int]]:
        """Return the recorded rollouts of these queries, as (query, rollout)."""
        return {(query, rollout) for query, rollout in db.execute(_RECORDED, self._these(numbers))}

    def _these(self, numbers: Collection[int]) -> dict[str, Any]:
        return {"this": self.run, "these": list(numbers)}

    def _locked(self, db: sa.Connection, which: sa.ColumnElement[bool]) -> list[int]:
        """Lock the queries for which `which` holds, except those locked by another transaction, and return them."""
        lowest = sa.select(queries.c.query).where(which).order_by(queries.c.query)
        return list(db.scalars(lowest.with_for_update(skip_locked=True)))

    def _check_opened(
        self, db: sa.Connection, ended: Sequence[RolloutRecord], made: Sequence[CallRecord]
    ) -> tuple[dict[int, int], set[int]]:
        """Lock the queries; return the number of rollouts that each is to have, and which of them are sealed.

        Raises ValueError for one that was not opened: a late write must not bring back a query that was reclaimed.
        """
        found = db.execute(_LOCKED, self._these({r.query for r in ended})).all()
        size = {row.query: row.rollouts for row in found}
        for r in ended:
            if r.query not in size:
                raise ValueError(f"record: query {r.query} of run {self.run!r} was not opened")
            assert 0 <= r.rollout < size[r.query], f"query {r.query} has {size[r.query]} rollouts, got {r.rollout}"
        there = {(row.agent, row.query) for row in found}
        for c in made:
            if (c.agent, c.query) not in there:
                raise ValueError(f"record: query {c.query} was not opened for agent {c.agent!r}")
        return size, {row.query for row in found if row.sealed}

    def _forget_future(self, db: sa.Connection) -> None:
        """Count the time from now on for queries that were taken while the clock was ahead."""
        future = self._locked(db, self._of(queries, ~queries.c.sealed, queries.c.taken > self.now + AHEAD))
        if future:
            db.execute(sa.update(queries).where(self._of(queries, queries.c.query.in_(future))).values(taken=self.now))

    def _seal(self, db: sa.Connection, full: Sequence[int]) -> None:
        if full:
            db.execute(_SEAL_QUERIES, self._these(full))
            db.execute(_SEAL_GROUPS, self._these(full))

    def _count_late(self, db: sa.Connection, late: Sequence[tuple[int, int]]) -> None:
        for query, number in sorted(Counter(query for query, _ in late).items()):
            one = self._of(queries, queries.c.query == query)
            db.execute(sa.update(queries).where(one).values(late=queries.c.late + number))


def _gate(latest: Sequence[Any], agents: Sequence[str], ahead: int, total: int) -> tuple[int, int, float]:
    """Compute from what `_standing` selected where to stop opening queries.

    Returns the query number before which to stop (0 if nothing may be opened), the rl step of the published weights,
    and the time on the database's clock.
    """
    live = [row for row in latest if row.trained < total]
    if {row.agent for row in latest} != set(agents) or not live:
        return 0, 0, 0.0
    slowest = min(row.trained + row.dropped for row in live)
    limit = min(slowest + ahead, total + max(row.dropped for row in live))
    return limit if limit > latest[0].opened else 0, min(row.step for row in latest), latest[0].now
