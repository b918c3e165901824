"""Test topology local: what it starts, with which settings, and how it ends; scripts stand in for the processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch.distributed

from cases.launcher import alive, written
from cases.worker import STEPS, World
from mgrpo.engine.cli import main
from mgrpo.engine.config import schema as config_module
from mgrpo.engine.config.schema import Config, load_config, read_dump
from mgrpo.engine.inference.vllm import api
from mgrpo.engine.report.display import make_display
from mgrpo.engine.report.summary import summary
from mgrpo.engine.run.directory import RunDirectory
from mgrpo.engine.store import Store
from mgrpo.engine.store.open import begin, open_store
from mgrpo.engine.system import secrets, supervisor
from mgrpo.engine.system.supervisor import ProcessSpec, Supervisor
from mgrpo.engine.training import launcher as local
from mgrpo.engine.training.launcher import _all_done as all_done
from mgrpo.engine.training.launcher import gpus, tasks_of, train
from toy import raw_config, toy_config

SECRET = f"a-secret-of-the-store-{uuid.uuid4().hex}"
# Stands in for `agent` and `rollout`: it makes all steps at once, after as many failures as FAILURES says.
STAND_IN = """
    from mgrpo.engine.system.process import die_with_launcher
    from mgrpo.engine.system import secrets
    die_with_launcher()
    secrets.take()
    import json, os, sys, time
    from pathlib import Path
    _, kind, file, _, name = sys.argv
    config = json.loads(Path(file).read_text())
    folder = Path(config["run_dir"]) / ("agents" if kind == "agent" else "workers") / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"begun-{os.getpid()}").touch()
    (folder / "environment").write_text(json.dumps(dict(os.environ)))
    (folder / "secrets").write_text(json.dumps({name: secrets.get(name) for name in secrets.NAMES}))
    failures = json.loads(os.environ["FAILURES"]).get(name, 0)
    if len(list(folder.glob("begun-*"))) <= failures:
        sys.exit("a mistake")
    if "HANG" in os.environ:
        (folder / "hangs").touch()
        time.sleep(1000)
    metric = {"reward_mean": 0.5} if kind == "agent" else {"rollouts/scored": 12}
    rows = [{"stage": "rl", "step": step, "time/step": 1.0, **metric} for step in range(config["steps"])]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
    # every command line, as `ps` shows them to every user
    lines = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if os.access(p, os.R_OK) and p.exists()]
    (folder / "ps").write_bytes(b"\\n".join(lines))
    # and the processes whose environment shows a secret to a tool of this user
    def shows(environment):
        try:
            return any(secret.encode() in environment.read_bytes() for secret in known)
        except OSError:
            return False
    known = [secret for name in secrets.NAMES if (secret := secrets.get(name))]
    (folder / "shown").write_text("".join(str(p) for p in Path("/proc").glob("[0-9]*/environ") if shows(p)))
