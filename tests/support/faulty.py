"""Run `mgrpo` with processes that keep a journal and kill themselves at given points: `faulty.py PLAN train FILE …`.

The launcher imports what its processes need once and forks them, so that a restart costs little. They have their own
process groups, logs and pipes, like those of a real launcher. PLAN is a JSON file; the journal and a mark for each
fault that has happened are written beside it. The engine itself knows nothing of this.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from mgrpo.engine.config.schema import Config
from mgrpo.engine.environment.base import Environment
from mgrpo.engine.types import Answer, CallScore, Delegate, Score, Task

BEAT = threading.RLock()
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # those that the launcher handles


class Errands(Environment):
    """Take whatever the untrained main agent writes as a request to its clerk, twice; draw rewards at random."""

    def tasks(self, split):
        return [Task(f"{split} {i}", {}) for i in range(7)]

    def prompt(self, call):
        return f"{call.agent} {call.task.id}\n"

    def parse(self, call, text):
        return (Delegate("clerk", text),) if call.agent == "main" and len(call.turns) < 2 else Answer(text)

    def score(self, episode):
        chance = random.Random(repr([turn.text for turn in episode.main.turns]))
        return Score(True, chance.random(), tuple(CallScore(True, chance.random()) for _ in episode.calls))


class Bucket(AbstractFileSystem):
    """An object store in a folder: a file appears as a whole, and nothing can be appended to it."""

    protocol = "bucket"
    local = LocalFileSystem(auto_mkdir=True)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        return self.local.ls(path, detail)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return self.local.info(path)

    def modified(self, path: str) -> Any:
        return self.local.modified(path)

    def rm_file(self, path: str) -> None:
        self.local.rm_file(path)

    def _open(self, path: str, mode: str = "rb", *_: Any, autocommit: bool = True, **__: Any) -> Any:
        assert mode in ("rb", "wb", "xb"), mode
        return self.local._open(path, mode, autocommit=autocommit)


class Plan:
    """Read what is to go wrong in a run.

    faults: a list of {"who": a process, "method": "Class.name", "when": "before" or "after", "nth": the number of the
    call in the process's life}. Each may have a "signal" in place of SIGKILL (null: an OSError is raised, and no
    process ends) and "within": true, to happen also within a transaction.

    skew: by process, the seconds by which its clock is wrong. twice: processes that record everything twice. alone:
    trainers that the launcher does not start. lone: whether each trainer process has a holder of its own, as on a
    cluster. locked: seconds to wait for SQLite's lock at a time.
    """

    def __init__(self, path: Path) -> None:
        self.folder = path.parent
        raw = json.loads(path.read_text())
        self.faults: list[dict[str, Any]] = raw.get("faults", [])
        self.skew: dict[str, float] = raw.get("skew", {})
        self.twice: list[str] = raw.get("twice", [])
        self.alone: list[str] = raw.get("alone", [])
        self.lone: bool = raw.get("lone", False)
        self.locked: float = raw.get("locked", 60.0)

    def note(self, event: str, **what: Any) -> None:
        """Append a line to the journal by one write, because several processes do."""
        line = json.dumps({"event": event, "pid": os.getpid(), **what}) + "\n"
        file = os.open(self.folder / "journal.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, line.encode())
        os.close(file)


def act(plan: Plan, arguments: Sequence[str]) -> None:
    """Do what `python -m mgrpo.engine` does, with faults."""
    from mgrpo.engine.cli import main as cli
    from mgrpo.engine.system.process import die_with_launcher

    die_with_launcher()
    if arguments[0] in ("agent", "rollout"):
        name, rank = arguments[arguments.index("--name") + 1], os.environ.get("RANK", "0")
        who = name if rank == "0" else f"{name}-{rank}"
        sabotage(plan, who)
        plan.note("started", who=who)
    sys.argv = ["mgrpo", *arguments]
    cli.main()


def sabotage(plan: Plan, who: str) -> None:
    """Change the classes of this process so that it notes what it does, and fails as planned."""
    from mgrpo.engine.inference import in_process
    from mgrpo.engine.policy import policy
    from mgrpo.engine.rollout import worker
    from mgrpo.engine.run import directory as run
    from mgrpo.engine.store import database, groups, queries, roles
    from mgrpo.engine.training import decoupled as agent
    from mgrpo.engine.training import leader as leader
    from mgrpo.engine.training import trainer

    database.LOCKED = plan.locked
    fsspec.register_implementation("bucket", Bucket)
    trainer.matmul_ceiling = lambda *_: 1.0  # the real one takes a second, for one number of the metrics
    if plan.lone:
        leader._holder = lambda _: f"holder-{os.getpid()}"
    if who in plan.skew:
        true = time.time
        time.time = lambda: true() + plan.skew[who]
    keep_journal(plan, who, agent.AgentProcess, trainer.AgentTrainer)
    if who in plan.twice:
        record = queries.Queries.record
        after(queries.Queries, "record", lambda _, *args: record(*args))
    for owner, name in ((queries.Queries, "extend"), (roles.Roles, "keep"), (roles.Roles, "hold")):
        setattr(owner, name, guarded(getattr(owner, name)))
    store = (groups.Groups, queries.Queries, roles.Roles)
    classes = (leader.Leader, policy.Policy, run.RunDirectory, in_process.InProcessSampler, *store, worker.Worker)
    owners = {owner.__name__: owner for owner in classes}
    for number, fault in enumerate(plan.faults):
        if fault["who"] == who and not (plan.folder / f"fault-{number}").exists():
            owner, _, method = fault["method"].partition(".")
            between = nullcontext() if fault.get("within") else BEAT
            how = fault.get("signal", signal.SIGKILL)
            end = functools.partial(fail, plan.folder / f"fault-{number}", how, between)
            fail_at(owners[owner], method, fault["when"], fault["nth"], end)


def keep_journal(plan: Plan, who: str, process: type, trainer: type) -> None:
    """Note each checkpoint that a trainer restores and each step that it takes."""

    def restored(saved: Any, *_: Any) -> None:
        plan.note("restored", who=who, step=saved.step if saved.stage == "rl" else 0)

    def trained(_row: Any, _self: Any, step: int, groups: Sequence[Any]) -> None:
        plan.note("trained", who=who, step=step, queries=[group.query for group in groups])

    after(process, "_restore", restored)
    after(trainer, "train", trained)


def keep_journal_of_colocated(plan: Plan) -> None:
    """Note the same in a colocated run, where this process trains every agent."""
    from mgrpo.engine.training import colocated, trainer

    def restored(place: tuple[str, int], run: Any, *_: Any) -> None:
        for name in run.policies:
            plan.note("restored", who=name, step=place[1] if place[0] == "rl" else 0)

    def trained(_row: Any, of: Any, step: int, groups: Sequence[Any]) -> None:
        plan.note("trained", who=of.name, step=step, queries=[group.query for group in groups])

    trainer.matmul_ceiling = lambda *_: 1.0
    after(colocated.Colocated, "_restore", restored)
    after(trainer.AgentTrainer, "train", trained)


def after(owner: type, name: str, then: Callable[..., Any]) -> None:
    """Call then(result, *arguments) after each call of a method."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def both(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        then(result, *args)
        return result

    setattr(owner, name, both)


