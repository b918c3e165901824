"""Start and watch runs of `faulty.py` for the fault tests, and check that they trained on every group once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from cases.launcher import alive, written
from mgrpo.engine.config.schema import load_config
from mgrpo.engine.run.metrics import is_evaluation, read_metrics
from mgrpo.engine.store.open import open_store
from toy import make_model, raw_config

SCRIPT = Path(__file__).with_name("faulty.py")
STEPS, Q, K = 6, 2, 2
SECONDS = 300.0  # to wait, at most, for anything


class Run:
    """A decoupled run of two agents in `folder`, and what happened in it.

    tell: a function that prints. plan: of faults, as `faulty.Plan` reads it. changes: to the config.
    """

    def __init__(
        self,
        folder: Path,
        tell: Callable[[str], None],
        plan: dict[str, Any] | None = None,
        ranks: int = 1,
        **changes: Any,
    ) -> None:
        self.tell = tell
        make_model(folder / "model")
        base = raw_config(folder, topology="local", steps=STEPS, queries_per_step=Q, warmup={}, restarts=1000)
        for agent in base["agents"].values():
            agent |= {"max_turns": 4, "max_context": 128, "max_new_tokens": 6, "lr": 1e-4}
        base |= {"environment": {"use": f"{SCRIPT}:Errands"}, "algorithm": {"rollouts": K}}
        base |= {"eval": {"questions": 2}, "checkpoint": {"every": 2}, "store": {"lease": 3.0}}
        base["agents"]["main"] |= {"ranks": ranks}
        for key, value in changes.items():
            base[key] = {**base.get(key, {}), **value} if isinstance(value, dict) else value
        self.folder, self.file = folder, written(folder, base)
        (folder / "plan.json").write_text(json.dumps(plan or {}))
        self.faults = len((plan or {}).get("faults", ()))
        self.config = load_config(self.file)
        self.path = Path(self.config.run_dir)
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str, before: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        """Start `mgrpo`. arguments: those of the command, without its file. before: a command that executes it."""
        command = [*before, sys.executable, SCRIPT, self.folder / "plan.json", arguments[0], self.file]
        environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.log = self.folder / f"out-{len(self.processes)}.txt"
        with self.log.open("wb") as out:
            process = subprocess.Popen(
                [*command, *arguments[1:]], env={**os.environ, **environment}, stdout=out, stderr=subprocess.STDOUT
            )
        self.processes.append(process)
        return process

    def end(self) -> None:
        """Kill what still runs, so that nothing outlives a test."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        wait_for(lambda: not self.living())

    def finish(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for a launcher, and check that it ended well and left no process behind."""
        wait_for(lambda: process.poll() is not None, self)
        assert process.returncode == 0, self.told()
        assert not self.living()

    def told(self) -> str:
        """Return the output of all processes, for a test that failed."""
        files = [*self.folder.glob("out-*.txt"), *self.path.glob("logs/*.txt")]
        texts = (re.sub(r"(?m)^Loading weights.*\n", "", file.read_text(errors="replace")) for file in files)
        return "\n".join(f"== {file.name}\n{text[-4000:]}" for file, text in zip(files, texts, strict=True))

    def said(self, process: str) -> str:
        """Return the log of one process."""
        file = self.path / "logs" / f"{process}.txt"
        return file.read_text(errors="replace") if file.exists() else ""

    def journal(self) -> list[dict[str, Any]]:
        """Return what the processes noted."""
        file = self.folder / "journal.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def living(self) -> dict[int, str]:
        """Return the processes that run, apart from launchers, by process id."""
        return {pid: who for pid, who in self.begun() if alive(pid)}

    def begun(self) -> list[tuple[int, str]]:
        """Return process id and name of every process that was started, apart from launchers."""
        started = (line for line in self.journal() if line["event"] == "started")
        return [(line["pid"], line["who"]) for line in started if line["who"] != "launcher"]

    def pid(self, who: str) -> int:
        """Wait until a process runs, and return its process id."""
        return wait_for(lambda: next((pid for pid, name in self.living().items() if name == who), 0))

    def steps(self) -> dict[str, int]:
        """Return, by agent, the rl step of the weights that it published last; of a colocated run, the steps taken."""
        if self.config.colocated:
            return {name: len(taken) for name in self.config.agents if (taken := lineage(self.journal(), name))}
        url = self.config.store.url or f"sqlite:///{self.path}/store.db"
        if url.startswith("sqlite") and not Path(url.removeprefix("sqlite:///")).exists():
            return {}
        with closing(open_store(self.config)) as store:
            return {name: publication.step for name, publication in store.roles.publications().items()}

    def wait_for_step(self, step: int) -> None:
        """Wait until every agent has published a step."""
        wait_for(lambda: len(found := self.steps()) == len(self.config.agents) and min(found.values()) >= step, self)

    # ---- what must hold in the end

    def check(self, steps: int = STEPS) -> dict[str, Any]:
        """Check that every fault happened, that each agent trained once on each acked group, and the store itself."""
        missing = [number for number in range(self.faults) if not (self.folder / f"fault-{number}").exists()]
        assert not missing, (missing, self.told())
        with closing(open_store(self.config)) as store:
            books = store.audit.balance()
            rows: list[dict[str, Any]] = []
            store.audit.dump(lambda line: rows.append(json.loads(line)))
        self.tell(f"{summary(books)}; the processes began {len(self.begun())} times")
        assert not any(books["violations"].values()), books
        for name in self.config.agents:
            acked = {
                r["query"] for r in rows if r["table"] == "groups" and r["agent"] == name and r["state"] == "acked"
            }
            trained = [query for queries in lineage(self.journal(), name) for query in queries]
            assert sorted(trained) == sorted(acked) and len(trained) == steps * Q, (name, trained, acked)
            assert books["agents"][name]["leased"] == 0, books
            file = self.path / ("metrics.jsonl" if self.config.colocated else f"agents/{name}/metrics.jsonl")
            trained_steps = [row for row in read_metrics(file) if row["stage"] == "rl" and not is_evaluation(row)]
            assert [row["step"] for row in trained_steps] == list(range(steps))
            self._check_sampled(name, acked, rows)
        return books

    def _check_sampled(self, name: str, acked: set[int], rows: list[dict[str, Any]]) -> None:
        """Check that an agent's groups are complete: K rollouts each, and in each all calls of an episode."""
        calls = [r for r in rows if r["table"] == "calls" and r["agent"] == name and r["query"] in acked]
        made = {"main": 1, "clerk": 2}[name]
        expected = {(query, rollout, call) for query in acked for rollout in range(K) for call in range(made)}
        assert {(call["query"], call["rollout"], call["call"]) for call in calls} == expected
        assert len(calls) == len(expected)


def summary(books: dict[str, Any]) -> str:
    """Sum up the balance of a store in a line."""
    of = ", ".join(f"{name} {c['acked']} of {c['opened']} acked" for name, c in books["agents"].items())
    rest = f"{books['rollouts']} rollouts, {books['calls']} calls, {books['late']} late"
    return f"{of}, {rest}, {sum(books['violations'].values())} violations of {len(books['violations'])} kinds"


def lineage(journal: Sequence[dict[str, Any]], name: str) -> list[list[int]]:
    """Return the queries of each step that went into the weights that an agent ended with.

    This follows the trainers' own notes: a trainer begins with the steps of the checkpoint that it restores, and adds
    one step after another.
    """
    steps: list[list[int]] = []
    owner = 0
    for line in journal:
        if line["event"] == "restored" and line["who"] == name:
            owner = line["pid"]
            assert line["step"] <= len(steps), "a checkpoint of steps that no trainer took"
            del steps[line["step"] :]
        if line["event"] == "trained" and line["pid"] == owner and line["who"] == name:
            assert line["step"] == len(steps)
            steps.append(line["queries"])
    return steps


def wait_for(condition: Callable[[], Any], run: Run | None = None) -> Any:
    """Wait until `condition` returns something true, and return that."""
    until = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < until, run.told() if run else "waited in vain"
        time.sleep(0.05)
    return found
