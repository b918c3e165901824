"""Describe what a config would run, and find what would go wrong: a dry run, in seconds and without any weights."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from mgrpo.engine.batch.advantages import estimator, objective
from mgrpo.engine.cli.check.fitting import agent_line, capacity, peak, shown, verdict
from mgrpo.engine.cli.check.memory import sampling, training
from mgrpo.engine.cli.check.model_size import ModelSize, measure
from mgrpo.engine.cli.check.processes import Process, device_of, placed, processes
from mgrpo.engine.cli.check.rehearsal import Findings, Rehearsal
from mgrpo.engine.config.hub_names import shown as named
from mgrpo.engine.config.schema import AgentConfig, Config
from mgrpo.engine.environment.base import Environment, Split
from mgrpo.engine.environment.calls import UserCode, UserCodeError
from mgrpo.engine.environment.loader import load_environment
from mgrpo.engine.hub.snapshots import outlook
from mgrpo.engine.model.causal_lm import load_tokenizer
from mgrpo.engine.report.loggers.choose import label
from mgrpo.engine.report.loggers.processes import check_loggers
from mgrpo.engine.rollout.curriculum import load_tasks
from mgrpo.engine.rollout.demonstrations import check_script
from mgrpo.engine.system.words import counted
from mgrpo.engine.types import Task

LOADING = 10  # times the patience with other methods that tasks may take to load
CALLED = ("prompt", "parse", "tool", "observation", "script", "score")


def report(config: Config, *, asks: bool, device_memory: str | None, patience: float) -> str:
    """Return what `describe` says, with its notes. Raises ValueError with all faults, after the description."""
    described, findings = describe(config, asks=asks, device_memory=device_memory, patience=patience)
    described = "\n".join([described, *(f"note       {note}" for note in findings.notes)])
    if findings.faults:
        count = len(findings.faults)
        print(described)
        raise ValueError("\n  ".join([f"{count} fault{'s' if count > 1 else ''} found:", *findings.faults]))
    return described


def describe(
    config: Config, *, asks: bool = False, device_memory: str | None = None, patience: float = 30.0
) -> tuple[str, Findings]:
    """Describe the processes, devices, work and memory of a run in lines, and find its faults.

    asks: ask the environment's judge even if that needs the network. device_memory: of a device that this machine does
    not have, such as "80GiB". patience: seconds that a method of the environment may take. Raises ValueError if there
    is nothing to try.
    """
    device = device_of(config, device_memory is not None)
    objective(config.algorithm)
    estimator(config.algorithm)
    tokenizers = {name: load_tokenizer(name, agent) for name, agent in config.agents.items()}
    on_gpu = device.type == "cuda"
    sizes = {name: measure(name, agent, config.compute, on_gpu) for name, agent in config.agents.items()}
    environment = load_environment(config.environment)
    train, held_out, *_ = (_tasks(environment, name, LOADING * patience) for name in ("train", *config.eval.sets))
    lines = [
        f"topology   {config.topology}: {processes(config, device)}",
        f"tasks      {len(train)} to train on, {len(held_out)} held out, "
        f"{min(len(held_out), config.eval.questions)} per evaluation",
        f"stages     {config.warmup.steps} warm-up steps of {config.warmup.episodes} episodes, "
        f"{config.steps} rl steps of {config.queries_per_step} queries x {config.algorithm.rollouts} rollouts",
    ]
    rehearsal = Rehearsal(config, environment, tokenizers, asks, patience)
    findings = rehearsal.findings
    _check_tasks(environment, train, held_out, findings)
    _check_script(config, environment, findings)
    _check_loggers(config, findings)
    rehearsal.run(train, held_out)
    lines.append(f"rehearsal  {_rehearsed(rehearsal)}")
    for name, agent in config.agents.items():
        found = training(sizes[name], agent, config, agent.ranks, device.type if on_gpu else "cpu")
        drawn = sampling(sizes[name], agent, config, rehearsal.lengths.get(name, 1))
        role = "trained" if agent.train else "frozen in the rl stage"
        model = f"{name:10} {role}: {named(agent.model, agent.revision)}{_download(name, agent)}"
        lines.append(f"{model}\n           {agent_line(sizes[name], found, drawn, config)}")
    lines.append(f"loggers    {', '.join(map(label, config.log.to)) or 'none'}")
    lines += _memory(config, placed(config, device), sizes, rehearsal.lengths, device_memory, findings)
    return "\n".join(lines), findings


def _download(name: str, agent: AgentConfig) -> str:
    """Say what a run would download of an agent's model, if that is on a hub."""
    if not agent.on_hub:
        return ""
    files, size = outlook(name, agent)
    if not files:
        return ", all of it in the cache"
    return f", a run downloads {shown(size)} in {counted(files, 'file')} first"


