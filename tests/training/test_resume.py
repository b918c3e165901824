"""Test that a run which is killed, stopped or out of disk resumes as if nothing had happened, with the same bits.

Every run is a separate process, forked from a server that has already imported the engine. A fault makes it end at a
chosen point: before or after the nth call of one of the engine's functions.
"""

from __future__ import annotations

import importlib
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from mgrpo.engine.cli import main
from mgrpo.engine.config.schema import parse_config
from mgrpo.engine.report.display import make_display
from mgrpo.engine.run.directory import RunDirectory
from mgrpo.engine.run.metrics import read_metrics
from mgrpo.engine.run.trajectories import read
from mgrpo.engine.store import Store
from mgrpo.engine.system.process import AGAIN
from mgrpo.engine.training import colocated, trainer
from toy import make_model, raw_config

STEPS, QUERIES, ROLLOUTS = 4, 3, 4
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["mgrpo.engine.training.colocated", "transformers.models.llama.modeling_llama", "pytest"])


INTERRUPTED = [
    "inference.in_process:InProcessSampler.step",
    "policy.policy:Policy.optim_step",
    "store.queries:Queries.record",
]


class Fault(NamedTuple):
    """Do `action` before or after the nth call of `target`, "module:function" or "module:Class.method"."""

    target: str
    when: str
    nth: int
    action: str = "kill"


def kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_halfway(file: Any, data: Any, *_: Any) -> None:
    file.write(data[: len(data) // 2])
    kill()


def interrupt(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def interrupt_twice(*_: Any) -> None:
    interrupt()
    time.sleep(AGAIN)
    interrupt()


def terminate(*_: Any) -> None:
    """Signal as Slurm and containers do, and at the same moment as another process that also signals for them."""
    os.kill(os.getpid(), signal.SIGTERM)
    interrupt()


def fill_disk(*_: Any) -> None:
    """Let no file of this process grow from now on."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def arm(fault: Fault) -> None:
    module, _, path = fault.target.partition(":")
    owner: Any = importlib.import_module(f"mgrpo.engine.{module}")
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original, calls, act = getattr(owner, name), itertools.count(1), globals()[fault.action]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        hit = next(calls) == fault.nth
        if hit and fault.when == "before":
            act(*args)
        result = original(*args, **kwargs)
        if hit and fault.when == "after":
            act(*args)
        return result

    setattr(owner, name, wrapped)


def child(arguments: list[str], out: Connection, fault: Fault | None) -> None:
    """Run the `mgrpo` command with its output sent to the parent, without what takes seconds and changes no number."""
    trainer.matmul_ceiling = lambda *_: 1.0  # type: ignore[assignment]
    colocated.draw = lambda run: run  # type: ignore[assignment]
    os.dup2(out.fileno(), 1)
    os.dup2(out.fileno(), 2)
    out.close()
    if fault:
        arm(fault)
    sys.argv = ["mgrpo", *arguments]
    main.main()


class Lab:
    """Start runs of one configuration, each in its own process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "train.toml"
        make_model(folder / "model")
        self.raw = raw_config(
            folder,
            steps=STEPS,
            queries_per_step=QUERIES,
            warmup={"steps": 16, "episodes": 8, "lr": 2e-2},
            algorithm={"rollouts": ROLLOUTS, "aligned_calls": 2, "kl_coef": 0.02},
            eval={"questions": 5, "every": 2},
            checkpoint={"every": 8, "keep": 3},
        )
        self.file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in flat(self.raw).items()))

    def start(self, run: Path, *flags: str, fault: Fault | None = None) -> tuple[Any, Connection]:
        """Start a run, or resume it if there is one. Checkpoints are further apart in the warm-up."""
        every = "checkpoint.every=2" if run.exists() else "checkpoint.every=8"
        arguments = ["train", str(self.file), "--resume", "--set", f"run_dir={run}", "--set", every, *flags]
        reader, writer = SERVER.Pipe(duplex=False)
        process = SERVER.Process(target=child, args=(arguments, writer, fault))
        process.start()
        writer.close()
        return process, reader

    def run(self, run: Path, *flags: str, fault: Fault | None = None) -> tuple[int, str]:
        """Return the exit code (negative: killed by a signal) and all output."""
        process, reader = self.start(run, *flags, fault=fault)
        with os.fdopen(os.dup(reader.fileno()), errors="replace") as lines:
            text = lines.read()
        process.join()
        return process.exitcode, text

    def copy(self, run: Path, name: str) -> Path:
        return Path(shutil.copytree(run, self.folder / name))


def flat(raw: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(raw, dict):
        return {key: raw}
    return {k: v for name, inner in raw.items() for k, v in flat(inner, f"{key}.{name}".lstrip(".")).items()}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def begun(lab: Lab) -> Path:
    """Return a run that was killed when its warm-up was over."""
    run = lab.folder / "begun"
    code, text = lab.run(run, fault=Fault("run.directory:RunDirectory.save_checkpoint", "after", 3))
    assert code == -signal.SIGKILL, text
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["rl-00000", "warmup-00008", "warmup-00016"]
    return run


@pytest.fixture(scope="module")
def whole(lab: Lab) -> Path:
    """Return a run that nothing interrupted."""
    run = lab.folder / "whole"
    code, text = lab.run(run)
    assert code == 0, text
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "main/reward_std" in row]
    for agent in ("main", "clerk"):  # otherwise equal numbers would prove nothing
        assert any(row[f"{agent}/reward_std"] and row[f"{agent}/grad_norm"] for row in rows)
    return run


# ---- what "the same" means


def numbers(run: Path) -> list[dict[str, Any]]:
    rows = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if "time/" not in k and "perf/" not in k} for row in rows]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    last = run / "checkpoints" / f"rl-{STEPS:05d}"
    files = sorted(last.rglob("*.safetensors"))
    assert len(files) == 6  # weights, moments and reference of two agents
    return {f"{file.relative_to(last)} {name}": value for file in files for name, value in load_file(file).items()}


