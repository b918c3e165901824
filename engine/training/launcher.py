"""Run topology `local`: start a trainer and the vLLM servers of each agent, and the rollout workers, on one machine.

A trainer is one process or several ranks. The launcher itself trains nothing and does not import torch. It locks the
run directory, begins the run in the store, and starts, watches and stops the other processes. Everything that they need
to resume is in their checkpoints and in the store.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from itertools import cycle, islice
from pathlib import Path

from mgrpo.engine.config.resume import check_steps, check_unchanged, fingerprint
from mgrpo.engine.config.schema import AgentConfig, Config, dump_config, read_dump
from mgrpo.engine.environment.loader import volatile_options
from mgrpo.engine.hub.settle import settle
from mgrpo.engine.hub.snapshots import folder
from mgrpo.engine.inference.vllm.endpoints import Endpoints, announce, transfer_kind
from mgrpo.engine.inference.vllm.server import free_ports, server_spec, url
from mgrpo.engine.report.curves import draw_curves
from mgrpo.engine.report.display import Display
from mgrpo.engine.report.follow import Watch
from mgrpo.engine.report.loggers.processes import Loggers
from mgrpo.engine.report.metrics import read_rows
from mgrpo.engine.run.directory import RunDirectory, latest_of, stage_and_step
from mgrpo.engine.run.scores import had, why_ended
from mgrpo.engine.store.open import begin, identify, open_store
from mgrpo.engine.system.files import make_private
from mgrpo.engine.system.process import RENDEZVOUS
from mgrpo.engine.system.retry import patiently
from mgrpo.engine.system.supervisor import ProcessSpec, Supervisor

ENTRY = (sys.executable, "-P", "-m", "mgrpo.engine")  # -P: files in the working directory do not shadow modules
LOOK = 1.0  # seconds between polls of the metrics
# A worker that has all cores to itself may spin for about 20 us between small pieces of work: with GNU's OpenMP it then
# samples a third faster than if its threads slept at once. Beside another busy process it would be 2.6 times as slow.
SPIN = {"GOMP_SPINCOUNT": "10000"}
LOOPBACK = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


def train(config: Config, resume: bool, display: Display) -> None:
    """Start or resume a run, and return when all of it is done.

    Raises ValueError for bad input, ChildProcessError if a process failed too often, Interrupted after Ctrl-C.
    """
    with closing(RunDirectory(config.run_dir, resume)) as run:
        config = settle(config, display, run.config)
        with Loggers(config, run.path, display.say, anew=not _saved(run)) as loggers:
            for change in _begin(config, run, display):
                display.say(f"resume: {change}")
            loggers.begin()
            try:
                _supervise(config, run, display)
            except ChildProcessError:
                if not _saved(run):  # nothing to resume: the run counts as not begun
                    run.config.unlink()
                raise


def _saved(run: RunDirectory) -> bool:
    return any(run.path.glob("agents/*/checkpoints/*-*"))


def _begin(config: Config, run: RunDirectory, display: Display) -> list[str]:
    """Begin the run in its store, or compare its config; return what a resumed run says of itself. Waits for it."""
    saved, changes = _saved(run), list[str]()
    if run.config.exists():
        volatile = partial(volatile_options, config.environment)
        changes = check_unchanged(read_dump(run.config.read_text()), config, volatile)
        for name in config.agents:
            if latest := latest_of(run.agent(name).checkpoints):
                check_steps(config, *stage_and_step(latest))
    elif not saved:
        for rest in [*run.path.glob("store.db*"), run.identity, run.tasks]:  # of an attempt that failed before it began
            rest.unlink(missing_ok=True)
    display.doing("opening the store")
    with closing(patiently(open_store, config, known=saved)) as store:  # refuses a url with a password: not written
        patiently(identify, store, config, known=saved)
        if changes:
            patiently(store.roles.renew, fingerprint(config))
        patiently(begin, store, config)
        known = had(patiently(store.roles.evaluations), config)
    run.write_config(dump_config(config))
    return changes + known


def _supervise(config: Config, run: RunDirectory, display: Display) -> None:
    logs = run.path / "logs"
    make_private(logs)
    with closing(Watch(config, display)) as watch:
        display.doing(f"trainers and workers load their models and take a first step; they print to {logs}")
        with _meeting(run.meeting) as meeting:
            supervisor = Supervisor(tasks_of(config, run.config, meeting), logs, config.restarts, display.say)
            look = _every(LOOK, lambda: watch.look(supervisor.states()))
            supervisor.run(look)
        watch.look(supervisor.states())
    if config.eval.patience:
        with closing(patiently(open_store, config)) as store:
            end = patiently(store.roles.end, config.eval.patience)
        if end is not None and end < config.steps:
            display.say(why_ended(config, end))
    try:
        draw_curves(run.curves, config, [row for row in read_rows(run.path, config) if row["stage"] == "rl"])
    except OSError as error:  # the run is complete without its figure
        display.say(f"no figure: {error}; `mgrpo report {run.path}` draws it")


@contextmanager
def _meeting(folder: Path) -> Iterator[Path]:
    """Make the folder where ranks find each other. One that a killed launcher left is emptied: nobody is there now."""
    shutil.rmtree(folder, ignore_errors=True)
    make_private(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def tasks_of(config: Config, file: Path, meeting: Path) -> list[ProcessSpec]:
    """Return the run's processes. file: the config as JSON; meeting: a private folder where ranks find each other."""
    devices = cycle(gpus(config) or [""])
    mine = {name: list(islice(devices, agent.ranks)) for name, agent in config.agents.items()}
    tasks, places = _servers(config, devices, mine)
    known = announce(places)
    for name, agent in config.agents.items():
        settings = _settings(agent.ranks, mine[name], {}) | known
        environments = _ranks(agent.ranks, settings, f"file://{meeting}/{name}")
        command, done = [*ENTRY, "agent", str(file), "--name", name], partial(_all_done, config, [name])
        tasks.append(ProcessSpec(f"trainer-{name}", command, environments, finished=done))
    served = [agent.vllm is not None for agent in config.agents.values()]
    alone = config.sampling.workers == 1 and config.sampling.max_staleness == 0 and not any(served)
    for number in range(config.sampling.workers):
        settings = _settings(1, [] if all(served) else [next(devices)], SPIN if alone else {}) | known
        command = [*ENTRY, "rollout", str(file), "--name", f"worker-{number}"]
        done = partial(_all_done, config, list(config.agents), evaluated=True)
        tasks.append(
            ProcessSpec(f"worker-{number}", command, lambda _, settings=settings: [settings], finished=done)  # type: ignore[misc]
        )
    return tasks


