"""Open queries, record rollouts and publish weights for tests of a decoupled run's store."""

from __future__ import annotations

from mgrpo.engine.run.trajectories import Position
from mgrpo.engine.store import CallRecord, Publication, RolloutRecord, Store
from mgrpo.engine.store.tables import Lease

AGENTS = ("main", "search")
K, Q = 3, 2  # rollouts per query, queries per step


def episode(query: int, rollout: int, step: int = 0, subs: int = 1) -> tuple[list[RolloutRecord], list[CallRecord]]:
    """Make the records of a scored rollout by weights of an rl step: one call of main and `subs` of search."""

    def call(agent: str, number: int) -> CallRecord:
        position = Position(f"{agent}-{query:05d}.arrow", 8 * rollout, number)
        expert = None if agent == "main" else 0.5
        facts = (90, 30, 2, False, "answer", position, step, 9, 89, "ab", "cd")
        return CallRecord(agent, query, rollout, number, True, expert, 3, *facts)

    ended = RolloutRecord(query, rollout, "scored", True, 0.5, 1.25)
    return [ended], [call("main", 0), *(call("search", n) for n in range(subs))]


def publication(agent: str, step: int, file: str = "w.safetensors") -> Publication:
    """Make the record of published weights."""
    checksum, probe = "00ff", (-1.5, -0.25)
    return Publication(
        agent=agent, step=step, version=2 * step, trained=Q * step, file=file, checksum=checksum, size=8, probe=probe
    )


def begin(store: Store, holder: str = "me") -> Store:
    """Create the run, hold both trainers' roles, and publish their first weights."""
    store.roles.begin_run(AGENTS, K, "print")
    for agent in AGENTS:
        store.roles.hold(f"trainer:{agent}", holder, 1000)
        store.roles.publish(publication(agent, 0), holder)
    return store


def take(
    store: Store,
    worker: str = "w",
    count: int = 99,
    ahead: int = 2 * Q,
    total: int = 99,
    lease: float = 60,
    loaded: dict[str, int] | None = None,
) -> list[Lease]:
    """Take queries as a worker does."""
    return store.queries.take(
        worker, count, ahead=ahead, total=total, task_of=lambda q: f"task {q}", lease=lease, loaded=loaded
    )


def finish(store: Store, query: int, step: int = 0) -> None:
    """Record all rollouts of a query."""
    for rollout in range(K):
        store.queries.record(*episode(query, rollout, step))


def balanced(store: Store) -> bool:
    """Return whether no invariant of the store is violated."""
    return not any(store.audit.balance()["violations"].values())