"""


@pytest.fixture(autouse=True)
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "stand_in.py"
    script.write_text(textwrap.dedent(STAND_IN))
    monkeypatch.setattr(local, "ENTRY", (sys.executable, str(script)))
    monkeypatch.setattr(local, "_all_done", lambda *_, **__: True)  # the stand-ins publish nothing
    monkeypatch.setattr(supervisor, "LONGEST_DELAY", 0.0)
    monkeypatch.setenv("MGRPO_STORE_PASSWORD", SECRET)
    monkeypatch.setenv("FAILURES", "{}")


def config_of(folder: Path, **changes: Any) -> Config:
    return toy_config(folder, topology="local", warmup={}, **changes)


def run(config: Config, resume: bool = False) -> None:
    display = make_display(list(config.agents))
    train(config, resume, display)


def test_by_the_store_the_launcher_knows_whether_a_process_that_ended_was_done(tmp_path, monkeypatch):
    world, roles = World(tmp_path), ("main", "clerk")
    monkeypatch.setattr(local, "open_store", lambda config: Store(world.url, "run"))
    assert not all_done(world.config, roles)
    for step in range(STEPS + 1):
        assert not all_done(world.config, ["main"])
        world.publish("main", step)
    assert all_done(world.config, ["main"]) and not all_done(world.config, roles)
    for step in range(STEPS + 1):
        world.publish("clerk", step)
    assert all_done(world.config, roles) and not all_done(world.config, roles, evaluated=True)
    while (step := world.store.roles.take_evaluation("w", 30.0)) is not None:
        world.store.roles.finish_evaluation(step, "w", {"eval/held_out_accuracy": 0.5})
    assert all_done(world.config, roles, evaluated=True)

    def away(config: Config) -> Store:
        raise OSError("store: connection refused")

    monkeypatch.setattr(local, "open_store", away)
    assert not all_done(world.config, roles)


def test_a_run_from_beginning_to_end(tmp_path: Path, capfd, monkeypatch):
    monkeypatch.setenv("FAILURES", '{"clerk": 1, "worker-1": 2}')
    config = config_of(tmp_path, sampling={"workers": 2})
    run(config)
    path = Path(config.run_dir)
    assert sorted(p.name for p in (path / "logs").iterdir()) == [
        "trainer-clerk.txt",
        "trainer-main.txt",
        "worker-0.txt",
        "worker-1.txt",
    ]
    assert (path / "logs/worker-1.txt").read_text().count("a mistake") == 2
    told = capfd.readouterr().out.splitlines()
    assert told.count("trainer-clerk ended with exit status 1, starts again in 0 s (1 of 3): a mistake") == 1
    assert "rl: steps 1 to 3" in told
    assert [line.split(" | ")[:3] for line in told if re.match(r"rl \d", line)] == [
        [f"rl {step}/3", "main reward 0.500", "clerk reward 0.500"] for step in (1, 2, 3)
    ]
    assert "3 of 3 rl steps" in summary(path) and "72 scored" in summary(path)
    assert (path / "curves.png").stat().st_size > 1000
    assert read_dump((path / "config.json").read_text()) == config


def test_secrets_reach_every_process_but_no_environment_command_line_or_other_file(tmp_path: Path, capfd):
    config = config_of(tmp_path)
    run(config)
    files = [path for path in Path(config.run_dir).rglob("*") if path.is_file()]
    holding = {path.name for path in files if SECRET.encode() in path.read_bytes()}
    assert holding == {"secrets"}, "the stand-ins' own note of what they were given"
    assert all(b"--name" in path.read_bytes() for path in Path(config.run_dir).rglob("ps"))
    for kind, name in (("agents", "main"), ("agents", "clerk"), ("workers", "worker-0")):
        assert passed(config, kind, name)["MGRPO_STORE_PASSWORD"] == SECRET
        assert (Path(config.run_dir) / kind / name / "shown").read_text() == ""
    assert SECRET not in "".join(capfd.readouterr())


def test_a_run_directory_is_private_and_nothing_of_a_killed_launcher_is_left(tmp_path: Path):
    config = config_of(tmp_path)
    path, before = Path(config.run_dir), os.umask(0)
    try:
        run(config)
    finally:
        os.umask(before)
    private = [path, path / "logs", path / "config.json", *(path / "logs").iterdir()]
    assert {place.stat().st_mode & 0o077 for place in private} == {0}
    (path / "meeting").mkdir()
    (path / "meeting" / "main-0").touch()  # where ranks would find each other, as after kill -9
    run(config, resume=True)
    assert not (path / "meeting").exists()


def test_a_password_in_the_url_is_refused_and_not_repeated_or_written(tmp_path: Path):
    config = config_of(tmp_path, store={"url": f"postgresql://user:{SECRET}@localhost/x"})
    with pytest.raises(ValueError, match="store: the url holds a password") as refused:
        run(config)
    assert SECRET not in str(refused.value)
    assert not any(SECRET.encode() in path.read_bytes() for path in Path(config.run_dir).rglob("*") if path.is_file())


def test_a_run_that_never_began_may_begin_anew_with_another_config(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("FAILURES", '{"main": 2}')
    with pytest.raises(ChildProcessError, match=r"trainer-main ended with exit status 1, restarts: 0(.|\n)*a mistake"):
        run(config_of(tmp_path, restarts=0))
    monkeypatch.setenv("FAILURES", "{}")
    run(config_of(tmp_path, queries_per_step=5))


def test_a_run_goes_on_as_it_began_and_only_when_told_to(tmp_path: Path):
    run(config_of(tmp_path))
    with pytest.raises(ValueError, match="holds a run; pass --resume"):
        run(config_of(tmp_path))
    with pytest.raises(ValueError, match="resume: queries_per_step: 5 given: expected 3"):
        run(config_of(tmp_path, queries_per_step=5), resume=True)
    run(config_of(tmp_path, steps=4, restarts=7, sampling={"workers": 2}, store={"lease": 9.0}), resume=True)


def test_a_run_directory_has_one_launcher(tmp_path: Path):
    config = config_of(tmp_path)
    held = RunDirectory(config.run_dir)
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
        run(config, resume=True)
    held.close()


def test_the_run_is_begun_in_the_store(tmp_path: Path):
    run(config_of(tmp_path))
    for other in ({"algorithm": {"rollouts": 5}}, {"seed": 3}):
        config = config_of(tmp_path, **other)
        with closing(open_store(config)) as store, pytest.raises(ValueError, match="run 'local'"):
            begin(store, config)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_launcher_that_was_ended_leaves_nothing_and_the_run_goes_on(tmp_path: Path, number: signal.Signals):
    config = config_of(tmp_path)
    source = (
        "import sys\nfrom mgrpo.engine.cli.main import main\nfrom mgrpo.engine.training import launcher\n"
        "launcher.ENTRY = (sys.executable, sys.argv.pop(1))\nmain()"
    )
    raw = raw_config(tmp_path, topology="local", warmup={})
    command = [sys.executable, "-c", source, tmp_path / "stand_in.py", "train", written(tmp_path, raw)]
    launcher = subprocess.Popen(command, env=os.environ | {"HANG": "1"}, stdout=subprocess.PIPE, text=True)
    hanging = [Path(config.run_dir) / name / "hangs" for name in ("agents/main", "agents/clerk", "workers/worker-0")]
    wait_for(lambda: all(path.exists() for path in hanging))
    launcher.send_signal(number)
    out, _ = launcher.communicate(timeout=60)
    if number == signal.SIGKILL:
        wait_for(lambda: not any(map(alive, begun(config))))  # the kernel closes their lifelines
    else:
        assert launcher.returncode == 130
        assert out.splitlines()[-1] == "stopped; --resume goes on from the last checkpoints"
        assert not any(map(alive, begun(config)))
    assert len(begun(config)) == 3
    run(config, resume=True)


def begun(config: Config) -> list[int]:
    return [int(path.name.removeprefix("begun-")) for path in Path(config.run_dir).glob("*/*/begun-*")]


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


# ---- the settings of each process


def passed(config: Config, kind: str, name: str) -> dict[str, str]:
    """Return the secrets that a process got."""
    return json.loads((Path(config.run_dir) / kind / name / "secrets").read_text())


def environment(config: Config, kind: str, name: str) -> dict[str, str]:
    return json.loads((Path(config.run_dir) / kind / name / "environment").read_text())


def test_cores_are_shared_and_a_choice_of_ones_own_stays(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    raw = raw_config(tmp_path, topology="local")
    raw["agents"]["main"]["ranks"] = 2
    config = load_config(written(tmp_path, raw))
    threads = {
        task.name: [e["OMP_NUM_THREADS"] for e in task.environments(0)]
        for task in tasks_of(config, tmp_path / "config.json", tmp_path)
    }
    assert threads == {"trainer-main": ["4", "4"], "trainer-clerk": ["8"], "worker-0": ["8"]}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert tasks_of(config, tmp_path, tmp_path)[0].environments(0)[0]["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(("sampling", "spins"), [({}, True), ({"max_staleness": 1}, False), ({"workers": 2}, False)])
def test_only_a_worker_that_never_works_beside_others_spins(tmp_path: Path, sampling: dict[str, int], spins: bool):
    tasks = tasks_of(config_of(tmp_path, sampling=sampling), tmp_path / "config.json", tmp_path)
    spinning = {task.name for task in tasks for given in task.environments(0) if "GOMP_SPINCOUNT" in given}
    assert spinning == ({"worker-0"} if spins else set())


def test_ranks_and_workers_take_gpus_in_turn(tmp_path: Path, monkeypatch):
    raw = raw_config(tmp_path, topology="local", sampling={"workers": 2}, compute={"device": "auto"})
    raw["agents"]["main"]["ranks"] = 2
    config = load_config(written(tmp_path, raw))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2,5,7")
    given = {
        task.name: {e["CUDA_VISIBLE_DEVICES"] for e in task.environments(0)}
        for task in tasks_of(config, tmp_path / "config.json", tmp_path)
    }
    assert given == {"trainer-main": {"0,2"}, "trainer-clerk": {"5"}, "worker-0": {"7"}, "worker-1": {"0"}}
    assert gpus(toy_config(tmp_path, compute={"device": "cpu"})) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus(config) == []


# ---- servers

# Stands in for `vllm serve`: it says with which settings it was started, and runs until it gets a signal.
SERVER_STAND_IN = """
    import json, os, sys, time
    from pathlib import Path
    folder = Path(os.environ["STAND_INS"])
    folder.mkdir(exist_ok=True)
    (folder / sys.argv[sys.argv.index("--port") + 1]).write_text(json.dumps([sys.argv, dict(os.environ)]))
    time.sleep(1000)