def _all_done(config: Config, agents: Sequence[str], evaluated: bool = False) -> bool:
    """Return whether agents have published their last step, and whether that was evaluated, if asked."""
    try:
        with closing(open_store(config)) as store:
            published, results = store.roles.publications(), store.roles.evaluations()
            end = store.roles.end(config.eval.patience)
    except OSError:  # who has ended is started again, and finds out by itself
        return False
    last = config.steps if end is None else min(end, config.steps)
    done = all(name in published and published[name].step >= last for name in agents)
    return done and (last in results or not evaluated)


def _servers(
    config: Config, devices: Iterator[str], trainers: Mapping[str, Sequence[str]]
) -> tuple[list[ProcessSpec], dict[str, Endpoints]]:
    """Return the vLLM servers that the run starts, and where they are. trainers: the GPUs of each agent's trainer."""
    tasks, places = [], {}
    for name, agent in config.agents.items():
        vllm = agent.vllm
        if vllm is None or vllm.urls:
            continue
        size = vllm.tensor_parallel * vllm.data_parallel
        cards = [card for card in vllm.gpus or islice(devices, vllm.servers * size) if card]
        kind = transfer_kind(vllm.transfer, set(trainers[name]) - {""}, set(cards))
        ports = free_ports(vllm.servers)
        for number, port in enumerate(ports):
            tasks.append(
                server_spec(
                    f"server-{name}-{number}",
                    str(folder(name, agent, weights=True)),
                    port,
                    dtype=config.compute.dtype,
                    max_context=agent.max_context,
                    transfer=kind,
                    gpus=cards[number * size : (number + 1) * size],
                    tensor_parallel=vllm.tensor_parallel,
                    data_parallel=vllm.data_parallel,
                    extra=[*(["--load-format", "auto"] if agent.allow_pickle else []), *vllm.arguments],
                    settings=_settings(1, [], {}),
                )
            )
        places[name] = Endpoints([url(port) for port in ports], kind)
    return tasks, places


def _ranks(ranks: int, settings: Mapping[str, str], meet: str) -> Callable[[int], Sequence[Mapping[str, str]]]:
    """Return a function of the attempt: the ranks' environments as torchrun sets them, but they meet in a new file."""
    common = {**settings, **LOOPBACK, "WORLD_SIZE": str(ranks)}

    def environments(attempt: int) -> list[Mapping[str, str]]:
        return [
            {**common, "RANK": str(rank), "LOCAL_RANK": str(rank), RENDEZVOUS: f"{meet}-{attempt}"}
            for rank in range(ranks)
        ]

    return environments


def _settings(ranks: int, devices: Sequence[str], spin: Mapping[str, str]) -> dict[str, str]:
    """Return the environment that gives one of `ranks` processes working at the same time its cores and GPUs.

    Agents and workers mostly wait for each other, so each gets all cores. But a thread that waits for its next piece of
    work must sleep, not spin, and so leave the core to another process.
    """
    cores = len(os.sched_getaffinity(0))
    defaults = {"OMP_NUM_THREADS": str(max(1, cores // ranks)), "OMP_WAIT_POLICY": "PASSIVE", **spin}
    settings = {key: os.environ.get(key, value) for key, value in defaults.items()}
    return settings | ({"CUDA_VISIBLE_DEVICES": ",".join(devices)} if any(devices) else {})


def gpus(config: Config) -> list[str]:
    """Return the GPUs that this run may use, as CUDA_VISIBLE_DEVICES names them, without loading CUDA here."""
    if config.compute.device not in ("auto", "cuda"):  # a named device is used by every process
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    folder = Path("/proc/driver/nvidia/gpus")
    return [str(number) for number in range(len(list(folder.iterdir())))] if folder.is_dir() else []


def _every(seconds: float, act: Callable[[], None]) -> Callable[[], None]:
    """Return a function that calls `act`, but at most once in `seconds`."""
    due = 0.0

    def tick() -> None:
        nonlocal due
        if time.monotonic() >= due:
            act()
            due = time.monotonic() + seconds

    return tick


def _named(agent: AgentConfig) -> str:
    return f"{agent.model} --revision {agent.revision}" if agent.revision else agent.model


def cluster_commands(config: Config, file: Path) -> str:
    """Return the commands that start a run with topology `cluster`, one per line."""
    lines = [f"  mgrpo store init {file}", f"  mgrpo rollout {file}            # on as many machines as there are"]
    lines += [f"  torchrun … -m mgrpo.engine agent {file} --name {name}" for name in config.agents]
    for agent in config.agents.values():
        if agent.vllm:
            lines.append(
                f"  mgrpo serve {_named(agent)} …      # at {', '.join(agent.vllm.urls)}; MGRPO_SERVER_TOKEN everywhere"
            )
    return "\n".join(lines)
