"""The shared store: which queries were asked, which rollouts ended, what they scored, who trains on them.

Only ids, counts, scores, versions and file positions cross it; the tokens lie in the trajectory files. A *group* is
one query for one agent; all groups of a query are sealed together, when its K rollouts have ended:

    open --record--> sealed --claim--> leased --ack--> acked          reclaim, at resume, undoes what a checkpoint lacks

Every method is one transaction. Evaluation episodes are not recorded here. SQLAlchemy Core, bound parameters only, so
that PostgreSQL can take SQLite's place (its rows are then locked by the FOR UPDATE … SKIP LOCKED that SQLite ignores).
"""

from __future__ import annotations

import errno
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite

from mgrpo.engine.trajectories import Position

SCHEMA_VERSION = 1
STATES = ("open", "sealed", "leased", "acked")
STATUSES = ("scored", "unscored", "failed")

_metadata = sa.MetaData()


def _keys(**columns: type) -> list[sa.Column[Any]]:
    kinds = {str: sa.Text, int: sa.BigInteger}
    return [sa.Column(name, kinds[kind], primary_key=True, autoincrement=False) for name, kind in columns.items()]


def _values(**columns: type) -> list[sa.Column[Any]]:
    kinds = {str: sa.Text, int: sa.BigInteger, float: sa.Double, bool: sa.Boolean}
    return [sa.Column(name, kinds[kind], nullable=False) for name, kind in columns.items()]


_schema = sa.Table("schema_version", _metadata, *_keys(version=int))
_groups = sa.Table(
    "groups",
    _metadata,
    *_keys(run=str, agent=str, query=int),
    *_values(task=str, step=int, rollouts=int, state=str, holder=str),
    sa.Index("groups_by_state", "run", "agent", "state", "query"),
    sa.Index("groups_by_query", "run", "query"),
)
_rollouts = sa.Table(
    "rollouts",
    _metadata,
    *_keys(run=str, query=int, rollout=int),
    *_values(status=str, format=bool, correct=float, seconds=float, error=str),
)
_calls = sa.Table(
    "calls",
    _metadata,
    *_keys(run=str, agent=str, query=int, rollout=int, call=int),
    *_values(format=bool),
    sa.Column("expert", sa.Double),
    *_values(version=int, tokens=int, actions=int, turns=int, truncated=bool, ended=str),
    *_values(file=str, offset=int, row=int),
    sa.Index("calls_by_query", "run", "query"),
)


@dataclass(frozen=True)
class RolloutRecord:
    """One ended rollout of a query. status: of STATUSES; correct: in the main reward's units; seconds: wall time.

    Only a `scored` rollout's format and correct mean anything. Raises ValueError for a score that is not finite.
    """

    query: int
    rollout: int
    status: str
    format: bool
    correct: float
    seconds: float
    error: str = ""

    def __post_init__(self) -> None:
        assert self.status in STATUSES, self.status
        _check_finite(f"correct of query {self.query}, rollout {self.rollout}", self.correct)


@dataclass(frozen=True)
class CallRecord:
    """One call of one agent in one rollout, numbered per agent and rollout in the order the calls were made.

    expert: the judge's score, None for the main agent; tokens, actions, turns: counts (actions: sampled tokens);
    ended: as in `types.Call`. Raises ValueError for a score that is not finite.
    """

    agent: str
    query: int
    rollout: int
    call: int
    format: bool
    expert: float | None
    version: int
    tokens: int
    actions: int
    turns: int
    truncated: bool
    ended: str
    position: Position

    def __post_init__(self) -> None:
        if self.expert is not None:
            _check_finite(f"expert of {self.agent}, query {self.query}, rollout {self.rollout}", self.expert)


@dataclass(frozen=True)
class Group:
    """A query as one agent trains on it: its rollouts by number, and that agent's calls by rollout and call."""

    query: int
    task: str
    step: int
    rollouts: list[RolloutRecord]
    calls: list[CallRecord]