def episodes(run: Path) -> list[Any]:
    """Return what the store and the trajectory files hold of every query, except times and file positions."""
    store = Store(f"sqlite:///{run / 'store.db'}", run="colocated")
    queries = range(STEPS * QUERIES)
    acked = {"open": 0, "sealed": 0, "leased": 0, "acked": len(queries), "expired": 0}
    assert store.audit.status()["agents"] == {"main": acked, "clerk": acked}
    found: list[Any] = []
    for query in queries:
        rollouts, calls = store.groups.rollouts_of(query), store.groups.calls_of(query)
        assert [rollout.rollout for rollout in rollouts] == list(range(ROLLOUTS))
        found += [vars(rollout) | {"seconds": None} for rollout in rollouts]
        for call, made in zip(calls, read(str(run / "trajectories"), [c.position for c in calls]), strict=True):
            tokens = (made.tokens.tobytes(), made.sampled.tobytes(), made.logprobs.tobytes(), made.version)
            found.append(vars(call) | {"position": None, "tokens": tokens})
    assert store.groups.rollouts_of(len(queries)) == []
    store.close()
    return found


def assert_same(run: Path, whole: Path) -> None:
    assert numbers(run) == numbers(whole)
    ours, theirs = tensors(run), tensors(whole)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert episodes(run) == episodes(whole)


def goes_on(lab: Lab, run: Path, whole: Path) -> None:
    code, text = lab.run(run)
    assert code == 0, text
    assert_same(run, whole)


# ---- kill -9

IN_RL = [
    Fault("run.directory:RunDirectory.log_metrics", "before", 3),
    Fault("run.directory:RunDirectory.log_metrics", "after", 5),
    Fault(
        "run.directory:RunDirectory.log_metrics", "before", 7
    ),  # everything is trained and saved; the last evaluation is missing
    Fault("run.metrics:append", "before", 5, "kill_halfway"),  # half a row
    Fault("run.trajectories:write_all", "before", 4, "kill_halfway"),  # half a record batch
    Fault("inference.in_process:InProcessSampler.step", "before", 60),
    Fault("store.queries:Queries.open", "after", 3),
    Fault("store.queries:Queries.record", "before", 3),  # tokens are written, but the store does not know of them
    Fault("training.trainer:AgentTrainer.train", "after", 5),  # one agent is trained, the other is not
    Fault("policy.policy:Policy.optim_step", "before", 4),
    Fault("policy.policy:Policy.save_state", "after", 1),  # half a checkpoint
    Fault("run.directory:seal", "after", 1),  # a complete checkpoint that is not yet renamed
    Fault("run.directory:RunDirectory.save_checkpoint", "after", 1),  # renamed, but the store does not know
    Fault("store.groups:Groups.ack", "after", 3),  # one agent has acked, the other has not
    Fault("store.groups:Groups.reclaim", "after", 1),  # in the middle of resuming
]
IN_WARMUP = [
    Fault("run.directory:RunDirectory.log_metrics", "after", 3),  # before the first checkpoint
    Fault("policy.policy:Policy.optim_step", "before", 26),
    Fault("run.directory:RunDirectory.save_checkpoint", "after", 2),  # between the stages
]


def name(fault: Fault) -> str:
    return re.sub(r"\W+", "-", "-".join(map(str, fault)))


