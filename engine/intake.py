"""The part of the store about sampling: queries are opened, leased to workers, recorded rollout by rollout, and sealed.

Whoever changes a query or its rollouts first locks its row, in the order of the numbers: of two that record a query's
last two rollouts at once, the second sees both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sa

from mgrpo.engine.database import writes
from mgrpo.engine.roster import Roster
from mgrpo.engine.schema import (
    CallRecord,
    Lease,
    RolloutRecord,
    call_row,
    calls,
    groups,
    queries,
    rollout_row,
    rollouts,
)


class Intake(Roster):
    """Queries and what workers make of them."""

    @writes
    def open_queries(
        self, db: sa.Connection, tasks: Sequence[tuple[int, str]], agents: Sequence[str], rollouts: int, step: int
    ) -> None:
        """Opens (query number, task id), a group for each agent, to be sealed by `rollouts` rollouts. Idempotent."""
        self._open(db, tasks, agents, {"rollouts": rollouts, "step": step, "worker": ""})

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
    ) -> list[Lease]:
        """Leases at most `count` queries for `lease` seconds: those whose lease lapsed, then new ones.

        Of agent a, which has published trained_a groups and dropped dropped_a, new queries are opened while there are
        fewer than  min_a(trained_a + dropped_a) + ahead  and than  total + max_a(dropped_a), over the agents with
        trained_a < total. None before all agents have published. task_of: the task's id of a query number.
        """
        agents, size = self._begun(db, lock=True)
        until = {"worker": worker, "taken": self.now, "deadline": self.now + lease}
        lapsed = self._of(queries, ~queries.c.sealed, queries.c.deadline < self.now)
        taken = self._locked(db, lapsed, count)
        if taken:
            db.execute(sa.update(queries).where(self._of(queries, queries.c.query.in_(taken))).values(until))
        first, limit, step = self._gate(db, agents, ahead, total)
        new = list(range(first, min(limit, first + count - len(taken))))
        if new:
            self._open(db, [(q, task_of(q)) for q in new], agents, until | {"rollouts": size, "step": step})
        return self._leases(db, taken + new)

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
        overdue = [query for query, ended in self._ended(db, self._locked(db, old)).items() if ended >= 2]
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
        sealed = self._check_opened(db, ended, made)
        if late := [(r.query, r.rollout) for r in ended if r.query in sealed]:
            self._count_late(db, late)
        rows = [rollout_row(r, self.run) for r in ended if r.query not in sealed]
        if not rows:
            return
        insert = self._insert(rollouts).on_conflict_do_nothing()
        new = {tuple(key) for key in db.execute(insert.returning(rollouts.c.query, rollouts.c.rollout), rows)}
        if rows := [call_row(c, self.run) for c in made if (c.query, c.rollout) in new]:
            db.execute(self._insert(calls).on_conflict_do_nothing(), rows)
        self._seal_full(db, {query for query, _ in new})

    # ---- within a transaction

    def _open(
        self, db: sa.Connection, tasks: Sequence[tuple[int, str]], agents: Sequence[str], rest: dict[str, Any]
    ) -> None:
        """rest: the columns that all the queries share."""
        opened, grouped = [], []
        for query, task in tasks:
            if "\0" in task:
                raise ValueError(f"task of query {query}: {task!r} given: expected an id without NUL")
            opened.append({"run": self.run, "query": query, "task": task})
            grouped += [{"run": self.run, "query": query, "agent": agent} for agent in agents]
        if opened:
            insert = self._insert(queries).values(**rest, sealed=False, late=0).on_conflict_do_nothing()
            db.execute(insert, opened)
            insert = self._insert(groups).values(state="open", holder="", reason="", acks=0).on_conflict_do_nothing()
            db.execute(insert, grouped)

    def _gate(self, db: sa.Connection, agents: Sequence[str], ahead: int, total: int) -> tuple[int, int, int]:
        """The next query's number, the number before which to stop, and the rl step of the weights there are."""
        count = sa.func.count()
        by_agent = sa.select(groups.c.agent, count).where(self._of(groups, groups.c.state == "expired"))
        dropped = Counter({agent: number for agent, number in db.execute(by_agent.group_by(groups.c.agent))})
        opened = db.scalar(sa.select(sa.func.coalesce(sa.func.max(queries.c.query) + 1, 0)).where(self._of(queries)))
        latest = self._publications(db)
        live = [agent for agent in agents if agent not in latest or latest[agent].trained < total]
        if not live or not all(agent in latest for agent in agents):
            return opened, 0, 0
        slowest = min(latest[agent].trained + dropped[agent] for agent in live)
        needed = total + max(dropped[agent] for agent in live)
        return opened, min(slowest + ahead, needed), min(latest[agent].step for agent in agents)

    def _leases(self, db: sa.Connection, taken: Sequence[int]) -> list[Lease]:
        recorded: dict[int, set[int]] = {query: set() for query in taken}
        found = sa.select(rollouts.c.query, rollouts.c.rollout).where(self._of(rollouts, rollouts.c.query.in_(taken)))
        for query, rollout in db.execute(found):
            recorded[query].add(rollout)
        rows = sa.select(queries.c.query, queries.c.task, queries.c.rollouts)
        mine = rows.where(self._of(queries, queries.c.query.in_(taken))).order_by(queries.c.query)
        return [Lease(q, task, sorted(set(range(size)) - recorded[q])) for q, task, size in db.execute(mine)]

    def _locked(self, db: sa.Connection, which: sa.ColumnElement[bool], limit: int | None = None) -> list[int]:
        """The lowest queries, locked; those that another is about to change are left to it."""
        lowest = sa.select(queries.c.query).where(which).order_by(queries.c.query).limit(limit)
        return list(db.scalars(lowest.with_for_update(skip_locked=True)))

    def _check_opened(self, db: sa.Connection, ended: Sequence[RolloutRecord], made: Sequence[CallRecord]) -> set[int]:
        """Which of the queries are sealed. One that `reclaim` deleted must not come back by a late write."""
        both = sa.and_(groups.c.run == queries.c.run, groups.c.query == queries.c.query)
        wanted = self._of(queries, queries.c.query.in_({r.query for r in ended}))
        rows = sa.select(queries.c.query, queries.c.rollouts, queries.c.sealed, groups.c.agent)
        locked = rows.join(groups, both).where(wanted).order_by(queries.c.query).with_for_update(of=queries)
        found = db.execute(locked).all()
        size = {row.query: row.rollouts for row in found}
        for r in ended:
            if r.query not in size:
                raise ValueError(f"record: query {r.query} of run {self.run!r} was not opened")
            assert 0 <= r.rollout < size[r.query], f"query {r.query} has {size[r.query]} rollouts, got {r.rollout}"
        there = {(row.agent, row.query) for row in found}
        for c in made:
            if (c.agent, c.query) not in there:
                raise ValueError(f"record: query {c.query} was not opened for agent {c.agent!r}")
        return {row.query for row in found if row.sealed}

    def _count_late(self, db: sa.Connection, keys: Sequence[tuple[int, int]]) -> None:
        """A rollout that is recorded was delivered twice, which is not counted."""
        wanted = self._of(rollouts, rollouts.c.query.in_({query for query, _ in keys}))
        known = {tuple(key) for key in db.execute(sa.select(rollouts.c.query, rollouts.c.rollout).where(wanted))}
        for query, number in sorted(Counter(query for query, _ in set(keys) - known).items()):
            one = self._of(queries, queries.c.query == query)
            db.execute(sa.update(queries).where(one).values(late=queries.c.late + number))

    def _ended(self, db: sa.Connection, wanted: Sequence[int]) -> dict[int, int]:
        """Of each query the number of its rollouts that are recorded, if there are any."""
        counts = sa.select(rollouts.c.query, sa.func.count()).where(self._of(rollouts, rollouts.c.query.in_(wanted)))
        return {query: count for query, count in db.execute(counts.group_by(rollouts.c.query))}

    def _seal_full(self, db: sa.Connection, changed: set[int]) -> None:
        ended = sa.select(sa.func.count()).where(self._of(rollouts, rollouts.c.query == queries.c.query))
        full = self._of(queries, queries.c.query.in_(changed), queries.c.rollouts == ended.scalar_subquery())
        self._seal(db, list(db.scalars(sa.select(queries.c.query).where(full))))

    def _seal(self, db: sa.Connection, full: Sequence[int]) -> None:
        if full:
            db.execute(sa.update(queries).where(self._of(queries, queries.c.query.in_(full))).values(sealed=True))
            open_ones = self._of(groups, groups.c.query.in_(full), groups.c.state == "open")
            db.execute(sa.update(groups).where(open_ones).values(state="sealed"))
