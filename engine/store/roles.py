"""The part of the store about processes: who acts as what, which weights are published, who evaluates them.

A *role* is held by one process at a time, with a deadline that it must keep moving. What a trainer writes is fenced: it
is refused, in the same transaction, once another holds the role. A role that lapsed and that nobody took is still its
holder's: that is safe, and a trainer that was only slow goes on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import sqlalchemy as sa

from mgrpo.engine.store.database import Database, reads, writes
from mgrpo.engine.store.tables import (
    Publication,
    columns,
    evaluations,
    publication_row,
    publications,
    read_publication,
    roles,
    runs,
)

_other = publications.alias()
_same_agent = sa.and_(_other.c.run == publications.c.run, _other.c.agent == publications.c.agent)
LATEST = sa.select(sa.func.max(_other.c.step)).where(_same_agent).scalar_subquery()  # of a publication's agent


class FencedError(RuntimeError):
    """Another process has taken over this trainer's role: nothing it still writes may count."""


class Roster(Database):
    """Runs, roles, publications and evaluations."""

    @writes
    def begin_run(self, db: sa.Connection, agents: Sequence[str], rollouts: int, fingerprint: str) -> None:
        """Every process of a decoupled run begins with this. agents: in the config's order; rollouts: K, per query.

        Idempotent. Raises ValueError when the run is there with other agents, rollouts or fingerprint.
        """
        row = {"run": self.run, "agents": json.dumps(list(agents)), "rollouts": rollouts, "fingerprint": fingerprint}
        db.execute(self._insert(runs).on_conflict_do_nothing(), row)
        found = db.execute(sa.select(runs).where(self._of(runs))).mappings().one()
        for key, given in row.items():
            if found[key] != given:
                raise ValueError(f"run {self.run!r}: {key}: {given} given: expected {found[key]}, as it was begun with")

    @writes
    def hold(self, db: sa.Connection, role: str, holder: str, seconds: float) -> None:
        """Takes the role for so many seconds, at a process' begin. Raises ValueError naming who holds it."""
        row = {"run": self.run, "role": role, "holder": holder, "deadline": self.now + seconds}
        insert = self._insert(roles).values(row)
        free = sa.or_(roles.c.holder == holder, roles.c.deadline < self.now)
        changed = {"holder": insert.excluded.holder, "deadline": insert.excluded.deadline}
        taken = insert.on_conflict_do_update(index_elements=roles.primary_key, set_=changed, where=free)
        if db.execute(taken.returning(roles.c.role)).first() is None:
            held = sa.select(roles.c.holder, roles.c.deadline - self.now).where(self._of(roles, roles.c.role == role))
            other, left = db.execute(held).one()
            raise ValueError(f"{role} of run {self.run!r} is held by {other} for another {left:.0f} s")

    @writes
    def keep(self, db: sa.Connection, role: str, holder: str, seconds: float) -> None:
        """Keep the role for so many seconds, even if it has lapsed. Raises FencedError if another has had it meanwhile.

        Not `hold`: who was taken for dead must not take back what a successor has held and left, with other weights.
        """
        mine = sa.update(roles).where(self._of(roles, roles.c.role == role, roles.c.holder == holder))
        if not db.execute(mine.values(deadline=self.now + seconds)).rowcount:
            raise FencedError(f"{role} of run {self.run!r} is no longer held by {holder}")

    @writes
    def release_role(self, db: sa.Connection, role: str, holder: str) -> None:
        """The role is free at once. Nothing happens if another holds it by now."""
        db.execute(sa.delete(roles).where(self._of(roles, roles.c.role == role, roles.c.holder == holder)))

    @writes
    def publish(self, db: sa.Connection, publication: Publication, holder: str) -> None:
        """Tells the workers of new weights. Of one step the last publication stands. Raises FencedError."""
        self._fence(db, publication.agent, holder)
        insert = self._insert(publications)
        keys = [column.name for column in publications.primary_key]
        rest = {c.name: insert.excluded[c.name] for c in publications.c if c.name not in keys}
        db.execute(insert.on_conflict_do_update(index_elements=keys, set_=rest), publication_row(publication, self.run))

    @writes
    def rewind(self, db: sa.Connection, agent: str, step: int, holder: str) -> None:
        """The agent's weights after `step` are lost: deletes their publications, and all evaluations of later steps.

        Raises FencedError.
        """
        self._fence(db, agent, holder)
        mine = self._of(publications, publications.c.agent == agent, publications.c.step > step)
        db.execute(sa.delete(publications).where(mine))
        db.execute(sa.delete(evaluations).where(self._of(evaluations, evaluations.c.step > step)))

    @reads
    def publications(self, db: sa.Connection, step: int | None = None) -> dict[str, Publication]:
        """By agent, the publication of that step, or the latest. An agent without one is not there."""
        return self._publications(db, step)

    # ---- evaluations

    @writes
    def open_evaluation(self, db: sa.Connection, step: int) -> bool:
        """To be called by each trainer when it has published `step`: when it is the last, the step can be evaluated.

        Returns whether all agents have. Idempotent: an evaluation is made once, unless its weights are lost.
        """
        whole = set(self._begun(db)[0]) == set(self._publications(db, step))
        if whole:
            row = {"run": self.run, "step": step, "worker": "", "deadline": 0.0}
            db.execute(self._insert(evaluations).on_conflict_do_nothing(), row)
        return whole

    @writes
    def take_evaluation(self, db: sa.Connection, worker: str, lease: float) -> int | None:
        """Leases the earliest step that waits for its evaluation, or extends the worker's lease of it.

        Its weights are `publications(step)`. None when there is nothing to evaluate.
        """
        free = sa.or_(evaluations.c.worker == worker, evaluations.c.deadline < self.now)
        waiting = self._of(evaluations, evaluations.c.result.is_(None), free)
        first = sa.select(evaluations.c.step).where(waiting).order_by(evaluations.c.step).limit(1)
        step = db.scalar(first.with_for_update(skip_locked=True))
        if step is not None:
            mine = self._of(evaluations, evaluations.c.step == step)
            db.execute(sa.update(evaluations).where(mine).values(worker=worker, deadline=self.now + lease))
        return step

    @writes
    def finish_evaluation(self, db: sa.Connection, step: int, worker: str, result: Mapping[str, float]) -> bool:
        """Returns whether the result was taken: it is not when another's stands or the weights are lost."""
        waiting = self._of(
            evaluations,
            evaluations.c.step == step,
            evaluations.c.worker == worker,
            evaluations.c.result.is_(None),
        )
        values = {"result": json.dumps(dict(result), allow_nan=False)}
        return db.execute(sa.update(evaluations).where(waiting).values(values)).rowcount == 1

    @reads
    def evaluations(self, db: sa.Connection) -> dict[int, dict[str, float]]:
        """The results that are there, by step."""
        there = self._of(evaluations, evaluations.c.result.is_not(None))
        found = db.execute(sa.select(evaluations.c.step, evaluations.c.result).where(there).order_by("step"))
        return {step: json.loads(result) for step, result in found}

    # ---- within a transaction

    def _begun(self, db: sa.Connection, *, lock: bool = False) -> tuple[list[str], int]:
        """The run's agents and K; with `lock` one transaction at a time goes past here. Raises ValueError."""
        row = sa.select(runs.c.agents, runs.c.rollouts).where(self._of(runs))
        found = db.execute(row.with_for_update() if lock else row).first()
        if found is None:
            raise ValueError(f"store {self.name}: run {self.run!r} is not there, expected `mgrpo store init` before")
        return json.loads(found.agents), found.rollouts

    def _fence(self, db: sa.Connection, agent: str, holder: str) -> None:
        """Colocated runs, which were never begun here, have no roles. The lock keeps others off until the commit."""
        if db.scalar(sa.select(runs.c.run).where(self._of(runs))) is None:
            return
        role = sa.select(roles.c.holder).where(self._of(roles, roles.c.role == f"trainer:{agent}"))
        found = db.scalar(role.with_for_update(read=True))
        if found != holder:
            raise FencedError(f"trainer:{agent} of run {self.run!r} is held by {found}, no longer by {holder}")

    def _publications(self, db: sa.Connection, step: int | None = None) -> dict[str, Publication]:
        """Of that step, or the latest, by agent."""
        wanted = publications.c.step == (LATEST if step is None else step)
        rows = sa.select(*columns(publications)).where(self._of(publications, wanted)).order_by(publications.c.agent)
        return {row["agent"]: read_publication(row) for row in db.execute(rows).mappings()}
