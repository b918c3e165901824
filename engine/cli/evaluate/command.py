"""Evaluate the agents of a config with given weights, alone or in arms, and report what was found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

import mgrpo
from mgrpo.engine.cli.evaluate import report
from mgrpo.engine.cli.evaluate.arms import arms_of
from mgrpo.engine.cli.evaluate.play import Samplers, play
from mgrpo.engine.cli.evaluate.weights import Weights, base, latest, replaced, saved
from mgrpo.engine.config.schema import Config
from mgrpo.engine.environment.loader import load_environment
from mgrpo.engine.rollout.evaluation import Evaluation, SetOutcome, powers
from mgrpo.engine.run.metrics import plain
from mgrpo.engine.system.files import replace
from mgrpo.engine.system.process import Interrupted, ctrl_c, keep_memory
from mgrpo.engine.system.words import counted


@dataclass(frozen=True)
class Options:
    """Hold what `mgrpo eval` was asked for, apart from the config; the names are those of its options."""

    checkpoint: Path | None = None
    step: str | None = None
    model: Sequence[str] = ()
    base: bool = False
    arms: bool = False
    k: Sequence[int] = ()
    out: Path | None = None
    episodes: int = 0
    console: Console = field(default_factory=Console)


def evaluate(config: Config, options: Options) -> None:
    """Evaluate, print the tables and the episodes that were asked for, and write the JSON file.

    Raises ValueError naming the option for what does not exist or does not go together, Interrupted after Ctrl-C, when
    what was played until then has been reported.
    """
    keep_memory()
    ks, out = _ks(config, options.k), options.out
    if out is not None and not out.parent.is_dir():
        raise ValueError(f"--out: {out} given: expected a file in a directory that exists")
    arms = _arms(config, options)
    environment = load_environment(config.environment)
    evaluation = Evaluation.of(config, environment)
    say, found, whole = options.console.out, dict[str, dict[str, SetOutcome]](), True
    samplers = Samplers(config)
    try:
        with ctrl_c() as stopped:
            for arm, weights in arms.items():
                _announce(options, arm, weights)
                played = play(config, environment, samplers.use(weights), evaluation, options.episodes, stopped)
                found[arm], whole = evaluation.outcomes(played.rollouts), played.whole
                tokenizers = {name: sampler.tokenizer for name, sampler in samplers.samplers.items()}
                shown = [rollout for rollout in played.rollouts if rollout.trajectories][: options.episodes]
                report.show_episodes(options.console, config, tokenizers, shown)
                if not whole:
                    break
    finally:
        samplers.close()
    settings = config.eval
    decoded = f"temperature {settings.temperature:g}" if settings.temperature else "greedy"
    say(f"{counted(settings.samples, 'sample')} of each task, {decoded}, 95 % intervals")
    say("\n".join([*report.table(found, settings.samples, ks), *report.differences(found)]))
    if out is not None:
        replace(out, _json(config, arms, found, whole).encode())
        say(f"written: {out}")
    if not whole:
        raise Interrupted(_how_much(evaluation, arms, found))


def _arms(config: Config, options: Options) -> dict[str, dict[str, Weights]]:
    """Return the weights of all agents in each arm; there is one without a name if arms are not compared."""
    if options.base and (options.checkpoint is not None or options.step is not None):
        raise ValueError("--base: given with --checkpoint or --step: expected one of them")
    if options.base:
        new = base(config)
    elif options.checkpoint is not None:
        new = saved(config, options.checkpoint, options.step)
    else:
        new = latest(config, options.step)
    new = replaced(config, new, options.model)
    return arms_of(config, base(config), new) if options.arms else {"": new}


def _ks(config: Config, given: Sequence[int]) -> list[int]:
    """Return the k of pass@k to show. Raises ValueError if one is larger than the number of samples."""
    samples = config.eval.samples
    for k in given:
        if not 1 <= k <= samples:
            raise ValueError(f"--k: {k} given: expected 1 to {samples}, the samples of each task (--samples)")
    return sorted(set(given)) or [k for k in powers(samples) if k > 1]


def _announce(options: Options, arm: str, weights: Mapping[str, Weights]) -> None:
    if arm:
        options.console.out(f"{arm}:")
    for name, one in weights.items():
        options.console.out(f"{name}: {one.said}")


def _json(config: Config, arms: Mapping[str, Mapping[str, Weights]], found: report.Found, whole: bool) -> str:
    """Return the file of --out. complete: whether nothing was cut short."""
    said: dict[str, Any] = {arm: {name: one.said for name, one in weights.items()} for arm, weights in arms.items()}
    settings = config.eval
    head = {
        "mgrpo": mgrpo.__version__,
        "environment": config.environment.use,
        "weights": said.get("", said),
        "seed": config.seed,
        "samples": settings.samples,
        "temperature": settings.temperature,
        "complete": whole and len(found) == len(arms),
    }
    return json.dumps(plain(head | report.as_json(found, settings.samples)), indent=1, allow_nan=False) + "\n"


def _how_much(evaluation: Evaluation, arms: Mapping[str, object], found: report.Found) -> str:
    done = sum(len(outcome.calls) for sets in found.values() for outcome in sets.values())
    return f"stopped after {done} of {counted(len(arms) * len(evaluation.jobs), 'episode')}"
