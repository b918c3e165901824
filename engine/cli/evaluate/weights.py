"""Find the weights that each agent is to be evaluated with, and make its sampler."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from mgrpo.engine.cli.checkpoints import find_checkpoint, run_of
from mgrpo.engine.config.schema import AgentConfig, Config, VLLMConfig
from mgrpo.engine.inference.in_process import InProcessSampler
from mgrpo.engine.inference.sampler import Sampler
from mgrpo.engine.model.causal_lm import load_model, load_tokenizer
from mgrpo.engine.policy.checkpoint import read_into
from mgrpo.engine.run.directory import RunDirectory, RunPaths, checkpoints_in
from mgrpo.engine.types import MAIN

SERVER = ("http://", "https://")
PATIENCE = 60.0  # seconds to wait for a server that does not answer


@dataclass(frozen=True)
class Weights:
    """Say which weights an agent samples with: those of agent.model, unless a state of it is named, or a server.

    said: where they come from, in words.
    """

    said: str
    agent: AgentConfig
    state: Path | None = None
    server: str = ""


def base(config: Config) -> dict[str, Weights]:
    """Return the models of the config, before any training."""
    return {name: Weights(f"{agent.model}, untrained", agent) for name, agent in config.agents.items()}


def latest(config: Config, step: str | None) -> dict[str, Weights]:
    """Return the weights of a checkpoint of the config's run, or its models if the run has none.

    step: of the checkpoint, None: the latest. Raises ValueError naming the option if there is no such checkpoint.
    """
    paths = RunPaths(config.run_dir)
    if step is None and not _has_checkpoints(paths):
        return base(config)
    if run_of(paths.path) is None:
        raise ValueError(f"--step: {step} given: expected a run in run_dir = {paths.path}")
    return saved(config, paths.path, step)


def saved(config: Config, place: Path, step: str | None = None) -> dict[str, Weights]:
    """Return the weights of a checkpoint of all agents, or of a run: its latest, or that of a step.

    Raises ValueError if there is none, if it is incomplete, or if it is of other agents.
    """
    if not place.is_dir():
        raise ValueError(f"--checkpoint: {place} is not a directory: expected a run, or one of its checkpoints/")
    if run := run_of(place):
        which = "the latest" if step is None else f"step {step}"
        found = {}
        for name, agent in config.agents.items():
            _check_agents(place, list(run[0].agents), config)
            checkpoint = find_checkpoint(*run, name, step)
            found[name] = Weights(f"{checkpoint.name} of {place} ({which})", agent, _opened(checkpoint, name))
        return found
    if step is not None:
        raise ValueError(f"--step: {step} given with --checkpoint {place}: expected the directory of a run")
    agents = json.loads((RunDirectory.open_checkpoint(place) / "state.json").read_text()).get("agents")
    if not isinstance(agents, dict):
        raise ValueError(f"--checkpoint: {place} is that of one agent: expected the directory of its run, and --step")
    _check_agents(place, list(agents), config)
    said = f"{place.name} of {place.parent.parent}"
    return {name: Weights(said, agent, place / name) for name, agent in config.agents.items()}


def replaced(config: Config, weights: Mapping[str, Weights], given: Sequence[str]) -> dict[str, Weights]:
    """Return the weights with some agents' replaced, as --model names them.

    given: "AGENT=MODEL", where the model is a directory, the id of one on a hub, or the url of a vLLM server; without
    an agent, the directory that `mgrpo export` wrote for all agents, or a model for the only one. Raises ValueError.
    """
    found = dict(weights)
    for text in given:
        name, mark, model = text.partition("=")
        if mark and name in config.agents:
            found[name] = _model(config, name, model)
        elif mark and name.isidentifier():
            raise ValueError(f"--model: {text!r} given: expected one of the agents {list(config.agents)}")
        else:
            found |= _of_all(config, text)
    return found


def make_sampler(name: str, weights: Weights, config: Config) -> Sampler:
    """Return a sampler with these weights. Raises ValueError if they are damaged, or of another model."""
    agent, compute = weights.agent, config.compute
    if weights.server:
        from mgrpo.engine.inference.vllm.client import VLLMSampler

        tokenizer = load_tokenizer(name, agent)
        return VLLMSampler(name, agent, tokenizer, [weights.server], compute.concurrency, initial=True)
    model = load_model(name, agent, compute).requires_grad_(False)
    if weights.state is not None:
        with torch.no_grad():
            read_into(dict(model.named_parameters()), weights.state, "weights")
    return InProcessSampler(model, load_tokenizer(name, agent), agent, compute.concurrency)


def _of_all(config: Config, text: str) -> dict[str, Weights]:
    """Return what a --model without an agent's name stands for."""
    folders = {name: Path(text) / name for name in config.agents}
    there = [name for name, folder in folders.items() if folder.is_dir()]
    if there:
        return {name: _model(config, name, str(folders[name])) for name in there}
    if len(config.agents) == 1:
        return {MAIN: _model(config, MAIN, text)}
    raise ValueError(
        f"--model: {text!r} given: expected AGENT=MODEL with one of the agents {list(config.agents)}, or a directory "
        "that `mgrpo export` wrote for them"
    )


def _model(config: Config, name: str, model: str) -> Weights:
    agent = config.agents[name]
    if model.startswith(SERVER):
        served = msgspec.structs.replace(agent, vllm=VLLMConfig(urls=[model.rstrip("/")], patience=PATIENCE))
        return Weights(f"the server {model}", served, server=model)
    if not model:
        raise ValueError(f"--model: '{name}=' given: expected a directory, the id of a model, or a server's url")
    place = str(Path(model).resolve()) if Path(model).is_dir() else model
    return Weights(model, msgspec.structs.replace(agent, model=place, revision=""))


def _opened(checkpoint: Path, name: str) -> Path:
    RunDirectory.open_checkpoint(checkpoint)
    return checkpoint / name


def _check_agents(place: Path, found: Sequence[str], config: Config) -> None:
    if sorted(found) != sorted(config.agents):
        raise ValueError(f"{place}: agents {sorted(found)} found, expected {sorted(config.agents)}")


def _has_checkpoints(paths: RunPaths) -> bool:
    return any(checkpoints_in(folder) for folder in (paths.checkpoints, *paths.agents.glob("*/checkpoints")))
