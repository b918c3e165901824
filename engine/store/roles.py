"""Keep what the store knows of processes: their roles, the published weights, and the evaluations of these.

A *role* is held by one process at a time, until a deadline that the process must keep moving. Writes of a trainer are
fenced: they are refused, in the same transaction, once another process holds the role. A lapsed role that no other
process took still belongs to its holder: this is safe, and a trainer that was only slow can go on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import sqlalchemy as sa

from mgrpo.engine.run.metrics import plain
from mgrpo.engine.store.database import Part, lapsed, reads, writes
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

END, PATIENCE = "eval/end", "eval/patience"  # in the result of the evaluation that ends a run early
_other = publications.alias()
_same_agent = sa.and_(_other.c.run == publications.c.run, _other.c.agent == publications.c.agent)
LATEST = sa.select(sa.func.max(_other.c.step)).where(_same_agent).scalar_subquery()  # of a publication's agent


class FencedError(RuntimeError):
    """Report that another process has taken over this trainer's role, so that nothing it still writes may count."""


class Roles(Part):
    """Begin runs, and keep roles, publications and evaluations."""

    @writes
    def begin_run(self, db: sa.Connection, agents: Sequence[str], rollouts: int, fingerprint: str) -> None:
        """Create the run unless it is there: every process of a decoupled run calls this first. Idempotent.

        agents: in the order of the config; rollouts: K, per query. Raises ValueError if the run is there with other
        agents, rollouts or fingerprint.
        """
        row = {"run": self.run, "agents": json.dumps(list(agents)), "rollouts": rollouts, "fingerprint": fingerprint}
        db.execute(self._insert(runs).on_conflict_do_nothing(), row)
        found = db.execute(sa.select(runs).where(self._of(runs))).mappings().one()
        for key, given in row.items():
            if found[key] != given:
                raise ValueError(
                    f"run {self.run!r}: {key}: {given} given: expected {found[key]}, as when the run was created"
                    + (": `mgrpo store init` names the key" if key == "fingerprint" else "")
                )

    @writes
    def renew(self, db: sa.Connection, fingerprint: str) -> None:
        """Take another fingerprint for the run, after its config was compared with the one that it had. Idempotent."""
        db.execute(sa.update(runs).where(self._of(runs)).values(fingerprint=fingerprint))

    @writes
    def hold(self, db: sa.Connection, role: str, holder: str, seconds: float) -> None:
        """Take the role for a number of seconds, when a process starts. Raises ValueError naming another holder."""
        row = {"run": self.run, "role": role, "holder": holder, "deadline": self.now + seconds}
        insert = self._insert(roles).values(row)
        free = sa.or_(roles.c.holder == holder, lapsed(roles.c.deadline, self.now, seconds))
        changed = {"holder": insert.excluded.holder, "deadline": insert.excluded.deadline}
        taken = insert.on_conflict_do_update(index_elements=roles.primary_key, set_=changed, where=free)
        if db.execute(taken.returning(roles.c.role)).first() is None:
            held = sa.select(roles.c.holder, roles.c.deadline - self.now).where(self._of(roles, roles.c.role == role))
            other, left = db.execute(held).one()
            raise ValueError(f"{role} of run {self.run!r} is held by {other} for another {left:.0f} s")

    @writes
    def keep(self, db: sa.Connection, role: str, holder: str, seconds: float) -> None:
        """Keep the role for a number of seconds, even if it lapsed. Raises FencedError if another had it meanwhile.

        Unlike `hold`, this never takes a free role: a trainer that was believed dead must not take back a role that a
        successor, with other weights, has held and released.
        """
        mine = sa.update(roles).where(self._of(roles, roles.c.role == role, roles.c.holder == holder))
        if not db.execute(mine.values(deadline=self.now + seconds)).rowcount:
            raise FencedError(f"{role} of run {self.run!r} is no longer held by {holder}")

    @writes
    def check(self, db: sa.Connection, agent: str, holder: str) -> None:
        """Check that `holder` is the agent's trainer. Raises FencedError."""
        self.fence(db, agent, holder)

    @writes
    def release(self, db: sa.Connection, role: str, holder: str) -> None:
        """Free the role at once. Do nothing if another process holds it by now."""
        db.execute(sa.delete(roles).where(self._of(roles, roles.c.role == role, roles.c.holder == holder)))

    @writes
    def publish(self, db: sa.Connection, publication: Publication, holder: str) -> None:
        """Announce new weights to the workers. Another publication of the step is replaced. Raises FencedError."""
        self.fence(db, publication.agent, holder)
        insert = self._insert(publications)
        keys = [column.name for column in publications.primary_key]
        rest = {c.name: insert.excluded[c.name] for c in publications.c if c.name not in keys}
        db.execute(insert.on_conflict_do_update(index_elements=keys, set_=rest), publication_row(publication, self.run))

    @writes
    def rewind(self, db: sa.Connection, agent: str, step: int, holder: str) -> None:
        """Delete the agent's publications after `step`, whose weights are lost, and all evaluations of later steps.

        Raises FencedError.
        """
        self.fence(db, agent, holder)
        mine = self._of(publications, publications.c.agent == agent, publications.c.step > step)
        db.execute(sa.delete(publications).where(mine))
        db.execute(sa.delete(evaluations).where(self._of(evaluations, evaluations.c.step > step)))

    @reads
    def publications(self, db: sa.Connection, step: int | None = None) -> dict[str, Publication]:
        """Return the publication of that step, or the latest, by agent. Agents without one are left out."""
        return self.read_publications(db, step)

    # ---- evaluations

    @writes
    def open_evaluation(self, db: sa.Connection, step: int) -> bool:
        """Let the step be evaluated if all agents have published it, and return whether they have.

        Each trainer calls this after it has published `step`. Idempotent: an evaluation is made once, unless its
        weights are lost.
        """
        published_by_all = set(self.begun(db)[0]) == set(self.read_publications(db, step))
        if published_by_all:
            row = {"run": self.run, "step": step, "worker": "", "deadline": 0.0}
            db.execute(self._insert(evaluations).on_conflict_do_nothing(), row)
        return published_by_all

    @writes
    def take_evaluation(self, db: sa.Connection, worker: str, lease: float) -> int | None:
        """Lease the earliest step that waits for its evaluation, or extend the worker's lease of it, and return it.

        The weights to evaluate are `publications(step)`. Returns None if there is nothing to evaluate.
        """
        free = sa.or_(evaluations.c.worker == worker, lapsed(evaluations.c.deadline, self.now, lease))
        waiting = self._of(evaluations, evaluations.c.result.is_(None), free)
        first = sa.select(evaluations.c.step).where(waiting).order_by(evaluations.c.step).limit(1)
        step = db.scalar(first.with_for_update(skip_locked=True))
        if step is not None:
            mine = self._of(evaluations, evaluations.c.step == step)
            db.execute(sa.update(evaluations).where(mine).values(worker=worker, deadline=self.now + lease))
        return step

    @writes
    def finish_evaluation(
        self, db: sa.Connection, step: int, worker: str, result: Mapping[str, float], patience: int = 0
    ) -> bool:
        """Store the result and return True, or return False if there is one already or the weights are lost.

        patience: if above 0, the run is to end for want of a better score: with the step after the newest that any
        agent has published, which is the earliest that no agent has passed. `end` returns it.
        """
        waiting = self._of(
            evaluations,
            evaluations.c.step == step,
            evaluations.c.worker == worker,
            evaluations.c.result.is_(None),
        )
        found = plain(dict(result))
        if patience:
            found |= {END: self._newest(db) + 1, PATIENCE: patience}
        values = {"result": json.dumps(found, allow_nan=False)}
        return db.execute(sa.update(evaluations).where(waiting).values(values)).rowcount == 1

    @writes
    def note_evaluation(self, db: sa.Connection, step: int, result: Mapping[str, float]) -> None:
        """Store the result of a run whose one process evaluates; an earlier result of the step is replaced."""
        row = {"run": self.run, "step": step, "worker": "", "deadline": 0.0}
        insert = self._insert(evaluations).values(row | {"result": json.dumps(plain(dict(result)), allow_nan=False)})
        keys = [column.name for column in evaluations.primary_key]
        db.execute(insert.on_conflict_do_update(index_elements=keys, set_={"result": insert.excluded.result}))

    @writes
    def forget_evaluations(self, db: sa.Connection, after: int) -> None:
        """Delete the evaluations of later steps, whose weights are lost."""
        db.execute(sa.delete(evaluations).where(self._of(evaluations, evaluations.c.step > after)))

    @reads
    def end(self, db: sa.Connection, patience: int) -> int | None:
        """Return the step at which the run ends early, or None if it does not, with that patience of now."""
        found = [result for result in self.read_evaluations(db).values() if result.get(PATIENCE) == patience]
        return min((int(result[END]) for result in found), default=None) if patience else None

    @reads
    def evaluations(self, db: sa.Connection) -> dict[int, dict[str, float]]:
        """Return the results of the finished evaluations, by step."""
        return self.read_evaluations(db)

    # ---- within a transaction, also of other parts of the store

    def _newest(self, db: sa.Connection) -> int:
        """Return the newest step that any agent has published; no agent publishes until the commit."""
        trainers = self._of(roles, roles.c.role.startswith("trainer:"))
        db.execute(sa.select(roles.c.role).where(trainers).order_by(roles.c.role).with_for_update()).all()
        newest = db.scalar(sa.select(sa.func.max(publications.c.step)).where(self._of(publications)))
        return int(newest or 0)

    def read_evaluations(self, db: sa.Connection) -> dict[int, dict[str, float]]:
        """Return the results of the finished evaluations, by step."""
        finished = self._of(evaluations, evaluations.c.result.is_not(None))
        found = db.execute(sa.select(evaluations.c.step, evaluations.c.result).where(finished).order_by("step"))
        return {step: json.loads(result) for step, result in found}

    def begun(self, db: sa.Connection, *, lock: bool = False) -> tuple[list[str], int]:
        """Return the run's agents and K. With `lock`, let only one transaction at a time pass.

        Raises ValueError if the run was not created.
        """
        row = sa.select(runs.c.agents, runs.c.rollouts).where(self._of(runs))
        found = db.execute(row.with_for_update() if lock else row).first()
        if found is None:
            raise ValueError(f"store {self.database.name}: no run {self.run!r}: expected `mgrpo store init` before")
        return json.loads(found.agents), found.rollouts

    def fence(self, db: sa.Connection, agent: str, holder: str) -> None:
        """Check that `holder` is the agent's trainer, and lock the role until the commit. Raises FencedError.

        Accept any holder in a colocated run, which was never begun here and has no roles.
        """
        if db.scalar(sa.select(runs.c.run).where(self._of(runs))) is None:
            return
        role = sa.select(roles.c.holder).where(self._of(roles, roles.c.role == f"trainer:{agent}"))
        found = db.scalar(role.with_for_update(read=True))
        if found != holder:
            raise FencedError(f"trainer:{agent} of run {self.run!r} is held by {found}, no longer by {holder}")

    def read_publications(self, db: sa.Connection, step: int | None = None) -> dict[str, Publication]:
        """Return the publications of that step, or the latest, by agent."""
        of_step = publications.c.step == (LATEST if step is None else step)
        rows = sa.select(*columns(publications)).where(self._of(publications, of_step)).order_by(publications.c.agent)
        return {row["agent"]: read_publication(row) for row in db.execute(rows).mappings()}
