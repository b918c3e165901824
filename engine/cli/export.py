"""Write a trained agent of a run as a model that transformers and vLLM load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers

import mgrpo
from mgrpo.engine.config.schema import Config
from mgrpo.engine.model.pretrained import DTYPES, write_pretrained
from mgrpo.engine.model.sharding import Shards
from mgrpo.engine.report import summary
from mgrpo.engine.report.metrics import read_rows
from mgrpo.engine.run.directory import RunDirectory, RunPaths, checkpoints_in, stage_and_step

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [mgrpo, reinforcement-learning, multi-agent]
---

# {agent}

The agent `{agent}` of a multi-agent system, after {stage} step {step} of training by M-GRPO
([arXiv 2511.13288](https://arxiv.org/abs/2511.13288)). Weights: {dtype}, {size:,} bytes. It began as `{base}`.

```
{summary}
```
{figure}
## Settings

```json
{settings}
```

Made with mgrpo {mgrpo}, torch {torch}, transformers {transformers}.
"""


def export(run: Path, agent: str | None, step: int | None, out: Path | None, dtype: str) -> str:
    """Write one agent, or with None each that is trained, and return a line per directory that was written.

    run: a run directory. step: the rl step of the checkpoint, None: the latest checkpoint. out: the new directory, or
    with agent None the one in which each agent gets its own; None: export/ in the run directory. dtype: of the weights,
    a key of `pretrained.DTYPES`. Raises ValueError naming the option if there is no such agent or checkpoint, or if the
    directory is there already; OSError if the disk is full. Then nothing is left in `out`.
    """
    config, paths = summary.read_config(run), RunPaths(run)
    if dtype not in DTYPES:
        raise ValueError(f"--dtype: {dtype!r} given: expected one of {list(DTYPES)}")
    if agent is not None and agent not in config.agents:
        raise ValueError(f"--agent: {agent!r} given: expected one of {list(config.agents)}")
    lines = []
    for name in [agent] if agent is not None else config.trained:
        checkpoint = _checkpoint(config, paths, name, step)
        place = out if out is not None and agent is not None else (out or paths.path / "export") / name
        size = _write(config, paths, name, checkpoint, place, dtype)
        lines.append(f"{place}: {name} after {checkpoint.name}, {dtype}, {size:,} bytes")
    return "\n".join(lines)


def _checkpoint(config: Config, paths: RunPaths, agent: str, step: int | None) -> Path:
    """Return an agent's latest checkpoint, or that of an rl step. Raises ValueError if there is none."""
    folder = paths.checkpoints if config.colocated else paths.agent(agent).checkpoints
    there = checkpoints_in(folder)
    if not there:
        raise ValueError(f"RUN: {folder} given: expected a checkpoint in it, none has been written yet")
    if step is None:
        return there[-1]
    for path in there:
        if path.name == f"rl-{step:05}":
            return path
    names = [path.name for path in there]
    raise ValueError(f"--step: {step} given: expected one of the checkpoints that are kept: {names}")


def _write(config: Config, paths: RunPaths, agent: str, checkpoint: Path, out: Path, dtype: str) -> int:
    base = Path(config.agents[agent].model)
    if out.exists():
        raise ValueError(f"--out: {out} exists: expected the name of a new directory")
    RunDirectory.open_checkpoint(checkpoint)
    if not (checkpoint / agent).is_dir():
        raise ValueError(f"--agent: {agent!r} given: expected an agent that is trained, it is {base} as it was")
    shards = Shards(checkpoint / agent, "weights")
    aside = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(aside, ignore_errors=True)  # left by an export that was killed
    aside.mkdir(parents=True)
    try:
        size = write_pretrained(aside, config.agents[agent], sorted(shards.shapes), shards.read, dtype)
        (aside / "README.md").write_text(_card(config, paths, agent, checkpoint, dtype, size, aside))
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return size


def _card(config: Config, paths: RunPaths, agent: str, checkpoint: Path, dtype: str, size: int, out: Path) -> str:
    """Return the text of the model card; the figure that it shows is drawn into `out`."""
    stage, step = stage_and_step(checkpoint)
    figure = ""
    if read_rows(paths.path, config):
        shutil.copyfile(summary.draw(paths.path), out / "curves.png")
        figure = "\n![Curves of the run](curves.png)\n"
    return CARD.format(
        agent=agent,
        stage=stage,
        step=step,
        dtype=dtype,
        size=size,
        base=Path(config.agents[agent].model).name,
        summary=summary.summary(paths.path).replace(f"{paths.path}: ", ""),
        figure=figure,
        settings=json.dumps(_settings(config, agent), indent=2),
        mgrpo=mgrpo.__version__,
        torch=torch.__version__,
        transformers=transformers.__version__,
    )


def _settings(config: Config, agent: str) -> dict[str, Any]:
    """Return what shaped the weights. Environment, store and servers are left out: they may hold keys and addresses."""
    parts = {"algorithm": config.algorithm, "reward": config.reward, "warmup": config.warmup}
    numbers = {"seed": config.seed, "steps": config.steps, "queries_per_step": config.queries_per_step}
    settings: dict[str, Any] = msgspec.to_builtins({agent: config.agents[agent]} | parts)
    settings[agent]["model"] = Path(settings[agent]["model"]).name
    settings[agent].pop("vllm", None)
    return settings | numbers
