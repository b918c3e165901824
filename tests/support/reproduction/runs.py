"""Start whole runs of toy agents, for reproductions of faults in a run of real processes."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from cases.launcher import written as write
from reproduction import cannot
from toy import make_model

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
FAULTY = Path(__file__).parents[1] / "faulty.py"
LIMIT = float(os.environ.get("FAULT_LIMIT", "240"))  # seconds after which a run that does not end counts as hung

ENVIRONMENT = '''
import random
from mgrpo.engine.environment.base import Environment
from mgrpo.engine.types import Answer, CallScore, Delegate, Score, Task

class E(Environment):
    """Take whatever the untrained main agent writes as a request to its clerk; draw rewards at random."""
    def tasks(self, split): return [Task(f"{split} {i}", {}) for i in range(7)]
    def prompt(self, call): return f"{call.agent} {call.task.id}\\n"
    def parse(self, call, text):
        return (Delegate("clerk", text),) if call.agent == "main" and len(call.turns) < 1 else Answer(text)
    def score(self, episode):
        chance = random.Random(repr([turn.text for turn in episode.main.turns]))
        return Score(True, chance.random(), tuple(CallScore(True, chance.random()) for _ in episode.calls))
'''


def new_folder() -> Path:
    """Make a folder that is removed when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="mgrpo-fault-"))
    atexit.register(shutil.rmtree, folder, True)
    return folder


def raw(folder: Path, environment: str = ENVIRONMENT, **changes: Any) -> dict[str, Any]:
    """Return a run's config after writing its model and environment to `folder`; merge nested `changes` into it."""
    if not (folder / "model").exists():
        make_model(folder / "model")
    (folder / "env.py").write_text(environment)
    agent = {"model": str(folder / "model"), "stop": ["\n"], "max_new_tokens": 6, "max_turns": 4, "max_context": 128}
    config: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "environment": {"use": f"{folder / 'env.py'}:E"},
        "agents": {"main": {**agent, "lr": 1e-4}, "clerk": {**agent, "lr": 1e-4}},
        "topology": "local",
        "steps": 3,
        "queries_per_step": 2,
        "algorithm": {"rollouts": 2, "aligned_calls": 2},
        "eval": {"questions": 2},
        "checkpoint": {"every": 1},
        "compute": {"dtype": "float32", "max_tokens": 256, "device": "cpu"},
        "log": {"to": []},  # a logger is a process of its own, and in `faulty.py` processes are forked
    }
    merge(config, changes)
    return config


def merge(into: dict[str, Any], changes: dict[str, Any]) -> None:
    """Put `changes` into a config, table by table."""
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def start(
    *arguments: Any,
    out: Path,
    cwd: Path | None = None,
    plan: dict[str, Any] | None = None,
    forked: bool = True,
) -> subprocess.Popen[bytes]:
    """Start `mgrpo ARGUMENTS` in a process group of its own, with its output in `out`.

    If `forked`, a run of topology local goes through tests/support/faulty.py with `plan` (by default without faults):
    that launcher imports torch once and forks its processes, so that a run begins in seconds on a busy machine.
    """
    command = [sys.executable, "-m", "mgrpo.engine", *map(str, arguments)]
    if forked and arguments[0] == "train" and 'topology = "local"' in Path(arguments[1]).read_text():
        file = new_folder() / "plan.json"
        file.write_text(json.dumps(plan or {}))
        command = [sys.executable, str(FAULTY), str(file), *map(str, arguments)]
    with out.open("ab") as stream:
        return subprocess.Popen(
            command, cwd=cwd, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that still runs; a launcher's children end with it."""
    if process.poll() is None:
        process.kill()
    process.wait()


def pause(store: Path, *processes: subprocess.Popen[bytes]) -> None:
    """Stop processes (SIGSTOP) at a moment at which none of them holds the lock of the run's SQLite file."""
    for _ in range(100):
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        try:
            with closing(sqlite3.connect(store, timeout=1)) as db:
                db.execute("begin immediate")
            return
        except sqlite3.OperationalError:
            for process in processes:
                process.send_signal(signal.SIGCONT)
            time.sleep(0.1)
    cannot("the processes could not be stopped outside of a transaction")


def mgrpo(*arguments: Any, limit: float = LIMIT, cwd: Path | None = None) -> tuple[int | None, str]:
    """Run a command; return its exit status (None if it hung for `limit` seconds and was killed) and its output."""
    out = new_folder() / "out"
    process = start(*arguments, cwd=cwd, out=out)
    try:
        status: int | None = process.wait(limit)
    except subprocess.TimeoutExpired:
        status = None
        stop(process)
    lines = out.read_text(errors="replace").splitlines()
    return status, "\n".join(line for line in lines if "model shards" not in line and "Loading weights" not in line)


def check_healthy_run(**changes: Any) -> None:
    """Show that a run of one step without any fault ends well here; end the script with status 2 if it does not."""
    folder = new_folder()
    config = write(folder, raw(folder, steps=1, eval={"questions": 1}, **changes))
    status, said = mgrpo("train", config)
    if status != 0:
        cannot(f"a healthy run ended with status {status}: {said[-800:]}")


def logs(run: Path, last: int = 1500) -> str:
    """Return the end of each process's log, `last` characters of each."""
    texts = {file.name: file.read_text(errors="replace") for file in sorted(run.glob("logs/*.txt"))}
    return "\n".join(f"== {name}\n{text[-last:]}" for name, text in texts.items())


def wait_for(condition: Callable[[], Any], limit: float = LIMIT) -> Any:
    """Wait until `condition` returns something true and return that; end with status 2 after `limit` seconds."""
    until = time.monotonic() + limit
    while not (found := condition()):
        if time.monotonic() > until:
            cannot(f"waited {limit:.0f} s in vain")
        time.sleep(0.05)
    return found
