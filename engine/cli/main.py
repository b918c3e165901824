"""Define the `mgrpo` command. Each subcommand imports what it needs when it runs, because torch takes seconds."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

import mgrpo
from mgrpo.engine.config.schema import Config, load_config, read_dump
from mgrpo.engine.system import secrets

if TYPE_CHECKING:
    from mgrpo.engine.report.display import Display

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Train multi-agent LLM systems by M-GRPO.")
store_app = typer.Typer(no_args_is_help=True, help="Create a run's store, inspect it and clean it up.")
app.add_typer(store_app, name="store")

File = Annotated[Path, typer.Argument(help="the run's TOML file, or its directory, which holds a copy")]
Target = Annotated[str, typer.Argument(metavar="FILE|URL", help="the run's TOML file, or the url of its store")]
Overrides = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="override a key of the file")]

BENCHES = {  # they are no part of the engine, which must not import them otherwise
    "kernels": "mgrpo.bench.kernels.run",
    "packing": "mgrpo.bench.packing.run",
    "roofline": "mgrpo.bench.roofline.run",
    "step": "mgrpo.bench.step.run",
    "store": "mgrpo.bench.store.run",
    "rollout": "mgrpo.bench.rollout",
}


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mgrpo {mgrpo.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Train multi-agent LLM systems by M-GRPO."""


@app.command("init")
def new_project(
    kind: Annotated[str, typer.Argument(metavar="sums|math", help="adding digits, or problems with a verifier")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a new or an empty directory")],
) -> None:
    """Write a project that trains as it is: settings, environment, tests and a tiny model."""
    from mgrpo.engine.cli.init import init

    print(init(kind, folder))


@app.command()
def train(file: File, overrides: Overrides = [], resume: bool = False) -> None:  # noqa: B006 (typer reads it)
    """Train the agents of FILE, or of a run directory. With --resume, continue the run in its run_dir."""
    config = load_config(file, overrides)  # before the imports below, which take seconds
    with _starting():
        from mgrpo.engine.report.display import make_display
        from mgrpo.engine.system.process import Interrupted

        run = _trainer_of(config, file)
    display = make_display(list(config.agents), decoupled=not config.colocated)
    try:
        with _no_exit():
            run(config, resume, display)
    except Interrupted as stop:
        display.say(str(stop))
        raise typer.Exit(130) from None
    finally:
        display.close()
    from mgrpo.engine.report.summary import summary

    print(summary(Path(config.run_dir)))


@contextmanager
def _starting() -> Iterator[None]:
    """Show on a terminal that the engine is being loaded, which takes seconds."""
    console = Console()
    with console.status("loading torch and the engine") if console.is_terminal else nullcontext():
        yield


def _trainer_of(config: Config, file: Path) -> Callable[[Config, bool, Display], None]:
    """Return the function that trains in the config's topology. Raises ValueError for a cluster, with its commands."""
    if config.colocated:
        from mgrpo.engine.training import colocated

        return colocated.train
    from mgrpo.engine.training import launcher

    if config.topology == "cluster":
        raise ValueError(f"topology: 'cluster' is started by its parts:\n{launcher.cluster_commands(config, file)}")
    return launcher.train


@app.command()
def agent(file: File, name: Annotated[str, typer.Option()], overrides: Overrides = []) -> None:  # noqa: B006
    """Train one agent of FILE in its own process; under torchrun, run one of its ranks."""
    config = _decoupled(file, overrides)
    if name not in config.agents:
        raise ValueError(f"--name: {name!r} given: expected one of the agents {list(config.agents)}")
    from mgrpo.engine.system.process import FINAL, FinalError, Interrupted
    from mgrpo.engine.training.decoupled import run_agent

    try:
        with _no_exit():
            run_agent(config, name)
    except FinalError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(FINAL) from None
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        raise typer.Exit(130) from None


@app.command()
def rollout(file: File, name: str = "", overrides: Overrides = []) -> None:  # noqa: B006
    """Sample episodes for the agents of FILE, on any number of machines. --name must be unique in the run."""
    config = _decoupled(file, overrides)
    name = name or f"{socket.gethostname()}-{os.getpid()}"
    from mgrpo.engine.run.directory import RunPaths

    RunPaths(config.run_dir).worker(name)  # refuses a wrong name before anything is made
    from mgrpo.engine.environment.threads import StuckError
    from mgrpo.engine.rollout.worker import Worker
    from mgrpo.engine.store.open import begin, open_store
    from mgrpo.engine.system.process import ctrl_c
    from mgrpo.engine.system.retry import patiently

    with closing(patiently(open_store, config)) as store:
        patiently(begin, store, config)
        with _no_exit():
            worker = Worker(config, name, store, config.run_dir)  # until now Ctrl-C ends the process at once
        try:
            with ctrl_c() as stop, _no_exit():
                worker.run(stop)
        except StuckError as error:  # calls of the environment never return: only a new process is rid of them
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(worker.status_if_stuck) from None
        if stop():  # the run is not finished: the exit status says so
            raise typer.Exit(130)


@contextmanager
def _no_exit() -> Iterator[None]:
    """Let no code that a config names end the process as if its work were done."""
    try:
        yield
    except SystemExit as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"{where.filename}, line {where.lineno}: sys.exit({error.code!r}) called in {where.name}: expected code "
            "that returns, or raises an error"
        ) from error