def _tasks(environment: Environment, split: Split, patience: float) -> Sequence[Task]:
    """Return the tasks of a split. Raises ValueError if they take too long, or cannot be had."""
    if not environment.in_threads:
        return load_tasks(environment, split)
    what = f"environment: {type(environment).__name__}.tasks({split!r})"

    async def ask() -> Sequence[Task]:
        async with asyncio.timeout(patience):
            found: Sequence[Task] = await UserCode(environment).ask(load_tasks, environment, split)
            return found

    try:
        return asyncio.run(ask())
    except TimeoutError:
        raise ValueError(f"{what}: no result within {patience:g} s (--patience gives it longer)") from None
    except UserCodeError as error:
        if isinstance(error.__cause__, ValueError | SystemExit):
            raise error.__cause__ from None
        raise ValueError(f"{what}: {type(error.__cause__).__name__}: {error.__cause__}") from error


def _check_tasks(environment: Environment, train: Sequence[Task], held_out: Sequence[Task], findings: Findings) -> None:
    """Report ids that several tasks of a split have, and those in both splits."""
    ids: dict[Split, dict[str, int]] = {"train": {}, "held_out": {}}
    for split, tasks in (("train", train), ("held_out", held_out)):
        for i, task in enumerate(tasks):
            if (first := ids[split].setdefault(task.id, i)) != i:
                findings.fault(
                    f"environment: {type(environment).__name__}.tasks({split!r})[{i}] has the id {task.id!r} of task "
                    f"{first}: expected each id once"
                )
                break
    if both := ids["train"].keys() & ids["held_out"].keys():
        findings.note(
            f"environment: {len(both)} tasks, such as {min(both)!r}, are in 'train' and in 'held_out': an evaluation "
            "would measure what was trained on"
        )


def _check_script(config: Config, environment: Environment, findings: Findings) -> None:
    try:
        check_script(config, environment)
    except ValueError as error:
        findings.fault(str(error))


def _check_loggers(config: Config, findings: Findings) -> None:
    try:
        check_loggers(config)
    except ValueError as error:
        findings.fault(str(error))


def _rehearsed(rehearsal: Rehearsal) -> str:
    """Say in words what was played."""
    called = [name for name in CALLED if name in rehearsal.watch.called]
    judged = f"{rehearsal.scored} scored"
    if rehearsal.unscored:
        judged = f"none scored, since {rehearsal.unscored}: --score asks the judge"
    return f"{rehearsal.played} stubbed episodes called {', '.join(called)}; {judged}"


def _memory(
    config: Config,
    found: Sequence[Process],
    sizes: Mapping[str, ModelSize],
    prompts: Mapping[str, int],
    given: str | None,
    findings: Findings,
) -> list[str]:
    """Return what each device has to hold, in lines, and report those that are too small."""
    devices = list(dict.fromkeys(process.device for process in found))
    lines = []
    for device in devices:
        here = [(p.name, peak(p, config, sizes, prompts)) for p in found if p.device == device]
        parts = [part for _, of in here for part in of]
        total, free = capacity(device, given)
        need = sum(part.size for part in parts)
        each = ", ".join(f"{name} {shown(sum(part.size for part in of))}" for name, of in here)
        lines.append(f"memory     {device}: about {shown(need)} of {shown(total)} at the peak: {each}")
        if problem := verdict(device, parts, total):
            findings.fault(problem)
        elif need > free:
            findings.note(f"memory: {shown(free)} of {device} are free now, and the run needs about {shown(need)}")
    return lines
