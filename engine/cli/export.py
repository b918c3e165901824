"""Write a trained agent of a run as a model that transformers and vLLM load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers

import mgrpo
from mgrpo.engine.cli.checkpoints import find_checkpoint
from mgrpo.engine.cli.push import check_repository, push_directory
from mgrpo.engine.config.schema import AgentConfig, Config
from mgrpo.engine.hub.snapshots import folder
from mgrpo.engine.model.pretrained import base_name, new_directory, require_dtype, write_pretrained
from mgrpo.engine.model.sharding import Shards
from mgrpo.engine.report import summary
from mgrpo.engine.report.metrics import read_rows
from mgrpo.engine.run.directory import RunDirectory, RunPaths, stage_and_step
from mgrpo.engine.run.manifest import VersionManifest, write_manifest
from mgrpo.engine.run.metrics import Row

POINTS = 12  # rows, at most, of the card's table of numbers

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [mgrpo, reinforcement-learning, multi-agent]
{origin}---

# {agent}

The agent `{agent}` of a multi-agent system, after {stage} step {step} of training by M-GRPO
([arXiv 2511.13288](https://arxiv.org/abs/2511.13288)). Weights: {dtype}, {size:,} bytes. It began as `{base}`.

```
{summary}
```
{curves}
## Settings

```json
{settings}
```

Made with mgrpo {mgrpo}, torch {torch}, transformers {transformers}.
"""


def export(
    run: Path, agent: str | None, step: int | str | None, out: Path | None, dtype: str, push: str | None = None
) -> str:
    """Write one agent, or with None each that is trained, and return a line per directory that was written.

    run: a run directory. step: the rl step of the checkpoint, "best" or None: the latest. out: the new directory, or
    with agent None the one in which each agent gets its own; None: export/ in the run directory. dtype: of the weights,
    a key of `pretrained.DTYPES`. push: the repository of a hub to upload the directory to, "organisation/name", private
    if it is new. Raises ValueError naming the option if there is no such agent or checkpoint, or if the directory is
    there already; OSError if the disk is full (then nothing is left in `out`), or the hub refuses or is out of reach.
    """
    config, paths = summary.read_config(run), RunPaths(run)
    require_dtype("--dtype", dtype)
    if agent is not None and agent not in config.agents:
        raise ValueError(f"--agent: {agent!r} given: expected one of {list(config.agents)}")
    names = [agent] if agent is not None else config.trained
    if push is not None:
        check_repository("--push", push)
        if len(names) != 1:
            raise ValueError(f"--push: {push!r} given for several agents: expected --agent too, one of {names}")
    lines = []
    for name in names:
        checkpoint = find_checkpoint(config, paths, name, step)
        place = out if out is not None and agent is not None else (out or paths.path / "export") / name
        manifest = _write(config, paths, name, checkpoint, place, dtype)
        lines.append(f"{place}: {name} after {checkpoint.name}, {dtype}, {manifest.size:,} bytes")
        if push is not None:
            lines.append(push_directory(place, push))
    return "\n".join(lines)


def _write(config: Config, paths: RunPaths, agent: str, checkpoint: Path, out: Path, dtype: str) -> VersionManifest:
    if out.exists():
        raise ValueError(f"--out: {out} exists: expected the name of a new directory")
    RunDirectory.open_checkpoint(checkpoint)
    settings = config.agents[agent]
    if not (checkpoint / agent).is_dir():
        raise ValueError(
            f"--agent: {agent!r} given: expected an agent that is trained, it is {settings.model} as it was"
        )
    try:
        with new_directory(out) as aside:
            manifest = _write_weights(agent, settings, checkpoint, aside, dtype)
            (aside / "README.md").write_text(_card(config, paths, manifest, aside))
    except FileNotFoundError as error:
        if checkpoint.is_dir():
            raise
        raise ValueError(f"RUN: {checkpoint} was deleted meanwhile, since the run goes on: export again") from error
    return manifest


def _write_weights(agent: str, settings: AgentConfig, checkpoint: Path, out: Path, dtype: str) -> VersionManifest:
    """Fill an empty directory with the model of a checkpoint, and its manifest, which is returned."""
    stage, step = stage_and_step(checkpoint)
    weights, base = Shards(checkpoint / agent, "weights"), folder(agent, settings, weights=True)
    shards = write_pretrained(out, base, settings, sorted(weights.shapes), weights.read, dtype)
    origin = base_name(settings)
    manifest = VersionManifest(
        kind="model", agent=agent, stage=stage, step=step, base=origin, dtype=dtype, shards=shards
    )
    write_manifest(out, manifest)
    return manifest


def _card(config: Config, paths: RunPaths, manifest: VersionManifest, out: Path) -> str:
    """Return the text of the model card; the figure that it shows is drawn into `out`."""
    rows, curves = read_rows(paths.path, config), ""
    if rows:
        shutil.copyfile(summary.draw(paths.path), out / "curves.png")
        curves = f"\n![Curves of the run](curves.png)\n\n{_numbers(config, rows)}\n"
    return CARD.format(
        agent=manifest.agent,
        stage=manifest.stage,
        step=manifest.step,
        dtype=manifest.dtype,
        size=manifest.size,
        base=manifest.base,
        origin=f"base_model: {manifest.base}\n" if config.agents[manifest.agent].on_hub else "",
        summary=summary.summary(paths.path).replace(f"{paths.path}: ", ""),
        curves=curves,
        settings=json.dumps(_settings(config, manifest.agent), indent=2),
        mgrpo=mgrpo.__version__,
        torch=torch.__version__,
        transformers=transformers.__version__,
    )


def _numbers(config: Config, rows: Sequence[Row]) -> str:
    """Return a table of the curves' numbers at a few rl steps, the first and the last among them."""
    columns = ["eval/held_out_accuracy", *(f"{name}/reward_mean" for name in config.agents)]
    steps: dict[int, Row] = {}
    for row in rows:
        if row["stage"] == "rl":
            steps.setdefault(row["step"], {}).update(row)
    chosen = sorted(steps)
    if len(chosen) > POINTS:
        chosen = sorted({chosen[i * (len(chosen) - 1) // (POINTS - 1)] for i in range(POINTS)})
    lines = [["rl step", *columns], ["---"] * (1 + len(columns))]
    lines += [[str(step), *(_number(steps[step].get(key)) for key in columns)] for step in chosen]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _settings(config: Config, agent: str) -> dict[str, Any]:
    """Return what shaped the weights. Environment, store and servers are left out: they may hold keys and addresses."""
    parts = {"algorithm": config.algorithm, "reward": config.reward, "warmup": config.warmup}
    numbers = {"seed": config.seed, "steps": config.steps, "queries_per_step": config.queries_per_step}
    settings: dict[str, Any] = msgspec.to_builtins({agent: config.agents[agent]} | parts)
    settings[agent]["model"] = base_name(config.agents[agent])
    settings[agent].pop("vllm", None)
    return settings | numbers
