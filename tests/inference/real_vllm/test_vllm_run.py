"""Test whole runs on real vLLM servers, which are started, watched and updated as in a user's run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from mgrpo.engine.config.schema import dump_config, read_dump
from mgrpo.engine.report.metrics import read_rows
from mgrpo.engine.run.metrics import read_metrics
from mgrpo.engine.store.open import open_store
from toy import make_model, toy_config

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")

pytestmark = pytest.mark.vllm

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}  # heads of 32
SMALL = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
STEPS = 11
ENVIRONMENT = '''
import zlib
from mgrpo.engine.environment.base import Environment
from mgrpo.engine.types import Answer, CallScore, Delegate, Score, Task

class Dice(Environment):
    """Pass the first text of main on to its clerk as a request. About every second text is correct."""

    def tasks(self, split):
        return [Task(f"{split} {i}", {}) for i in range(7)]

    def prompt(self, call):
        return f"{call.agent} {call.task.id}:"

    def parse(self, call, text):
        return (Delegate("clerk", "go on"),) if call.agent == "main" and not call.turns else Answer(text)

    def score(self, episode):
        dice = lambda call: zlib.crc32(call.turns[-1].text.encode()) % 2
        return Score(True, float(dice(episode.main)), tuple(CallScore(True, float(dice(c))) for c in episode.calls))
'''


def begin(folder: Path, **changes: Any) -> tuple[subprocess.Popen[bytes], Any]:
    """Start `mgrpo train` with a server for each of the two agents."""
    make_model(folder / "model", tie=False, **SIZES)
    (folder / "dice.py").write_text(ENVIRONMENT)
    changes |= {"environment": {"use": f"{folder}/dice.py:Dice"}}
    config = toy_config(folder, topology="local", **{"steps": STEPS, "warmup": {}} | changes)
    text = dump_config(config).replace(
        '"vllm": null', '"vllm": {"arguments": ["--enforce-eager", "--max-num-seqs", "16"]}'
    )
    text = text.replace('"sampler_cap": null', '"sampler_cap": 2.0')
    config = read_dump(text)
    script = (
        "import sys\nfrom mgrpo.engine.config.schema import read_dump\n"
        "from mgrpo.engine.report.display import make_display\n"
        "from mgrpo.engine.training.launcher import train\nconfig = read_dump(open(sys.argv[1]).read())\n"
        "train(config, False, make_display(list(config.agents)))"
    )
    (folder / "given.json").write_bytes(msgspec.json.encode(config))
    process = subprocess.Popen([sys.executable, "-c", script, folder / "given.json"], env={**os.environ, **SMALL})
    return process, config


def logs(folder: Path) -> str:
    return "\n".join(f"--- {file.name}\n{file.read_text()[-2000:]}" for file in folder.glob("run/logs/*.txt"))


def check(folder: Path, config: Any) -> None:
    """Check that every rollout of every step exists once, was trained on, and has the weights of its step."""
    rows = [row for row in read_rows(folder / "run", config) if row["stage"] == "rl" and "main/reward_mean" in row]
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert any("eval/held_out_accuracy" in row for row in read_metrics(folder / "run/workers/worker-0/metrics.jsonl"))
    with closing(open_store(config)) as store:
        assert not any(store.audit.balance()["violations"].values())
        for query in range(STEPS * config.queries_per_step):
            rollouts = store.groups.rollouts_of(query)
            assert [r.rollout for r in rollouts] == list(range(config.algorithm.rollouts))
            assert {r.status for r in rollouts} == {"scored"}
            assert all(call.step == query // config.queries_per_step for call in store.groups.calls_of(query))
        calls = [call for query in range(STEPS * config.queries_per_step) for call in store.groups.calls_of(query)]
    for agent in config.agents:
        assert len({call.version for call in calls if call.agent == agent}) >= 10, "the servers' weights did not change"
        own = read_metrics(folder / "run/agents" / agent / "metrics.jsonl")
        gaps = [row["gap_mean"] for row in own if row["stage"] == "rl" and row.get("tokens_trained")]
        assert len(gaps) >= 10 and max(gaps) < 0.002, gaps


def test_a_whole_run_updates_both_agents_servers_at_every_step(tmp_path: Path):
    process, config = begin(tmp_path)
    try:
        assert process.wait(1500) == 0, logs(tmp_path)
    finally:
        process.kill()
    check(tmp_path, config)


def test_a_killed_server_is_restarted_and_the_run_continues(tmp_path: Path):
    process, config = begin(tmp_path)

    def kill() -> None:
        """Kill the clerk's server in the fourth step."""
        metrics = tmp_path / "run/agents/clerk/metrics.jsonl"
        while process.poll() is None:
            if metrics.exists() and len([r for r in read_metrics(metrics) if r["stage"] == "rl"]) >= 4:
                return os.killpg(server_of(tmp_path, "clerk"), signal.SIGKILL)
            time.sleep(0.1)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        assert process.wait(1500) == 0, logs(tmp_path)
        thread.join()
    finally:
        process.kill()
    assert (tmp_path / "run/logs/server-clerk-0.txt").read_text().count("attempt ") == 2
    check(tmp_path, config)


def server_of(folder: Path, agent: str) -> int:
    """Return the process group of an agent's server, found by the port in its log."""
    ports = {
        int(found[1])
        for found in re.finditer(r"http://127\.0\.0\.1:(\d+)", (folder / f"run/logs/server-{agent}-0.txt").read_text())
    }
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "--port" in command and int(command[command.index("--port") + 1]) in ports:
            return os.getpgid(process.pid)
    raise AssertionError(f"no server of {agent}")