class Store:
    """One run's part of the store at `url`, `sqlite:///path`. May be shared by threads and by processes.

    Raises ValueError for another kind of URL, a missing directory or a store of another schema version.
    """

    def __init__(self, url: str, run: str) -> None:
        self.run = run
        self._engine = _open(url)

    def open_queries(self, queries: Sequence[tuple[int, str]], agents: Sequence[str], rollouts: int, step: int) -> None:
        """Opens a group for each (query number, task id) and agent, sealed after `rollouts` rollouts. Idempotent."""
        rest = {"run": self.run, "step": step, "rollouts": rollouts, "state": "open", "holder": ""}
        rows = [{**rest, "query": query, "task": task, "agent": agent} for query, task in queries for agent in agents]
        if rows:
            with self._transaction() as db:
                db.execute(sqlite.insert(_groups).on_conflict_do_nothing(), rows)

    def record(self, rollouts: Sequence[RolloutRecord], calls: Sequence[CallRecord]) -> None:
        """Records ended rollouts with all of their calls, and seals the groups whose last rollout this was. Idempotent.

        The first record of a rollout stands: of a retried one nothing is taken, not even calls the first did not make.
        Raises ValueError when a rollout's query is not open to this run's agents.
        """
        assert {(c.query, c.rollout) for c in calls} <= {(r.query, r.rollout) for r in rollouts}
        if not rollouts:
            return
        insert = sqlite.insert(_rollouts).on_conflict_do_nothing()
        keys = insert.returning(_rollouts.c.query, _rollouts.c.rollout)
        with self._transaction() as db:
            self._check_opened(db, rollouts, calls)
            new = {(query, rollout) for query, rollout in db.execute(keys, [self._rollout_row(r) for r in rollouts])}
            rows = [self._call_row(c) for c in calls if (c.query, c.rollout) in new]
            if rows:
                db.execute(sqlite.insert(_calls).on_conflict_do_nothing(), rows)
            self._seal(db, {r.query for r in rollouts})

    def claim(self, agent: str, limit: int, holder: str) -> list[Group]:
        """Leases to `holder` at most `limit` sealed groups of the agent, the lowest query numbers first."""
        mine = self._of(_groups, _groups.c.agent == agent)
        sealed = sa.select(_groups).where(mine, _groups.c.state == "sealed").order_by(_groups.c.query).limit(limit)
        with self._transaction() as db:
            rows = db.execute(sealed.with_for_update(skip_locked=True)).all()
            queries = [row.query for row in rows]
            leased = sa.update(_groups).where(mine, _groups.c.query.in_(queries))
            db.execute(leased.values(state="leased", holder=holder))
            rollouts = _by_query(self._rollouts(db, queries))
            calls = _by_query(self._calls(db, queries, _calls.c.agent == agent))
        return [Group(g.query, g.task, g.step, rollouts[g.query], calls[g.query]) for g in rows]

    def ack(self, agent: str, queries: Iterable[int]) -> None:
        """The agent's optimizer steps on these queries are checkpointed. Idempotent.

        Raises ValueError, and acks none of them, when one is neither leased nor acked.
        """
        wanted = sorted(set(queries))
        mine = self._of(_groups, _groups.c.agent == agent, _groups.c.query.in_(wanted))
        with self._transaction() as db:
            found = db.execute(sa.select(_groups.c.query, _groups.c.state).where(mine).with_for_update())
            states = {query: state for query, state in found}
            for query in wanted:
                if (state := states.get(query, "missing")) not in ("leased", "acked"):
                    raise ValueError(f"ack: expected query {query} of agent {agent!r} to be leased, it is {state}")
            db.execute(sa.update(_groups).where(mine).values(state="acked"))

    def reclaim(self, step: int) -> int:
        """Makes the store agree with a checkpoint that has trained on everything of the steps below `step`.

        A query of those steps that any agent had claimed is trained: all of its groups are acked. Every other query,
        also one acked after that checkpoint was written, belongs to weights that are lost: its groups, rollouts and
        calls are deleted, to be opened and sampled again. Returns how many queries were deleted.
        """
        claimed = self._of(_groups, _groups.c.step < step, _groups.c.state.in_(("leased", "acked")))
        trained = _groups.c.query.in_(sa.select(_groups.c.query).where(claimed))
        lost = self._of(_groups, sa.or_(_groups.c.step >= step, _groups.c.state != "acked"))
        queries = sa.select(_groups.c.query).where(lost).distinct()
        with self._transaction() as db:
            db.execute(sa.update(_groups).where(self._of(_groups, trained)).values(state="acked"))
            count = db.scalar(sa.select(sa.func.count()).select_from(queries.subquery()))
            for table in (_calls, _rollouts, _groups):  # the groups last: they say which are lost
                db.execute(sa.delete(table).where(self._of(table, table.c.query.in_(queries))))
        return int(count or 0)

    def accounting(self) -> dict[str, dict[str, int]]:
        """Of each agent the number of groups in each of STATES."""
        counts = sa.select(_groups.c.agent, _groups.c.state, sa.func.count()).where(self._of(_groups))
        by_agent: dict[str, dict[str, int]] = {}
        with self._transaction() as db:
            for agent, state, count in db.execute(counts.group_by(_groups.c.agent, _groups.c.state)):
                by_agent.setdefault(agent, dict.fromkeys(STATES, 0))[state] = count
        return by_agent

    def rollouts_of(self, query: int) -> list[RolloutRecord]:
        with self._transaction() as db:
            return self._rollouts(db, [query])

    def calls_of(self, query: int) -> list[CallRecord]:
        """Of all agents, by agent, rollout and call."""
        with self._transaction() as db:
            return self._calls(db, [query])

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        """All of it or nothing. Raises OSError when the store cannot be read or written, as when the disk is full."""
        try:
            with self._engine.begin() as db:
                yield db
        except sa.exc.OperationalError as error:
            url = self._engine.url.render_as_string(hide_password=True)
            raise OSError(errno.EIO, f"store {url}: {error.orig}") from error

    def _of(self, table: sa.Table, *conditions: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
        return sa.and_(table.c.run == self.run, *conditions)

    def _check_opened(self, db: sa.Connection, rollouts: Sequence[RolloutRecord], calls: Sequence[CallRecord]) -> None:
        """A query that `reclaim` deleted must not come back by a late write."""
        columns = sa.select(_groups.c.agent, _groups.c.query, _groups.c.rollouts)
        found = db.execute(columns.where(self._of(_groups, _groups.c.query.in_({r.query for r in rollouts})))).all()
        size = {query: count for _, query, count in found}
        for r in rollouts:
            if r.query not in size:
                raise ValueError(f"record: query {r.query} of run {self.run!r} was not opened")
            assert 0 <= r.rollout < size[r.query], f"query {r.query} has {size[r.query]} rollouts, got {r.rollout}"
        groups = {(agent, query) for agent, query, _ in found}
        for c in calls:
            if (c.agent, c.query) not in groups:
                raise ValueError(f"record: query {c.query} was not opened for agent {c.agent!r}")

    def _seal(self, db: sa.Connection, queries: set[int]) -> None:
        ended = sa.select(sa.func.count()).where(self._of(_rollouts, _rollouts.c.query == _groups.c.query))
        full = self._of(_groups, _groups.c.query.in_(queries), _groups.c.rollouts == ended.scalar_subquery())
        db.execute(sa.update(_groups).where(full, _groups.c.state == "open").values(state="sealed"))

    def _rollout_row(self, record: RolloutRecord) -> dict[str, Any]:
        error = (
            record.error.encode("utf-8", "replace").decode().replace("\0", "?")
        )  # an exception's text may hold anything
        return {**vars(record), "run": self.run, "error": error}

    def _call_row(self, record: CallRecord) -> dict[str, Any]:
        row = {**vars(record), **vars(record.position), "run": self.run}
        del row["position"]
        return row

    def _rollouts(self, db: sa.Connection, queries: Sequence[int]) -> list[RolloutRecord]:
        columns = [column for column in _rollouts.c if column.name != "run"]
        rows = sa.select(*columns).where(self._of(_rollouts, _rollouts.c.query.in_(queries)))
        return [RolloutRecord(**row) for row in db.execute(rows.order_by(*_rollouts.primary_key)).mappings()]

    def _calls(self, db: sa.Connection, queries: Sequence[int], *only: sa.ColumnElement[bool]) -> list[CallRecord]:
        columns = [column for column in _calls.c if column.name != "run"]
        rows = sa.select(*columns).where(self._of(_calls, _calls.c.query.in_(queries), *only))
        return [_call(dict(row)) for row in db.execute(rows.order_by(*_calls.primary_key)).mappings()]


def _call(row: dict[str, Any]) -> CallRecord:
    position = Position(row.pop("file"), row.pop("offset"), row.pop("row"))
    return CallRecord(**row, position=position)


def _by_query(records: Iterable[Any]) -> defaultdict[int, list[Any]]:
    grouped = defaultdict(list)
    for record in records:
        grouped[record.query].append(record)
    return grouped


def _check_finite(what: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{what}: expected a finite number, got {value}")


def _open(url: str) -> sa.Engine:
    engine = sa.create_engine(_sqlite_url(url), connect_args={"timeout": 60})
    sa.event.listen(engine, "connect", _configure)
    sa.event.listen(engine, "begin", _begin)
    with engine.begin() as db:
        if not sa.inspect(db).has_table(_schema.name):
            _metadata.create_all(db)
            db.execute(sa.insert(_schema).values(version=SCHEMA_VERSION))
        versions = db.scalars(sa.select(_schema.c.version)).all()
    if versions != [SCHEMA_VERSION]:
        engine.dispose()
        raise ValueError(f"store {url}: expected schema version {SCHEMA_VERSION}, found {versions}")
    return engine


def _sqlite_url(url: str) -> sa.URL:
    if not url.startswith("sqlite:///") or url in ("sqlite:///", "sqlite:///:memory:"):
        raise ValueError(f"store: expected 'sqlite:///' and the path of a file, got {url!r}")
    parsed = sa.make_url(url)
    directory = Path(parsed.database or "").parent
    if not directory.is_dir():
        raise ValueError(f"store: {url!r} is in a directory that does not exist: {directory}")
    return parsed


def _configure(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # pysqlite would begin transactions late, and not before a SELECT
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")


def _begin(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")  # else two that read first and write then end in SQLITE_BUSY