def _decoupled(file: Path, overrides: list[str]) -> Config:
    """Load FILE, or the JSON that a launcher made of it. Raises ValueError if the agents have no processes."""
    launched = file.name == "config.json"
    config = read_dump(file.read_text()) if launched else load_config(file, overrides)
    if config.colocated:
        raise ValueError("topology: 'colocated' given: expected 'local' or 'cluster', where agents have processes")
    return config if launched else _settled(config)


def _settled(config: Config) -> Config:
    """Return the config with the commits of models on a hub: those of its run, if that has begun."""
    from mgrpo.engine.hub.settle import settle
    from mgrpo.engine.hub.snapshots import Lines

    return settle(config, Lines(), Path(config.run_dir) / "config.json", weights=False)


@app.command("eval")
def evaluate(
    file: File,
    checkpoint: Annotated[Path | None, typer.Option(help="a run, or one of its checkpoints/")] = None,
    step: Annotated[str | None, typer.Option(metavar="N|best", help="of the run; default: the latest")] = None,
    model: Annotated[
        list[str], typer.Option(metavar="[AGENT=]MODEL", help="a directory, an id on a hub or the url of a vLLM server")
    ] = [],  # noqa: B006
    base: Annotated[bool, typer.Option("--base", help="the models of FILE, untrained")] = False,
    sets: Annotated[str | None, typer.Option(help="names of sets of tasks, with commas; default: eval.sets")] = None,
    samples: Annotated[int | None, typer.Option(help="episodes of each task; default: eval.samples")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: greedy; default: eval.temperature")] = None,
    k: Annotated[str, typer.Option(help="of pass@k, with commas; default: powers of 2 up to --samples")] = "",
    arms: Annotated[bool, typer.Option("--arms", help="compare new and old main with new and old sub-agents")] = False,
    out: Annotated[Path | None, typer.Option(help="a JSON file for all numbers")] = None,
    episodes: Annotated[int, typer.Option(min=0, help="whole episodes to print")] = 0,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Evaluate FILE's agents on held-out tasks: by default with the latest checkpoint, or before training untrained."""
    given = {"sets": sets and json.dumps(sets.split(",")), "samples": samples, "temperature": temperature}
    own = [f"eval.{key}={value}" for key, value in given.items() if value is not None]
    config = _settled(load_config(file, [*overrides, *own]))
    with _starting():
        from mgrpo.engine.cli.evaluate.command import Options, evaluate
        from mgrpo.engine.system.process import Interrupted

    options = Options(checkpoint, step, model, base, arms, _numbers("--k", k), out, episodes)
    try:
        with _no_exit():
            evaluate(config, options)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        raise typer.Exit(130) from None


def _numbers(option: str, text: str) -> list[int]:
    """Return the numbers of a list with commas. Raises ValueError naming the option."""
    parts = [part for part in text.split(",") if part.strip()]
    if not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"{option}: {text!r} given: expected numbers with commas in between, such as 1,4,16")
    return [int(part) for part in parts]


@app.command()
def report(run: Path, episodes: int = 2, query: int | None = None) -> None:
    """Summarise a run directory, redraw its figure and show whole episodes side by side."""
    from mgrpo.engine.report import summary

    summary.show_episodes(run, Console(), episodes, query)
    print(summary.summary(run))
    print(f"figure: {summary.draw(run)}")


@app.command("log")
def log_run(
    run: Path,
    to: Annotated[list[str], typer.Option("--to", help="a logger, as in log.to; default: those of the run")] = [],  # noqa: B006
    follow: Annotated[bool, typer.Option("--follow", help="go on until Ctrl-C, while the run goes on")] = False,
) -> None:
    """Log the run directory RUN: what its loggers were not sent yet, and the runs of a cluster while they go on."""
    from mgrpo.engine.cli.log import log

    try:
        log(run, to, follow)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@app.command()
def export(
    run: Path,
    agent: Annotated[str | None, typer.Option(help="default: each agent that is trained")] = None,
    step: Annotated[str | None, typer.Option(metavar="N|best", help="of a checkpoint; default: the latest")] = None,
    out: Annotated[Path | None, typer.Option(help="a new directory; default: export/ in RUN")] = None,
    dtype: Annotated[str, typer.Option(help="of the weights: float32, bfloat16 or float16")] = "bfloat16",
    push: Annotated[str | None, typer.Option(metavar="ORG/NAME", help="a hub's repository to upload it to")] = None,
) -> None:
    """Write trained agents of the run directory RUN as models that transformers and vLLM load."""
    from mgrpo.engine.cli.export import export

    print(export(run, agent, step, out, dtype, push))


@app.command()
def check(
    file: File,
    overrides: Overrides = [],  # noqa: B006
    score: Annotated[bool, typer.Option("--score", help="ask the judge, even one that needs the network")] = False,
    device_memory: Annotated[str | None, typer.Option(help="of another machine's devices, such as 80GiB")] = None,
    patience: Annotated[float, typer.Option(help="seconds that a method of the environment may take")] = 30.0,
) -> None:
    """Validate FILE, play stubbed episodes in its environment and predict the memory. Loads no weights."""
    config = _settled(load_config(file, overrides))
    with _starting():
        from mgrpo.engine.cli.check.describe import report

    with _no_exit():
        print(report(config, asks=score, device_memory=device_memory, patience=patience))


@app.command()
def bench(name: Literal["kernels", "packing", "roofline", "step", "store", "rollout"], quick: bool = False) -> None:
    """Measure one part, or predict it (roofline): print tables, then one line of JSON. --quick takes under a minute."""
    import_module(BENCHES[name]).main(quick)


@app.command()
def simulate(
    file: File,
    gpus: Annotated[str, typer.Option(help="numbers separated by commas, or FIRST..LAST by doubling")] = "64..4096",
    workload: Annotated[Path | None, typer.Option(help="a TOML file, or a run to measure; default: FILE's run")] = None,
    steps: Annotated[int, typer.Option(help="rl steps to simulate")] = 30,
    figure: Path = Path("simulation.png"),
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Predict FILE's run on some numbers of GPUs: best split, utilisation, bottleneck; then a line of JSON."""
    config = load_config(file, overrides)
    from mgrpo.engine.simulate.simulate import simulate

    print(simulate(config, workload or Path(config.run_dir), gpus, steps, figure))


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="a directory with a transformers causal LM, or its id on a hub")],
    revision: Annotated[str, typer.Option(help="branch, tag or commit of a model on a hub")] = "",
    transfer: Annotated[str, typer.Option(help="how new weights come: tcp, nccl or ipc")] = "nccl",
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: str = "bfloat16",
    max_context: int = 1024,
    tensor_parallel: int = 1,
    data_parallel: int = 1,
    extra: Annotated[list[str], typer.Argument(metavar="-- …", help="more arguments for vLLM")] = [],  # noqa: B006
) -> None:
    """Start a vLLM server that trainers can update; they need the token in the variable MGRPO_SERVER_TOKEN."""
    from mgrpo.engine.inference.vllm.server import become_server

    become_server(
        model,
        revision=revision,
        transfer=transfer,
        host=host,
        port=port,
        dtype=dtype,
        max_context=max_context,
        tensor_parallel=tensor_parallel,
        data_parallel=data_parallel,
        extra=extra,
    )


@app.command()
def migrate(run: Annotated[Path, typer.Argument(help="a run directory, or the TOML file of a cluster run")]) -> None:
    """Bring a run that an earlier version of mgrpo made, and its store, to what this version reads."""
    from mgrpo.engine.cli.migrate import migrate

    print(migrate(run))


@store_app.command()
def init(file: File) -> None:
    """Create the tables and the run of FILE. This is the first step of a cluster run, also when it goes on."""
    from mgrpo.engine.cli import store

    print(store.init(file))


@store_app.command()
def status(target: Target) -> None:
    """Show each run's groups by state, the processes that hold roles and leases, and violated invariants."""
    from mgrpo.engine.cli import store

    print(store.status(target))


@store_app.command()
def dump(target: Target) -> None:
    """Print every row as a line of JSON."""
    from mgrpo.engine.cli import store

    store.dump(target)


@store_app.command()
def gc(target: Target, run_dir: Path | None = None) -> None:
    """Delete the trajectory files that every agent has finished with. The run must be stopped."""
    from mgrpo.engine.cli import store

    print(store.collect(target, run_dir))


def main() -> None:
    """Run the command; a user's mistake becomes one line on stderr instead of a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    secrets.take()
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
