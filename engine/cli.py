"""The `mgrpo` command."""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from mgrpo.engine.config import load_config

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Train multi-agent LLM systems by M-GRPO.")

File = Annotated[Path, typer.Argument(help="the run's TOML file")]
Checkpoint = Annotated[Path, typer.Option(help="a directory of a run's checkpoints/")]
Overrides = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="override a key of the file")]


@app.command()
def train(file: File, overrides: Overrides = [], resume: bool = False) -> None:  # noqa: B006 (typer reads it)
    """Train the agents of FILE. With --resume, go on where the run in its run_dir was stopped."""
    config = load_config(file, overrides)  # before the imports below, which take seconds
    from mgrpo.engine import launch, report
    from mgrpo.engine.display import make_display

    display = make_display(list(config.agents))
    try:
        launch.train(config, resume, display)
    except launch.Interrupted as stop:
        display.say(str(stop))
        raise typer.Exit(130) from None
    finally:
        display.close()
    print(report.summary(Path(config.run_dir)))


@app.command("eval")
def evaluate(file: File, checkpoint: Checkpoint, overrides: Overrides = []) -> None:  # noqa: B006
    """Measure the held-out accuracy of a checkpoint of FILE's agents."""
    config = load_config(file, overrides)
    from mgrpo.engine import check

    print(check.evaluate(config, checkpoint))


@app.command()
def report(run: Path, episodes: int = 2, query: int | None = None) -> None:
    """Summarise a run directory, redraw its figure and show whole episodes side by side."""
    from mgrpo.engine import report

    console = Console()
    report.show_episodes(run, console, episodes, query)
    print(report.summary(run))
    print(f"figure: {report.draw(run)}")


@app.command()
def check(file: File, overrides: Overrides = []) -> None:  # noqa: B006
    """Validate FILE and say what would run: processes, devices, memory. Loads nothing big."""
    config = load_config(file, overrides)
    from mgrpo.engine import check

    print(check.describe(config))


@app.command()
def bench(name: Literal["kernels"], quick: bool = False) -> None:
    """Measure the kernels against their peers: tables, then one line of JSON. --quick: in a minute."""
    import_module(f"mgrpo.bench.{name}").main(quick)


def main() -> None:
    """Entry point: a user's mistake is one line on stderr, not a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