@pytest.mark.parametrize("fault", IN_RL, ids=name)
def test_a_run_killed_in_the_rl_stage_goes_on_as_if_nothing_had_happened(lab, begun, whole, fault: Fault):
    run = lab.copy(begun, name(fault))
    code, text = lab.run(run, fault=fault)
    assert code == -signal.SIGKILL, text
    goes_on(lab, run, whole)


@pytest.mark.parametrize("fault", IN_WARMUP, ids=name)
def test_a_run_killed_in_the_warm_up_goes_on_as_if_nothing_had_happened(lab, whole, fault: Fault):
    run = lab.folder / name(fault)
    code, text = lab.run(run, fault=fault)
    assert code == -signal.SIGKILL, text
    goes_on(lab, run, whole)


@pytest.mark.parametrize("seed", range(2))
def test_a_run_killed_again_and_again_goes_on_as_if_nothing_had_happened(lab, begun, whole, seed: int):
    run, chance = lab.copy(begun, f"again-{seed}"), random.Random(seed)
    for _ in range(3):
        fault = chance.choice(IN_RL)
        code, text = lab.run(run, fault=fault._replace(nth=chance.randint(1, fault.nth)))
        assert code in (0, -signal.SIGKILL), text
    goes_on(lab, run, whole)


@pytest.mark.parametrize("seed", range(2))
def test_a_run_killed_from_outside_goes_on_as_if_nothing_had_happened(lab, begun, whole, seed: int):
    run, chance = lab.copy(begun, f"outside-{seed}"), random.Random(seed)
    process, _reader = lab.start(run)
    wanted = 16 + chance.randint(1, 6)
    while process.is_alive() and len(read_metrics(run / "metrics.jsonl")) < wanted:
        time.sleep(0.005)
    time.sleep(chance.random() * 0.1)
    process.kill()
    process.join()
    goes_on(lab, run, whole)


# ---- Ctrl-C


@pytest.mark.parametrize("target", INTERRUPTED)
def test_ctrl_c_finishes_the_step_saves_it_and_exits_130(lab, begun, whole, target: str):
    run = lab.copy(begun, f"ctrl-c-{target.replace(':', '-')}")
    code, text = lab.run(run, fault=Fault(target, "before", 1, "interrupt"))
    assert code == 130, text
    assert "Ctrl-C: finishing this step and saving; press again to stop at once" in text
    assert f"stopped after rl step 1 of {STEPS}; --resume goes on from here" in text
    assert "Traceback" not in text, text
    latest = max((run / "checkpoints").glob("rl-*"))
    assert RunDirectory.open_checkpoint(latest).name == "rl-00001"
    assert numbers(run) == numbers(whole)[:18]  # the warm-up, the evaluation before the first step, and that step
    goes_on(lab, run, whole)


@pytest.mark.parametrize(("action", "named"), [("interrupt", "Ctrl-C"), ("terminate", "SIGTERM")])
def test_an_end_asked_for_in_the_warm_up_finishes_its_step(lab, whole, action: str, named: str):
    run = lab.folder / f"{action}-warmup"
    code, text = lab.run(run, fault=Fault("policy.policy:Policy.optim_step", "before", 3, action))
    assert (code, numbers(run)) == (130, numbers(whole)[:2]), text
    assert f"{named}: finishing this step and saving" in text
    goes_on(lab, run, whole)


@pytest.mark.parametrize("target", INTERRUPTED)
def test_a_second_ctrl_c_ends_at_once(lab, begun, whole, target: str):
    run = lab.copy(begun, f"twice-{target.replace(':', '-')}")
    code, text = lab.run(run, fault=Fault(target, "before", 20 if "sampler" in target else 2, "interrupt_twice"))
    assert code == 130, text
    assert "Traceback" not in text, text
    assert not (run / "checkpoints" / "rl-00002").exists()
    assert len(numbers(run)) < 19
    goes_on(lab, run, whole)


# ---- the disk is full


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("policy.policy:Policy.save_state", "before", 2), "rl-00002 could not be written: .*rl-00000 .* stays"),
        (Fault("run.metrics:append", "before", 3), "cannot append metrics: .*metrics.jsonl"),
        (Fault("run.trajectories:write_all", "before", 6), r"cannot append trajectories: .*\.arrow"),
        (Fault("store.queries:Queries.record", "before", 2), "store"),
        (Fault("run.directory:RunDirectory.write_config", "before", 1), "cannot write: .*config.json"),
    ],
    ids=["checkpoint", "metrics", "trajectories", "store", "config"],
)
def test_a_full_disk_ends_the_run_in_one_line_and_costs_nothing(lab, begun, whole, fault: Fault, message: str):
    run = lab.copy(begun, f"full-{name(fault)}")
    code, text = lab.run(run, fault=fault._replace(action="fill_disk"))
    assert code == 1, text
    assert "Traceback" not in text, text
    assert re.fullmatch(f"error: .*{message}.*", text.strip().splitlines()[-1]), text
    assert [path.name for path in (run / "checkpoints").glob(".tmp*")] == []
    RunDirectory.open_checkpoint(run / "checkpoints" / "rl-00000")
    goes_on(lab, run, whole)


