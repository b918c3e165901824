"""`python -m mgrpo.bench.ablation --out DIR`: measures on geography what training the agents together is worth.

    co-train       both agents are trained, by M-GRPO as it is
    main-only      the sub-agent is frozen after the warm-up
    single         there is no sub-agent: the main agent searches itself
    by-arrival     a sub-agent's groups are made as samples arrive, not by query (`arrival.py`)
    no-alignment   each of a sub-agent's calls counts once, however many a rollout made

Each arm and seed is one run of `mgrpo train` with evaluations on held-out questions; the arms of a seed begin with the
same weights, demonstrations and questions. The tiny model is made and taught first, and has its own held-out questions
(`tiny.py`); --model PATH takes other weights, with the settings of examples/geography/train.toml.

Everything is kept in DIR and nothing is done twice: a finished run is not repeated, and a stopped run continues from
its checkpoint. Several processes may share DIR if they have no seed in common. At the end a table, a figure and JSON
are made of all finished runs in DIR, also those of other processes (`report.py`); --report only makes these.
"""

from __future__ import annotations

import argparse
import fcntl
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mgrpo.bench.ablation.report import final, report
from mgrpo.bench.ablation.tiny import export, write_questions, write_tiny
from mgrpo.bench.harness import commit
from mgrpo.engine.config.resume import check_unchanged
from mgrpo.engine.config.schema import Config, load_config
from mgrpo.engine.report.display import make_display
from mgrpo.engine.training import colocated

ARMS = {
    "co-train": [],
    "main-only": ["agents.sub.train=false"],
    "single": ["environment.options.arm=single", "agents.main.max_context=384", "agents.sub.train=false"],
    "by-arrival": ["algorithm.advantage=mgrpo.bench.ablation.arrival:by_arrival"],
    "no-alignment": ["algorithm.alignment=none"],
}
TINY = "tiny"
GEOGRAPHY = Path(__file__).resolve().parents[2] / "examples" / "geography"
BASE = Path(__file__).with_name("ablation.toml")
LEARNT = "rl-00000"  # the checkpoint at the end of a warm-up
LESSONS = [
    "steps=0",
    "environment.options.carelessness=0.0",
    "warmup.steps=600",
    "warmup.lr=2e-3",
    "eval.questions=100",
]


@dataclass(frozen=True)
class Run:
    """Describe one arm with one seed; its folder holds nothing else."""

    arm: str
    seed: int
    config: Config

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    def ended(self) -> bool:
        """Return whether the run has ended. Raises ValueError if it ran with another configuration."""
        before = final(self.folder)
        if before is not None:
            check_unchanged(before.config, self.config)
        return before is not None and before.config.steps == self.config.steps

    def train(self) -> None:
        """Begin the run or continue it. Raises Interrupted after Ctrl-C."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "commits").open("a") as file:
            file.write(f"{commit()}\n")
        train(self.config)


def train(config: Config) -> None:
    """Train with a display."""
    display = make_display(list(config.agents))
    try:
        colocated.train(config, True, display)
    finally:
        display.close()


def make_run(out: Path, arm: str, seed: int, model: str, changes: Sequence[str] = ()) -> Run:
    """Return an arm's run. model: TINY or a directory. changes: KEY=VALUE, applied last."""
    models = weights(out, arm) if model == TINY else {"main": Path(model), "sub": Path(model)}
    overrides = [
        f"run_dir={folder_of(out, arm, seed, model)}",
        f"seed={seed}",
        *example(out / "questions" if model == TINY else out / "data"),
        *(f"agents.{agent}.model={path}" for agent, path in models.items()),
        *ARMS[arm],
        *changes,
    ]
    return Run(arm, seed, load_config(BASE if model == TINY else GEOGRAPHY / "train.toml", overrides))


def folder_of(out: Path, arm: str, seed: int, model: str) -> Path:
    return out / "runs" / Path(model).name / f"{arm}-{seed}"


def example(data: Path) -> list[str]:
    """Return the overrides that say where the environment and its data are."""
    return [f"environment.use={GEOGRAPHY / 'environment.py'}:Geography", f"environment.options.data={data}"]


# ---- the weights and questions that runs begin with


def weights(out: Path, arm: str) -> dict[str, Path]:
    """Return the tiny model's weights with which the agents of an arm begin."""
    roles = {"main": "single", "sub": "sub"} if arm == "single" else {"main": "main", "sub": "sub"}
    return {agent: out / "taught" / role for agent, role in roles.items()}


def prepare(out: Path, tiny: bool = True, changes: Sequence[str] = ()) -> None:
    """Make the data and the tiny model if they are missing; one process does this while others wait."""
    out.mkdir(parents=True, exist_ok=True)
    with alone(out / "prepare.lock"):
        script = [sys.executable, str(GEOGRAPHY / "prepare.py"), "--out", str(out / "data"), "--only", "tiny"]
        if not (out / "data" / "gazetteer.json").exists():
            subprocess.run(script, check=True)
        if tiny:
            prepare_tiny(out, changes)


def prepare_tiny(out: Path, changes: Sequence[str]) -> None:
    if not (out / "questions" / "gazetteer.json").exists():
        write_questions(out / "questions", out / "data")
    if not (out / "untaught" / "config.json").exists():
        write_tiny(out / "untaught", out / "questions", seed=0)
    teach(out, "co-train", {"main": "main", "sub": "sub"}, changes)
    teach(out, "single", {"main": "single"}, changes)


def teach(out: Path, arm: str, roles: dict[str, str], changes: Sequence[str]) -> None:
    """Run a long warm-up on flawless demonstrations; an arm's agents begin with the weights that it ends with."""
    if all((out / "taught" / role).exists() for role in roles.values()):
        return
    models = [f"agents.{agent}.model={out / 'untaught'}" for agent in ("main", "sub")]
    given = [f"run_dir={out / 'lessons' / arm}", *example(out / "questions"), *models, *ARMS[arm], *LESSONS, *changes]
    config = load_config(BASE, given)
    train(config)
    for agent, role in roles.items():
        export(config, agent, Path(config.run_dir) / "checkpoints" / LEARNT / agent, out / "taught" / role)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold a lock on the file; wait while another process holds it."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---- the command


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mgrpo.bench.ablation", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=lambda text: Path(text).absolute(), required=True, help="folder for everything")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--model", default=TINY, help="tiny, or a directory with a transformers causal LM")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="config keys to change in every run")
    parser.add_argument("--report", action="store_true", help="only report the runs that ended")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all arms and seeds that have not ended, and report."""
    options = parse(arguments)
    if not options.report:
        prepare(options.out, options.model == TINY)
        for seed in options.seeds:
            for arm in options.arms:
                run = make_run(options.out, arm, seed, options.model, options.set)
                if not run.ended():
                    print(f"{options.model}: {arm}, seed {seed}", flush=True)
                    run.train()
                if (left := run.folder / "checkpoints").exists():  # gigabytes that nothing needs any more
                    shutil.rmtree(left)
    report(options.out / "runs")
