"""Add up what the processes of a run need on each device, and say whether it fits, and if not, which key to lower."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mgrpo.engine.cli.check.memory import MIB, Sampling, Training, sampling, training
from mgrpo.engine.cli.check.model_size import ModelSize
from mgrpo.engine.cli.check.processes import Process
from mgrpo.engine.config.schema import Config
from mgrpo.engine.system.memory import machine_memory, resident

GIB = 2**30
UNITS = {f"{letter}iB": 2 ** (10 * (i + 1)) for i, letter in enumerate("KMGT")}
UNITS |= {f"{letter}B": 1000 ** (i + 1) for i, letter in enumerate("KMGT")}
# On a CPU the heap at its peak is this many times as large as what it holds beside weights and moments, because pieces
# are free but too small: measured 1.38 to 1.63 on models of 36 to 56 million weights (a test repeats two of them).
HEAP = 1.4
CONTEXT = 600 * MIB  # of a GPU, for CUDA itself, in each process; an assumption


@dataclass(frozen=True)
class MemoryPart:
    """Hold a share of a process' peak. lower: what makes it smaller: "lower KEY …", or the key of the model."""

    what: str
    size: int
    lower: str = ""


def parse_size(text: str) -> int:
    """Return the bytes that a text such as "80GiB" or "16 GB" means. Raises ValueError naming the option."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)\s*", text)
    if not found or not float(found[1]):
        raise ValueError(f"--device-memory: {text!r} given: expected a size such as 80GiB")
    return int(float(found[1]) * UNITS[found[2]])


def capacity(device: str, given: str | None) -> tuple[int, int]:
    """Return the bytes of a device's memory, and those that are free now. given: the size of another machine's."""
    if given is not None:
        return (parse_size(given),) * 2
    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(torch.device(device.split(" ")[0]))
        return total, free
    return machine_memory()


def peak(
    process: Process, config: Config, sizes: Mapping[str, ModelSize], prompts: Mapping[str, int]
) -> list[MemoryPart]:
    """Return the shares of what a process needs at its peak; `prompts` as for `agent_sampling`."""
    kind = "cuda" if process.device.startswith("cuda") else "cpu"
    heap = HEAP if kind == "cpu" else 1.0
    agents, ranks = config.agents, process.ranks
    trains = {name: training(sizes[name], agents[name], config, ranks, kind) for name in process.trains}
    samples = {name: sampling(sizes[name], agents[name], config, prompts.get(name, 1)) for name in process.samples}
    held = [MemoryPart("the process itself", CONTEXT if kind == "cuda" else resident())]
    for name in config.agents:
        if name in trains:
            held.append(MemoryPart(f"{name}: weights, masters, moments", trains[name].held, f"agents.{name}.model"))
        elif name in samples:  # new weights are read beside the old ones, into the machine's memory
            copies = 1 if kind == "cuda" else 2
            held.append(MemoryPart(f"{name}: weights", copies * samples[name].weights, f"agents.{name}.model"))
    phases = [_training_parts(name, found, heap, config) for name, found in trains.items()]
    if samples:
        phases.append(_sampling_parts(samples, heap))
    return held + max(phases, key=lambda parts: sum(part.size for part in parts), default=[])


def _training_parts(name: str, found: Training, heap: float, config: Config) -> list[MemoryPart]:
    tokens = f"compute.max_tokens = {config.compute.max_tokens}"
    spare = "" if config.compute.activation_checkpointing else ", or set compute.activation_checkpointing = true"
    return [
        MemoryPart(f"{name}: gradients", int(found.gradients * heap), f"agents.{name}.model"),
        MemoryPart(f"{name}: activations", int(found.activations * heap), f"lower {tokens}{spare}"),
        MemoryPart(f"{name}: the loss", int(found.loss * heap), f"lower {tokens}"),
    ]


def _sampling_parts(samples: Mapping[str, Sampling], heap: float) -> list[MemoryPart]:
    parts = [
        MemoryPart(f"{name}: key-value cache", found.cache, f"lower compute.concurrency or agents.{name}.max_context")
        for name, found in samples.items()
    ]
    step = max(found.step for found in samples.values())
    return [*parts, MemoryPart("a step of sampling", int(step * heap), "lower compute.concurrency")]


def verdict(device: str, parts: Sequence[MemoryPart], total: int) -> str | None:
    """Return what is wrong if these parts do not fit a device of so many bytes, with what to lower; None: they fit."""
    need = sum(part.size for part in parts)
    if need <= total:
        return None
    worst = sorted((part for part in parts if part.lower.startswith("lower")), key=lambda part: -part.size)
    together: dict[str, int] = {}  # by the key to lower, which is the second word
    for part in worst:
        together[part.lower.split()[1]] = together.get(part.lower.split()[1], 0) + part.size
    enough = [part for part in worst if need - together[part.lower.split()[1]] < total]
    if enough:
        advice = f"{enough[0].lower} ({enough[0].what} take {shown(enough[0].size)})"
    else:
        heavy = max((part for part in parts if part.lower.startswith("agents")), key=lambda part: part.size)
        advice = f"take a smaller {heavy.lower}, or a device with more memory ({heavy.what} take {shown(heavy.size)})"
    return f"memory: {device} has {shown(total)}, and the run needs about {shown(need)} of it: {advice}"


def shown(size: int) -> str:
    """Return a number of bytes in words."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / MIB:.1f} MiB"


def agent_line(size: ModelSize, found: Training, drawn: Sampling, config: Config) -> str:
    """Return the memory of one agent in words: what a rank that trains it has, and what sampling it takes."""
    held = {"weights": found.weights, "masters": found.masters, "moments": found.moments, "reference": found.reference}
    parts = [f"{shown(bytes_)} {name}" for name, bytes_ in held.items() if bytes_]
    other = size.passing.saved if config.compute.activation_checkpointing else size.passing.checkpointed
    switch = "without" if config.compute.activation_checkpointing else "with"
    if found.gradients:
        parts.append(f"{shown(found.gradients)} gradients")
        parts.append(f"{shown(found.activations)} activations ({shown(other)} {switch} activation_checkpointing)")
        parts.append(f"{shown(found.loss)} logits and loss")
    parts.append(f"at most {shown(drawn.cache)} key-value cache")
    return f"{size.parameters / 1e6:,.1f} million weights: " + ", ".join(parts)