# ---- resuming something else


def resume(lab: Lab, run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    raw = json.loads(json.dumps(lab.raw | {"run_dir": str(run)}))
    change(raw)
    config = parse_config(raw)
    colocated.train(config, True, make_display(list(config.agents), decoupled=False))


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("seed", 0, 1),
        ("queries_per_step", 3, 4),
        ("deterministic", True, False),
        ("algorithm.rollouts", 4, 8),
        ("warmup.steps", 16, 17),
        ("reward.main_correct", 0.9, 1.0),
        ("agents.main.model", "*", "/other/model"),
        ("environment.options.size", None, 3),
    ],
)
def test_a_run_is_not_resumed_as_another(lab, whole, key: str, old: Any, new: Any):
    def change(raw: dict[str, Any]) -> None:
        *parents, last = key.split(".")
        for parent in parents:
            raw = raw.setdefault(parent, {})
        raw[last] = new

    old = str(lab.folder / "model") if old == "*" else old
    message = f"resume: {key}: {new!r} given: expected {old!r}, as the run was begun with"
    with pytest.raises(ValueError, match=re.escape(message)):
        resume(lab, whole, change)


def test_a_run_is_not_resumed_with_other_agents(lab, whole):
    with pytest.raises(ValueError, match=r"resume: agents\.clerk\.\w+: None given: expected .*, as the run was begun"):
        resume(lab, whole, lambda raw: raw["agents"].pop("clerk"))
    with pytest.raises(ValueError, match=r"resume: agents\.twin\.\w+: .* given: expected None, as the run was begun"):
        resume(lab, whole, lambda raw: raw["agents"].update(twin=raw["agents"]["clerk"]))


def test_a_run_is_not_resumed_with_its_agents_in_another_order(lab, whole):
    """The order matters because an agent's random numbers depend on its place in the list."""
    run = lab.copy(whole, "order")
    with pytest.raises(ValueError, match=r"resume: agents: .*'clerk', 'main'.* given: expected .*'main', 'clerk'"):
        resume(lab, run, lambda raw: raw.update(agents=dict(reversed(raw["agents"].items()))))


def test_a_run_that_lost_its_store_is_not_resumed_with_an_empty_one(lab, whole):
    run = lab.copy(whole, "lost")
    for file in run.glob("store.db*"):
        file.unlink()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"no such file, but checkpoints of run 'colocated' are in its directory"):
            resume(lab, run, lambda raw: None)
    assert not list(run.glob("store.db*"))


def test_a_run_with_more_steps_goes_on_from_its_end(lab, begun, whole):
    run = lab.copy(begun, "more")
    code, text = lab.run(run, "--set", "steps=2")
    assert (code, [row["step"] for row in numbers(run)][16:]) == (0, [0, 0, 1, 2]), text
    goes_on(lab, run, whole)


def test_a_run_that_is_over_changes_nothing_when_resumed(lab, whole):
    run = lab.copy(whole, "over")
    goes_on(lab, run, whole)


# ---- damaged checkpoints


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("main/weights.safetensors", "cut", r"expected main/weights.safetensors to have \d+ bytes, it has 100"),
        ("clerk/moments.safetensors", "drop", r"expected clerk/moments.safetensors to have \d+ bytes, it is missing"),
        ("state.json", "drop", r"expected state.json to have \d+ bytes, it is missing"),
        ("manifest.json", "cut", r"manifest.json is damaged \(100 bytes\)"),
        ("manifest.json", "drop", r"expected a whole checkpoint, manifest.json is missing"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(lab, whole, file, damage, message, tmp_path: Path):
    run = lab.copy(whole, tmp_path.name)
    path = run / "checkpoints" / "rl-00004" / file
    os.truncate(path, 100) if damage == "cut" else path.unlink()
    code, text = lab.run(run)
    assert code == 1
    assert re.fullmatch(rf"error: checkpoint .*rl-00004: {message}.*", text.strip().splitlines()[-1]), text
    assert "Traceback" not in text, text
    assert numbers(run) == numbers(whole)
    if file == "state.json":
        shutil.rmtree(run / "checkpoints" / "rl-00004")
        goes_on(lab, run, whole)