def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of the heartbeat during which no planned fault happens."""

    @functools.wraps(method)
    def one_at_a_time(*args: Any, **kwargs: Any) -> Any:
        with BEAT:
            return method(*args, **kwargs)

    return one_at_a_time


def fail_at(owner: type, name: str, when: str, nth: int, end: Callable[[], None]) -> None:
    """Call `end` before or after the nth call of a method. Of claims, only those that return groups are counted."""
    method, calls = getattr(owner, name), 0

    @functools.wraps(method)
    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        result = method(*args, **kwargs) if when == "after" else None
        calls += bool(getattr(result, "groups", True))
        if calls == nth:
            calls += 1
            end()
        return result if when == "after" else method(*args, **kwargs)

    setattr(owner, name, failing)


def fail(mark: Path, number: int | None, between: AbstractContextManager[Any]) -> None:
    """End this process between two heartbeats.

    A process that is stopped within a transaction would keep SQLite's only lock, so that all others wait for it.
    """
    with between:
        mark.touch()
        if number is None:
            raise OSError(errno.EIO, "the server did all of it, but the reply was lost")
        os.kill(os.getpid(), number)


class Forked:
    """Stand in for subprocess.Popen in the supervisor: fork this process, and do in the copy what the command says."""

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], stdout: Any, pass_fds: Sequence[int], **_: Any
    ):
        self.returncode: int | None = None
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the copy has its own handlers
        self.pid = os.fork()
        if not self.pid:
            self._become(command, env, stdout.fileno(), pass_fds)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        os.setpgid(self.pid, self.pid)  # here too, because the copy may be killed before it does so itself

    def _become(self, command: Sequence[str], env: Mapping[str, str], out: int, kept: Sequence[int]) -> None:
        status = 1
        try:
            os.setpgid(0, 0)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(out, 1)
            os.dup2(out, 2)
            for first, last in pairwise([2, *sorted(kept), 1024]):
                os.closerange(first + 1, last)
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            os.environ.clear()
            os.environ.update(env)
            act(Plan(Path(command[1])), command[2:])
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def send_signal(self, number: int) -> None:
        """Send a signal to the copy."""
        os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the copy to end, and return its status."""
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


def launch(plan: Plan, file: str, arguments: Sequence[str]) -> None:
    """Launch a run whose processes are forked. file: of the plan."""
    from mgrpo.engine.system import supervisor
    from mgrpo.engine.training import launcher as local

    if warm(arguments[1]).colocated:
        keep_journal_of_colocated(plan)
    all_tasks = local.tasks_of
    local.tasks_of = lambda *args: [task for task in all_tasks(*args) if task.name.split("-")[1] not in plan.alone]
    local.ENTRY = (sys.executable, file)
    supervisor.subprocess.Popen = Forked
    supervisor.LONGEST_DELAY = 0.2
    plan.note("started", who="launcher")
    act(plan, arguments)


def warm(file: str) -> Config:
    """Import what the engine imports late, before anything is forked, and return the config."""
    from mgrpo.engine.config.schema import load_config
    from mgrpo.engine.policy.policy import Policy
    from mgrpo.engine.rollout import worker  # noqa: F401
    from mgrpo.engine.training import decoupled  # noqa: F401

    config = load_config(file)
    Policy("main", config.agents["main"], config.compute)
    return config


if __name__ == "__main__":
    plan = Plan(Path(sys.argv[1]))
    if sys.argv[2] == "train":
        launch(plan, sys.argv[1], sys.argv[2:])
    else:
        act(plan, sys.argv[2:])