"""


def served(folder: Path, monkeypatch: pytest.MonkeyPatch, **vllm: Any) -> Config:
    """Return the config of a run whose main agent is sampled by its own servers."""
    script = folder / "server.py"
    script.write_text(textwrap.dedent(SERVER_STAND_IN))
    real = api.arguments
    monkeypatch.setattr(api, "installed", lambda: "0.32.0")
    monkeypatch.setattr(api, "arguments", lambda *a, **k: [sys.executable, str(script), *real(*a, **k)[2:]])
    monkeypatch.setenv("STAND_INS", str(folder / "servers"))
    monkeypatch.setenv("MGRPO_SERVER_TOKEN", "x")  # so that what the run sets is undone after the test
    monkeypatch.delenv("MGRPO_SERVER_TOKEN")
    raw = raw_config(folder, topology="local", warmup={}, compute={"device": vllm.pop("device", "cpu")})
    raw["algorithm"]["sampler_cap"] = 2.0
    raw["agents"]["main"]["vllm"] = {"servers": 2, "arguments": ["--max-num-seqs", "9"]} | vllm
    return load_config(written(folder, raw))


def test_servers_run_as_long_as_the_others_and_all_are_told_where_they_are(tmp_path: Path, monkeypatch):
    config = served(tmp_path, monkeypatch)
    run(config)
    assert {path.name for path in (Path(config.run_dir) / "logs").iterdir()} == {
        *["server-main-0.txt", "server-main-1.txt", "trainer-clerk.txt", "trainer-main.txt", "worker-0.txt"]
    }
    started = {path.name: json.loads(path.read_text()) for path in (tmp_path / "servers").iterdir()}
    token = secrets.get("MGRPO_SERVER_TOKEN")
    for kind, name in (("agents", "main"), ("agents", "clerk"), ("workers", "worker-0")):
        given = environment(config, kind, name)
        places = json.loads(given["MGRPO_SERVERS"])
        assert list(places) == ["main"] and places["main"]["transfer"] == "tcp"
        assert sorted(places["main"]["urls"]) == sorted(f"http://127.0.0.1:{port}" for port in started)
        assert passed(config, kind, name)["MGRPO_SERVER_TOKEN"] == token and len(token) > 30
        assert "MGRPO_SERVER_TOKEN" not in given
    for command, given in started.values():
        assert token not in command and "MGRPO_SERVER_TOKEN" not in given and "MGRPO_SECRETS" in given
        assert command[-2:] == ["--max-num-seqs", "9"] and config.agents["main"].model in command
    assert not any(token.encode() in path.read_bytes() for path in Path(config.run_dir).rglob("*.json*"))


def test_servers_take_gpus_in_turn_after_trainers_and_workers_that_compute_nothing_take_none(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5")
    config = served(tmp_path, monkeypatch, device="auto", tensor_parallel=2)
    tasks = {task.name: task.environments(0)[0] for task in tasks_of(config, tmp_path / "config.json", tmp_path)}
    given = {name: settings.get("CUDA_VISIBLE_DEVICES") for name, settings in tasks.items()}
    assert given == {
        "trainer-main": "0",
        "trainer-clerk": "1",
        "server-main-0": "2,3",
        "server-main-1": "4,5",
        "worker-0": "0",  # it samples the clerk itself
    }
    assert json.loads(tasks["worker-0"]["MGRPO_SERVERS"])["main"]["transfer"] == "nccl"
    raw = config_module.dump_config(config)
    both = config_module.read_dump(raw.replace('"vllm": null', '"vllm": {"urls": ["http://elsewhere:8000"]}'))
    tasks = {task.name: task.environments(0)[0] for task in tasks_of(both, tmp_path / "config.json", tmp_path)}
    assert "CUDA_VISIBLE_DEVICES" not in tasks["worker-0"]


@pytest.mark.parametrize(
    ("visible", "chosen", "kind"),
    [("0,1,2", [], "nccl"), ("0,1,2", ["0", "2"], "ipc"), ("0,1", [], "ipc"), ("", [], "tcp")],
    ids=["their own", "the trainer's", "too few", "none"],
)
def test_how_weights_come_follows_from_whose_gpus_they_are(tmp_path, monkeypatch, visible, chosen, kind):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    config = served(tmp_path, monkeypatch, device="auto", servers=2 if chosen else 1, gpus=chosen)
    tasks = {task.name: task for task in tasks_of(config, tmp_path / "config.json", tmp_path)}
    assert json.loads(tasks["worker-0"].environments(0)[0]["MGRPO_SERVERS"])["main"]["transfer"] == kind
    assert json.dumps({"backend": kind}) in tasks["server-main-0"].command


def test_every_attempt_of_ranks_meets_elsewhere(tmp_path: Path):
    (main, *_) = tasks_of(config_of(tmp_path), tmp_path / "config.json", tmp_path)
    first, second = (main.environments(attempt)[0]["MGRPO_RENDEZVOUS"] for attempt in (0, 1))
    assert first != second and first.startswith(f"file://{tmp_path}/")


MEETING = """
    import os, sys, time
    from pathlib import Path
    import torch, torch.distributed as dist
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=os.environ["MGRPO_RENDEZVOUS"], rank=rank, world_size=size)
    total = torch.ones(1)
    dist.all_reduce(total)
    inodes = set()
    for fd in Path("/proc/self/fd").iterdir():
        try: inodes.add(os.readlink(fd))
        except FileNotFoundError: pass
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()]
    listening = [line[1] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in inodes]
    print("total", total.item(), "listens", listening, flush=True)
    dist.barrier()
