"""The shared store: which queries were asked, which rollouts ended, what they scored, who trains on them.

A *group* is one query for one agent; all groups of a query are sealed together, when its K rollouts have ended, or when
it is overdue with at least two of them:

    open --record--> sealed --claim--> leased --ack--> acked          release, after a trainer's death, seals again
                        |                 +--refill--> expired        what has no advantage, if that is to be replaced
                        +------claim------------------> expired       sampled by weights that are too old

Workers lease queries with a deadline and record every rollout once, whoever sampled it. A trainer's claims have no
deadline: its successor acks what its checkpoint contains and releases the rest. Colocated runs open their queries
themselves, lease none, and `reclaim` what a checkpoint lacks.

Every method is one transaction, may be called again, and locks in the order roles, queries, groups, each by number, and
a run last, so that on PostgreSQL two seldom wait for each other in a circle; if they do, one is tried again. Raises
OSError when the store cannot be reached or written: then nothing has happened, or all of it, and the call can be
repeated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import sqlalchemy as sa

from mgrpo.engine.store.audit import Accounts
from mgrpo.engine.store.database import reads, writes
from mgrpo.engine.store.queries import Intake
from mgrpo.engine.store.roles import FencedError
from mgrpo.engine.store.tables import (
    STATES,
    STATUSES,
    CallRecord,
    Claim,
    Group,
    Lease,
    Publication,
    RolloutRecord,
    calls,
    columns,
    groups,
    queries,
    read_call,
    rollouts,
)

__all__ = [
    "STATES",
    "STATUSES",
    "Store",
    "FencedError",
    "Claim",
    "Group",
    "Lease",
    "Publication",
    "RolloutRecord",
    "CallRecord",
]


class Store(Intake, Accounts):
    """One run's part of the store at `url`: see `Database` for its arguments and what it raises.

    What workers call is in `Intake`, what is about processes and weights in `Roster`, what only looks in `Accounts`.
    """

    @writes
    def claim(
        self,
        db: sa.Connection,
        agent: str,
        limit: int,
        holder: str,
        *,
        oldest_step: int | None = None,
        at_least: int = 1,
    ) -> Claim:
        """Leases to `holder` at most `limit` sealed groups of the agent, the lowest query numbers first.

        Nothing is leased when there are fewer than `at_least`. Before, sealed groups with a call of this agent that was
        sampled by weights older than `oldest_step` expire, all of them. Raises FencedError.
        """
        self._fence(db, agent, holder)
        expired = [] if oldest_step is None else self._expire(db, agent, oldest_step)
        sealed = self._of(groups, groups.c.agent == agent, groups.c.state == "sealed")
        lowest = sa.select(groups.c.query).where(sealed).order_by(groups.c.query).limit(limit)
        claimed = list(db.scalars(lowest.with_for_update(skip_locked=True)))
        if not claimed or len(claimed) < at_least:
            return Claim([], expired)
        db.execute(sa.update(groups).where(self._group(agent, claimed)).values(state="leased", holder=holder))
        return Claim(self._groups(db, agent, claimed), expired)

    @writes
    def ack(self, db: sa.Connection, agent: str, trained: Collection[int], holder: str = "") -> None:
        """The agent's optimizer steps on these queries are checkpointed. Idempotent.

        Raises FencedError; ValueError, and acks none of them, when one is neither leased nor acked.
        """
        self._move(db, agent, trained, holder, "acked", {"acks": groups.c.acks + 1})

    @writes
    def refill(self, db: sa.Connection, agent: str, useless: Collection[int], holder: str) -> None:
        """Leased groups from which nothing is to be learnt, as all rewards are equal, expire: others replace them.

        Idempotent. Raises FencedError; ValueError, and drops none of them, when one is neither leased nor expired.
        """
        self._move(db, agent, useless, holder, "expired", {"reason": "zero_std"})

    @writes
    def release(self, db: sa.Connection, agent: str, holder: str, keep: Collection[int] = ()) -> int:
        """What the agent's trainer leased and did not ack is sealed again, but for the queries that it is to keep.

        Returns how many groups. Raises FencedError.
        """
        self._fence(db, agent, holder)
        leased = self._of(groups, groups.c.agent == agent, groups.c.state == "leased", groups.c.query.not_in(keep))
        return db.execute(sa.update(groups).where(leased).values(state="sealed", holder="")).rowcount

    @writes
    def reclaim(self, db: sa.Connection, step: int) -> int:
        """Makes a colocated run agree with a checkpoint that has trained on everything of the steps below `step`.

        A query of those steps that any agent had claimed is trained: all of its groups are acked. Every other query,
        also one acked after that checkpoint was written, belongs to weights that are lost: its groups, rollouts and
        calls are deleted, to be opened and sampled again. Returns how many queries were deleted.
        """
        claimed = sa.select(groups.c.query).where(self._of(groups, groups.c.state.in_(("leased", "acked"))))
        kept = sa.select(queries.c.query).where(self._of(queries, queries.c.step < step, queries.c.query.in_(claimed)))
        trained = self._of(groups, groups.c.state != "acked", groups.c.query.in_(kept))
        db.execute(sa.update(groups).where(trained).values(state="acked", acks=1))
        for table in (calls, rollouts):
            db.execute(sa.delete(table).where(self._of(table, table.c.query.not_in(kept))))
        lost = db.execute(sa.delete(queries).where(self._of(queries, queries.c.query.not_in(kept)))).rowcount
        left = sa.select(queries.c.query).where(self._of(queries))
        db.execute(sa.delete(groups).where(self._of(groups, groups.c.query.not_in(left))))
        return lost

    @reads
    def rollouts_of(self, db: sa.Connection, query: int) -> list[RolloutRecord]:
        return self._rollouts(db, [query])

    @reads
    def calls_of(self, db: sa.Connection, query: int) -> list[CallRecord]:
        """Of all agents, by agent, rollout and call."""
        return self._calls(db, [query])

    # ---- within a transaction

    def _group(self, agent: str, wanted: Collection[int]) -> sa.ColumnElement[bool]:
        return self._of(groups, groups.c.agent == agent, groups.c.query.in_(wanted))

    def _expire(self, db: sa.Connection, agent: str, oldest_step: int) -> list[int]:
        """The sealed groups that expired now."""
        mine = self._of(calls, calls.c.agent == agent, calls.c.query == groups.c.query, calls.c.step < oldest_step)
        sealed = self._of(groups, groups.c.agent == agent, groups.c.state == "sealed", sa.exists().where(mine))
        stale = sa.update(groups).where(sealed).values(state="expired", reason="stale")
        return sorted(db.scalars(stale.returning(groups.c.query)))

    def _move(
        self, db: sa.Connection, agent: str, wanted: Collection[int], holder: str, state: str, also: dict[str, Any]
    ) -> None:
        """Leased groups become `state`; those that have it stay as they are."""
        self._fence(db, agent, holder)
        rows = sa.select(groups.c.query, groups.c.state).where(self._group(agent, wanted)).order_by(groups.c.query)
        found = {query: state for query, state in db.execute(rows.with_for_update())}
        for query in sorted(wanted):
            if (now := found.get(query, "missing")) not in ("leased", state):
                raise ValueError(f"{state}: expected query {query} of agent {agent!r} to be leased, it is {now}")
        leased = sa.and_(self._group(agent, wanted), groups.c.state == "leased")
        db.execute(sa.update(groups).where(leased).values(state=state, **also))

    def _groups(self, db: sa.Connection, agent: str, wanted: Sequence[int]) -> list[Group]:
        ended = _by_query(self._rollouts(db, wanted))
        made = _by_query(self._calls(db, wanted, calls.c.agent == agent))
        rows = sa.select(queries.c.query, queries.c.task, queries.c.step)
        found = db.execute(rows.where(self._of(queries, queries.c.query.in_(wanted))).order_by(queries.c.query))
        return [Group(query, task, step, ended[query], made[query]) for query, task, step in found]

    def _rollouts(self, db: sa.Connection, wanted: Sequence[int]) -> list[RolloutRecord]:
        rows = sa.select(*columns(rollouts)).where(self._of(rollouts, rollouts.c.query.in_(wanted)))
        return [RolloutRecord(**row) for row in db.execute(rows.order_by(*rollouts.primary_key)).mappings()]

    def _calls(self, db: sa.Connection, wanted: Sequence[int], *only: sa.ColumnElement[bool]) -> list[CallRecord]:
        rows = sa.select(*columns(calls)).where(self._of(calls, calls.c.query.in_(wanted), *only))
        return [read_call(row) for row in db.execute(rows.order_by(*calls.primary_key)).mappings()]


def _by_query(records: Iterable[Any]) -> defaultdict[int, list[Any]]:
    grouped = defaultdict(list)
    for record in records:
        grouped[record.query].append(record)
    return grouped
