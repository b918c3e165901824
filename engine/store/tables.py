"""Define the tables of the store (schema version 3), and the records that are written to and read from them.

    runs          the agents and the config of each run; several runs may share a database
    identities    which run it is: the id that its run directory drew, that directory, the digest of its tasks
    roles         which process has which role (one trainer per agent), until when
    publications  the weights that an agent has published, step by step
    queries       which worker samples a query, until when
    groups        each query as one agent trains on it, and its state
    rollouts      how each episode ended
    calls         the calls of each agent in an episode, and where their tokens are
    evaluations   which worker evaluates the weights of a step, and the result

They hold only ids, counts, scores, versions and file positions: the tokens are in the trajectory files.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import sqlalchemy as sa

from mgrpo.engine.run.trajectories import Position

SCHEMA_VERSION = 3  # a change needs a step in store/migrate.py
OLDEST = 2  # schema version that can be migrated
STATES = ("open", "sealed", "leased", "acked", "expired")  # of a group
STATUSES = ("scored", "unscored", "failed")  # of a rollout
FORGOTTEN = "forgotten"  # reason of an acked group whose calls were deleted with their files
UNKNOWN = -1  # step of a checkpoint that is not known

metadata = sa.MetaData()
_KINDS: dict[type, Any] = {str: sa.Text, int: sa.BigInteger, float: sa.Double, bool: sa.Boolean}


def _keys(**columns: type) -> list[sa.Column[Any]]:
    return [sa.Column(name, _KINDS[kind], primary_key=True, autoincrement=False) for name, kind in columns.items()]


def _values(**columns: type) -> list[sa.Column[Any]]:
    return [sa.Column(name, _KINDS[kind], nullable=False) for name, kind in columns.items()]


def _table(name: str, *parts: Any) -> sa.Table:
    """Make a table. On SQLite its rows are in the tree of the primary key, which saves a second tree."""
    return sa.Table(name, metadata, *parts, sqlite_with_rowid=False)


schema = _table("schema_version", *_keys(version=int))
runs = _table("runs", *_keys(run=str), *_values(agents=str, rollouts=int, fingerprint=str))
identities = _table("identities", *_keys(run=str), *_values(id=str, place=str, tasks=str))  # tasks: "" if unknown
roles = _table("roles", *_keys(run=str, role=str), *_values(holder=str, deadline=float))
publications = _table(
    "publications",
    *_keys(run=str, agent=str, step=int),
    *_values(version=int, trained=int, file=str, checksum=str, size=int, probe=str),
)
evaluations = _table(
    "evaluations",
    *_keys(run=str, step=int),
    *_values(worker=str, deadline=float),
    sa.Column("result", sa.Text),  # JSON; NULL until the evaluation has finished
)
queries = _table(
    "queries",
    *_keys(run=str, query=int),
    *_values(task=str, step=int, rollouts=int, sealed=bool, worker=str),
    sa.Column("taken", sa.Double),  # when it was leased, and until when; NULL if it never is (colocated)
    sa.Column("deadline", sa.Double),
    *_values(late=int),  # rollouts that came after it was sealed without them
    sa.Index("queries_by_state", "run", "sealed", "query"),
)
groups = _table(
    "groups",
    *_keys(run=str, query=int, agent=str),
    *_values(state=str, holder=str, reason=str, acks=int),  # reason: why it expired, or FORGOTTEN
    *_values(trained=int),  # the rl step of the checkpoint with which it was acked; UNKNOWN: none, or before version 3
    sa.Index("groups_by_state", "run", "agent", "state", "query"),
)
rollouts = _table(
    "rollouts",
    *_keys(run=str, query=int, rollout=int),
    *_values(status=str, format=bool, correct=float, seconds=float, error=str),
)
calls = _table(
    "calls",
    *_keys(run=str, query=int, agent=str, rollout=int, call=int),
    *_values(format=bool),
    sa.Column("expert", sa.Double),
    *_values(version=int, tokens=int, actions=int, turns=int, truncated=bool, ended=str),
    *_values(file=str, offset=int, row=int),
    *_values(step=int, version_last=int, rows=int, digest=str, sampler_digest=str),
)


_rollout_values, _call_values = (itemgetter(*table.c.keys()) for table in (rollouts, calls))


@dataclass(frozen=True)
class RolloutRecord:
    """Describe one ended rollout of a query.

    status: one of STATUSES; correct: in the units of the main reward; seconds: wall time. format and correct are
    meaningful only if the status is `scored`. Raises ValueError for a score that is not finite.
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
    """Describe one call of one agent in one rollout, numbered per agent and rollout in the order of the calls.

    expert: the judge's score, None for the main agent; tokens, actions, turns: counts (actions: sampled tokens);
    ended: as in `types.Call`. version: the oldest weights that sampled it, in optimizer steps; step: the same weights
    in the agent's rl steps; version_last: the newest weights (-1: the same). rows: index of the last sampled token, 0
    if there is none; digest: of tokens and mask; sampler_digest: of tokens, mask and log-probs; both are 16 bytes of
    blake2b in hex. Raises ValueError for a score that is not finite.
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
    step: int = 0
    version_last: int = -1
    rows: int = 0
    digest: str = ""
    sampler_digest: str = ""

    def __post_init__(self) -> None:
        if self.expert is not None:
            _check_finite(f"expert of {self.agent}, query {self.query}, rollout {self.rollout}", self.expert)


@dataclass(frozen=True)
class Group:
    """Hold a query as one agent trains on it: its rollouts by number, and that agent's calls by rollout and call.

    step: the rl step for which the query was opened.
    """

    query: int
    task: str
    step: int
    rollouts: list[RolloutRecord]
    calls: list[CallRecord]


class Claim(NamedTuple):
    """Hold what a trainer gets: groups to train on, and the numbers of the queries that were too stale for it."""

    groups: list[Group]
    expired: list[int]


@dataclass(frozen=True)
class Lease:
    """Hold a query to sample: the id of its task, and the numbers of the rollouts that are not recorded yet."""

    query: int
    task: str
    missing: list[int]


@dataclass(frozen=True, kw_only=True)
class Publication:
    """Announce the weights of one agent after `step` rl steps, which are `version` optimizer steps.

    trained: the number of groups trained on in these steps, without the dropped ones, which the store counts itself;
    file, checksum, size: of the weights, below the run's weights directory; probe: log-probs of a prompt that trainer
    and sampler both know.
    """

    agent: str
    step: int
    version: int
    trained: int
    file: str
    checksum: str
    size: int
    probe: tuple[float, ...] = ()


def rollout_row(record: RolloutRecord, run: str) -> tuple[Any, ...]:
    """Convert a record to a row of `rollouts`, in the order of the columns."""
    error = record.error.encode("utf-8", "replace").decode().replace("\0", "?")  # an exception's text may hold anything
    return _rollout_values({**vars(record), "run": run, "error": error})


def call_row(record: CallRecord, run: str) -> tuple[Any, ...]:
    """Convert a record to a row of `calls`, in the order of the columns."""
    return _call_values({**vars(record), **vars(record.position), "run": run})


def read_call(row: sa.RowMapping) -> CallRecord:
    """Convert a row of `calls`, without its run, to a record."""
    values: dict[str, Any] = {**row}
    position = Position(values.pop("file"), values.pop("offset"), values.pop("row"))
    return CallRecord(**values, position=position)


def publication_row(publication: Publication, run: str) -> dict[str, Any]:
    """Convert a publication to a row of `publications`, by column."""
    return {**vars(publication), "run": run, "probe": json.dumps(publication.probe, allow_nan=False)}


def read_publication(row: sa.RowMapping) -> Publication:
    """Convert a row of `publications`, without its run, to a publication."""
    values: dict[str, Any] = {**row}
    return Publication(**{**values, "probe": tuple(json.loads(row["probe"]))})


def columns(table: sa.Table) -> list[sa.Column[Any]]:
    """Return the columns of a table except the run."""
    return [column for column in table.c if column.name != "run"]


def _check_finite(what: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{what}: expected a finite number, got {value}")
