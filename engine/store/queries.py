"""The part of the store about sampling: queries are opened, leased to workers, recorded rollout by rollout, and sealed.

Whoever changes a query or its rollouts first locks its row, in the order of the numbers: of two that record a query's
last two rollouts at once, the second sees both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import Any

import sqlalchemy as sa

from mgrpo.engine.store.database import writes
from mgrpo.engine.store.roles import LATEST, Roster
from mgrpo.engine.store.tables import (
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

# What is done for every batch of rollouts is built once: building costs more than running it.
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
    """Of each agent's latest publication what the gate needs."""
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
    """The lowest queries whose lease lapsed, but for those that another is about to change."""
    lapsed = sa.select(queries.c.query).where(queries.c.run == _THIS, ~queries.c.sealed, queries.c.deadline < now)
    return lapsed.order_by(queries.c.query).limit(sa.bindparam("count")).with_for_update(skip_locked=True)


class Intake(Roster):
    """Queries and what workers make of them."""

    @writes
    def open_queries(
        self, db: sa.Connection, tasks: Sequence[tuple[int, str]], agents: Sequence[str], rollouts: int, step: int
    ) -> None:
        """Opens (query number, task id), a group for each agent, to be sealed by `rollouts` rollouts. Idempotent."""
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
        """Leases at most `count` queries for `lease` seconds: those whose lease lapsed, then new ones.

        Of agent a, which has published trained_a groups and dropped dropped_a, new queries are opened while there are
        fewer than  min_a(trained_a + dropped_a) + ahead  and than  total + max_a(dropped_a), over the agents with
        trained_a < total. None before all agents have published. task_of: the task's id of a query number.
        loaded: by agent the step of the weights that the worker has; it gets nothing while there are later ones, which
        may be what opened the gate.
        """
        agents, size = self._begun(db)
        lapsed = list(db.scalars(_lapsed(self.now), {"this": self.run, "count": count}))
        latest = db.execute(_standing(self.now), {"this": self.run}).all()  # no older than what opened the lapsed ones
        if loaded is not None and any(row.step > loaded.get(row.agent, -1) for row in latest):
            return []
        if lapsed:
            mine = sa.update(queries).where(self._of(queries, queries.c.query.in_(lapsed)))
            db.execute(mine.values(worker=worker, taken=self.now, deadline=self.now + lease))
        again = self._leases(db, lapsed)
        limit, step, now = _gate(latest, agents, ahead, total)
        new = [(query, task_of(query)) for query in self._numbers(db, limit, count - len(lapsed))]
        self._open(db, new, agents, (step, size, False, worker, now, now + lease, 0))
        return again + [Lease(query, task, list(range(size))) for query, task in new]

    @writes
    def extend(self, db: sa.Connection, worker: str, lease: float) -> int:
        """A sign of life: all of the worker's leases hold for `lease` seconds from now. Returns how many it has."""
        mine = self._locked(db, self._of(queries, ~queries.c.sealed, queries.c.worker == worker))
        if mine:
            leased = sa.update(queries).where(self._of(queries, queries.c.query.in_(mine)))
            db.execute(leased.values(deadline=self.now + lease))
        return len(mine)

    @writes
    def give_back(self, db: sa.Connection, worker: str) -> None:
        """An orderly end: others may take the worker's queries at once."""
        mine = self._locked(db, self._of(queries, ~queries.c.sealed, queries.c.worker == worker))
        if mine:
            leased = sa.update(queries).where(self._of(queries, queries.c.query.in_(mine)))
            db.execute(leased.values(worker="", deadline=0.0))

    @writes
    def seal_overdue(self, db: sa.Connection, timeout: float) -> list[int]:
        """Seals the queries taken more than `timeout` seconds ago that have at least two rollouts. Returns them."""
        old = self._of(queries, ~queries.c.sealed, queries.c.taken < self.now - timeout)
        ended = Counter(query for query, _ in self._recorded(db, self._locked(db, old)))
        overdue = sorted(query for query, count in ended.items() if count >= 2)
        self._seal(db, overdue)
        return overdue

    @writes
    def record(self, db: sa.Connection, ended: Sequence[RolloutRecord], made: Sequence[CallRecord]) -> None:
        """Records ended rollouts with all of their calls, and seals the groups whose last rollout this was. Idempotent.

        The first record of a rollout stands: of a retried one nothing is taken, not even calls the first did not make.
        One that comes after its query was sealed without it is counted and left. It does not matter who leases the
        query. Raises ValueError when a rollout's query is not open to this run's agents.
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

    # ---- within a transaction

    def _open(
        self, db: sa.Connection, tasks: Sequence[tuple[int, str]], agents: Sequence[str], rest: tuple[Any, ...]
    ) -> None:
        """rest: of a query's row what follows its task."""
        for query, task in tasks:
            if "\0" in task:
                raise ValueError(f"task of query {query}: {task!r} given: expected an id without NUL")
        self._insert_rows(db, queries, [(self.run, query, task, *rest) for query, task in tasks])
        made = [(self.run, query, agent, "open", "", "", 0) for query, _ in tasks for agent in agents]
        self._insert_rows(db, groups, made)

    def _numbers(self, db: sa.Connection, limit: int, count: int) -> range:
        """New query numbers. Only who may get some locks the run, last of all: who holds it waits for nobody.

        The limit is the gate's of a moment before, when the worker's weights were the newest: no later one counts.
        """
        if not limit or not count:
            return range(0)
        self._begun(db, lock=True)
        first = db.scalar(_OPENED, {"this": self.run}) or 0
        return range(first, min(limit, first + count))

    def _leases(self, db: sa.Connection, taken: Sequence[int]) -> list[Lease]:
        if not taken:
            return []
        known = self._recorded(db, taken)
        rows = sa.select(queries.c.query, queries.c.task, queries.c.rollouts)
        mine = rows.where(self._of(queries, queries.c.query.in_(taken))).order_by(queries.c.query)
        return [Lease(q, task, [k for k in range(size) if (q, k) not in known]) for q, task, size in db.execute(mine)]

    def _recorded(self, db: sa.Connection, wanted: Collection[int]) -> set[tuple[int, int]]:
        """The queries' rollouts that are there, as (query, rollout)."""
        return {(query, rollout) for query, rollout in db.execute(_RECORDED, self._these(wanted))}

    def _these(self, wanted: Collection[int]) -> dict[str, Any]:
        return {"this": self.run, "these": list(wanted)}

    def _locked(self, db: sa.Connection, which: sa.ColumnElement[bool]) -> list[int]:
        """Queries, locked; those that another is about to change are left to it."""
        lowest = sa.select(queries.c.query).where(which).order_by(queries.c.query)
        return list(db.scalars(lowest.with_for_update(skip_locked=True)))

    def _check_opened(
        self, db: sa.Connection, ended: Sequence[RolloutRecord], made: Sequence[CallRecord]
    ) -> tuple[dict[int, int], set[int]]:
        """Of each query, locked, the number of its rollouts; and the queries that are sealed.

        One that `reclaim` deleted must not come back by a late write.
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

    def _seal(self, db: sa.Connection, full: Sequence[int]) -> None:
        if full:
            db.execute(_SEAL_QUERIES, self._these(full))
            db.execute(_SEAL_GROUPS, self._these(full))

    def _count_late(self, db: sa.Connection, late: Sequence[tuple[int, int]]) -> None:
        for query, number in sorted(Counter(query for query, _ in late).items()):
            one = self._of(queries, queries.c.query == query)
            db.execute(sa.update(queries).where(one).values(late=queries.c.late + number))


def _gate(latest: Sequence[Any], agents: Sequence[str], ahead: int, total: int) -> tuple[int, int, float]:
    """By what `_standing` read: the query number before which to stop, 0 if all are opened; the rl step of the weights
    there are; and now."""
    live = [row for row in latest if row.trained < total]
    if {row.agent for row in latest} != set(agents) or not live:
        return 0, 0, 0.0
    slowest = min(row.trained + row.dropped for row in live)
    limit = min(slowest + ahead, total + max(row.dropped for row in live))
    return limit if limit > latest[0].opened else 0, min(row.step for row in latest), latest[0].now