"""


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_ranks_meet_and_nothing_listens_beyond_loopback(tmp_path: Path):
    raw = raw_config(tmp_path, topology="local")
    raw["agents"]["main"]["ranks"] = 2
    config = load_config(written(tmp_path, raw))
    environments = tasks_of(config, tmp_path / "config.json", tmp_path)[0].environments
    ranks = ProcessSpec("main", [sys.executable, "-c", textwrap.dedent(MEETING)], environments)
    Supervisor([ranks], tmp_path, 0, print).run()
    for rank in range(2):
        found = re.search(r"^total 2.0 listens (.*)$", (tmp_path / f"main-{rank}.txt").read_text(), re.MULTILINE)
        addresses = re.findall(r"([0-9A-F]+):[0-9A-F]{4}'", found[1])
        assert addresses and set(addresses) <= {"0100007F", "0" * 24 + "01000000"}, "127.0.0.1, ::1"


# ---- the command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "--set", "topology=cluster"],
            r"topology: 'cluster' is started by its parts:\n  mgrpo store init .*",
        ),
        (["rollout", "--set", "topology=colocated"], "topology: 'colocated' given: expected 'local' or 'cluster', .*"),
        (["agent", "--name", "cook"], r"--name: 'cook' given: expected one of the agents \['main', 'clerk'\]"),
    ],
)
def test_what_a_topology_does_not_have_is_refused(tmp_path: Path, monkeypatch, capfd, arguments, message):
    file = written(tmp_path, raw_config(tmp_path, topology="local"))
    monkeypatch.setattr(sys, "argv", ["mgrpo", arguments[0], str(file), *arguments[1:]])
    with pytest.raises(SystemExit) as stop:
        main.main()
    error = capfd.readouterr().err
    assert stop.value.code == 1 and re.match(f"error: {message}", error), error
    if "train" in arguments:
        assert "-m mgrpo.engine agent" in error and "--name clerk" in error and "mgrpo rollout" in error
