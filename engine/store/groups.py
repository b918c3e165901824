"""Hand out sealed groups to trainers, and record what became of them.

A *group* is one query for one agent. All groups of a query are sealed together, when its K rollouts have ended, or when
it is overdue and has at least two of them:

    open --record--> sealed --claim--> leased --ack--> acked          `release`, after a trainer's death, seals again
                        |                 +--refill--> expired        a group without advantage, if it is to be replaced
                        |                 +--discard-> expired        with a damaged trajectory, or no score
                        +------claim------------------> expired       sampled by weights that are too old

Claims of a trainer have no deadline: its successor acks what its checkpoint contains and releases the rest. A trainer
that goes back to an earlier checkpoint takes back the acks since (`undo`). Colocated runs open their queries
themselves, lease none, and `reclaim` what a checkpoint lacks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import sqlalchemy as sa

from mgrpo.engine.store.database import Database, Part, reads, writes
from mgrpo.engine.store.roles import Roles
from mgrpo.engine.store.tables import (
    FORGOTTEN,
    UNKNOWN,
    CallRecord,
    Claim,
    Group,
    RolloutRecord,
    calls,
    columns,
    groups,
    queries,
    read_call,
    rollouts,
)


class Groups(Part):
    """Lease sealed groups to trainers, and take back, replace or finish them."""

    def __init__(self, database: Database, roles: Roles) -> None:
        super().__init__(database)
        self.roles = roles

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
        """Lease to `holder` at most `limit` sealed groups of the agent, those with the lowest query numbers.

        First expire all sealed groups with a call of this agent that was sampled by weights older than `oldest_step`.
        If then fewer than `at_least` groups are sealed, lease none. Raises FencedError.
        """
        self.roles.fence(db, agent, holder)
        expired = [] if oldest_step is None else self._expire(db, agent, oldest_step)
        sealed = self._of(groups, groups.c.agent == agent, groups.c.state == "sealed")
        lowest = sa.select(groups.c.query).where(sealed).order_by(groups.c.query).limit(limit)
        claimed = list(db.scalars(lowest.with_for_update(skip_locked=True)))
        if not claimed or len(claimed) < at_least:
            return Claim([], expired)
        db.execute(sa.update(groups).where(self._group(agent, claimed)).values(state="leased", holder=holder))
        return Claim(self._groups(db, agent, claimed), expired)

    @writes
    def ack(
        self, db: sa.Connection, agent: str, trained: Collection[int], holder: str = "", step: int = UNKNOWN
    ) -> None:
        """Mark groups as acked: the agent's optimizer steps on these queries are in the checkpoint of `step`.

        Idempotent. Raises FencedError; or ValueError, and acks none of them, if one is neither leased nor acked.
        """
        self._move(db, agent, trained, holder, "acked", {"acks": groups.c.acks + 1, "trained": step})

    @writes
    def refill(self, db: sa.Connection, agent: str, useless: Collection[int], holder: str) -> None:
        """Expire leased groups from which nothing can be learnt, as all rewards are equal. Others will replace them.

        Idempotent. Raises FencedError; or ValueError, and expires none, if one is neither leased nor expired.
        """
        self._move(db, agent, useless, holder, "expired", {"reason": "zero_std"})

    @writes
    def undo(self, db: sa.Connection, agent: str, step: int, holder: str) -> int:
        """Take back the acks after the checkpoint of `step`, to which the agent has gone back; return their number.

        The groups are sealed again, or expired if their calls were deleted since. Raises FencedError.
        """
        self.roles.fence(db, agent, holder)
        later = self._of(groups, groups.c.agent == agent, groups.c.state == "acked", groups.c.trained > step)
        lost = groups.c.reason == FORGOTTEN
        anew = {"state": sa.case((lost, "expired"), else_="sealed"), "acks": 0, "holder": "", "trained": UNKNOWN}
        return db.execute(sa.update(groups).where(later).values(anew)).rowcount

    @reads
    def acked(self, db: sa.Connection, agent: str) -> int:
        """Return how many groups of an agent are acked."""
        mine = self._of(groups, groups.c.agent == agent, groups.c.state == "acked")
        return db.scalar(sa.select(sa.func.count()).select_from(groups).where(mine)) or 0

    @writes
    def discard(
        self, db: sa.Connection, agent: str, useless: Collection[int], holder: str, reason: str = "damaged"
    ) -> None:
        """Expire leased groups that cannot be trained on. Others will replace them.

        reason: "damaged" if a trajectory cannot be read as it was written, "unscored" if no rollout has a score.
        Idempotent. Raises FencedError; or ValueError, and expires none, if one is neither leased nor expired.
        """
        self._move(db, agent, useless, holder, "expired", {"reason": reason})

    @writes
    def release(self, db: sa.Connection, agent: str, holder: str, keep: Collection[int] = ()) -> int:
        """Seal again the groups that the agent's trainer leased and did not ack, except those of the queries `keep`.

        Returns the number of groups. Raises FencedError.
        """
        self.roles.fence(db, agent, holder)
        leased = self._of(groups, groups.c.agent == agent, groups.c.state == "leased", groups.c.query.not_in(keep))
        return db.execute(sa.update(groups).where(leased).values(state="sealed", holder="")).rowcount

    @writes
    def reclaim(self, db: sa.Connection, step: int) -> int:
        """Make a colocated run agree with a checkpoint that was trained on everything of the steps below `step`.

        A query of those steps that any agent has claimed was trained on: all of its groups become acked, except those
        that were discarded. Every other query, even one acked after that checkpoint was written, belongs to weights
        that are lost: its groups, rollouts and calls are deleted, to be opened and sampled again. Returns the number of
        queries deleted.
        """
        claimed = sa.select(groups.c.query).where(self._of(groups, groups.c.state.in_(("leased", "acked", "expired"))))
        kept = sa.select(queries.c.query).where(self._of(queries, queries.c.step < step, queries.c.query.in_(claimed)))
        trained = self._of(groups, groups.c.state.not_in(("acked", "expired")), groups.c.query.in_(kept))
        db.execute(sa.update(groups).where(trained).values(state="acked", acks=1))
        for table in (calls, rollouts):
            db.execute(sa.delete(table).where(self._of(table, table.c.query.not_in(kept))))
        lost = db.execute(sa.delete(queries).where(self._of(queries, queries.c.query.not_in(kept)))).rowcount
        left = sa.select(queries.c.query).where(self._of(queries))
        db.execute(sa.delete(groups).where(self._of(groups, groups.c.query.not_in(left))))
        return lost

    @reads
    def rollouts_of(self, db: sa.Connection, query: int) -> list[RolloutRecord]:
        """Return the rollouts of a query, by number."""
        return self._rollouts(db, [query])

    @reads
    def calls_of(self, db: sa.Connection, query: int) -> list[CallRecord]:
        """Return the calls of all agents in a query, ordered by agent, rollout and call."""
        return self._calls(db, [query])

    # ---- within a transaction

    def _group(self, agent: str, numbers: Collection[int]) -> sa.ColumnElement[bool]:
        return self._of(groups, groups.c.agent == agent, groups.c.query.in_(numbers))

    def _expire(self, db: sa.Connection, agent: str, oldest_step: int) -> list[int]:
        """Expire the agent's sealed groups sampled by weights older than `oldest_step`, and return their queries."""
        mine = self._of(calls, calls.c.agent == agent, calls.c.query == groups.c.query, calls.c.step < oldest_step)
        sealed = self._of(groups, groups.c.agent == agent, groups.c.state == "sealed", sa.exists().where(mine))
        stale = sa.update(groups).where(sealed).values(state="expired", reason="stale")
        return sorted(db.scalars(stale.returning(groups.c.query)))

    def _move(
        self, db: sa.Connection, agent: str, numbers: Collection[int], holder: str, state: str, also: dict[str, Any]
    ) -> None:
        """Move leased groups to `state`; leave those that have it already as they are."""
        self.roles.fence(db, agent, holder)
        rows = sa.select(groups.c.query, groups.c.state).where(self._group(agent, numbers)).order_by(groups.c.query)
        found = {query: state for query, state in db.execute(rows.with_for_update())}
        for query in sorted(numbers):
            if (now := found.get(query, "missing")) not in ("leased", state):
                raise ValueError(f"{state}: expected query {query} of agent {agent!r} to be leased, it is {now}")
        leased = sa.and_(self._group(agent, numbers), groups.c.state == "leased")
        db.execute(sa.update(groups).where(leased).values(state=state, **also))

    def _groups(self, db: sa.Connection, agent: str, numbers: Sequence[int]) -> list[Group]:
        ended = _by_query(self._rollouts(db, numbers))
        made = _by_query(self._calls(db, numbers, calls.c.agent == agent))
        rows = sa.select(queries.c.query, queries.c.task, queries.c.step)
        found = db.execute(rows.where(self._of(queries, queries.c.query.in_(numbers))).order_by(queries.c.query))
        return [Group(query, task, step, ended[query], made[query]) for query, task, step in found]

    def _rollouts(self, db: sa.Connection, numbers: Sequence[int]) -> list[RolloutRecord]:
        rows = sa.select(*columns(rollouts)).where(self._of(rollouts, rollouts.c.query.in_(numbers)))
        return [RolloutRecord(**row) for row in db.execute(rows.order_by(*rollouts.primary_key)).mappings()]

    def _calls(self, db: sa.Connection, numbers: Sequence[int], *only: sa.ColumnElement[bool]) -> list[CallRecord]:
        rows = sa.select(*columns(calls)).where(self._of(calls, calls.c.query.in_(numbers), *only))
        return [read_call(row) for row in db.execute(rows.order_by(*calls.primary_key)).mappings()]


def _by_query(records: Iterable[Any]) -> defaultdict[int, list[Any]]:
    grouped = defaultdict(list)
    for record in records:
        grouped[record.query].append(record)
    return grouped
