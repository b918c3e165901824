"""Define what `mgrpo bench kernels` measures on which machine, and its targets there.

Legend: N rows, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from mgrpo.bench.harness import Result, figure


@dataclass(frozen=True)
class Shape:
    """Describe a head: N, H, V, and the fractions of live rows to time."""

    rows: int
    width: int
    vocabulary: int
    live: tuple[float, ...] = (1.0,)

    def __str__(self) -> str:
        return f"N={self.rows} H={self.width} V={self.vocabulary}"


@dataclass(frozen=True)
class Plan:
    """Say what to measure.

    logits: N and V. skipped: candidates not to try, with the reason. seconds: after this time no new shape begins.
    """

    shapes: tuple[Shape, ...]
    logits: tuple[tuple[int, int], ...]
    copy_bytes: int
    trajectories: int
    rounds: int
    seconds: float = math.inf
    skipped: Mapping[str, str] = field(default_factory=dict)


GPU_SHAPE = Shape(8192, 4096, 151936, (1.0, 0.5, 0.25))
CPU_SHAPE = Shape(4096, 576, 49152, (0.5,))
GPU_LOGITS = (8192, 151936)
TRAJECTORIES = 1 << 20

_GPU = Plan(
    (
        GPU_SHAPE,
        Shape(8192, 2048, 151936),
        Shape(8192, 4096, 128256),
        Shape(4096, 2048, 49152),
        Shape(32768, 2048, 49152, (0.5,)),
        Shape(65536, 2048, 49152, (0.25,)),
        Shape(32768, 4096, 151936, (0.25,)),
    ),
    (GPU_LOGITS, (8192, 128256), (16384, 49152)),
    copy_bytes=1 << 30,
    trajectories=TRAJECTORIES,
    rounds=7,
    seconds=170,  # the last shape and the logits take more: four minutes in all
)
_GPU_QUICK = Plan((GPU_SHAPE,), (GPU_LOGITS,), copy_bytes=1 << 30, trajectories=TRAJECTORIES, rounds=3)
_CPU = Plan((CPU_SHAPE,), ((512, 49152),), copy_bytes=1 << 28, trajectories=TRAJECTORIES, rounds=5)
_CPU_QUICK = Plan(
    (Shape(512, 256, 4096, (0.5,)),),
    ((256, 4096),),
    copy_bytes=1 << 24,
    trajectories=1 << 14,
    rounds=2,
    skipped={"torch.compile": "--quick compiles nothing: compiling takes longer than everything else"},
)


def plan_for(device: torch.device, quick: bool) -> Plan:
    """Return the plan for that kind of machine; the quick plan has smaller shapes on a CPU, fewer shapes on a GPU."""
    if device.type == "cuda":
        return _GPU_QUICK if quick else _GPU
    return _CPU_QUICK if quick else _CPU


@dataclass(frozen=True)
class Target:
    """Describe a figure to reach on a GPU (the bounds are for an H100) or on a CPU."""

    name: str
    unit: str
    on_gpu: bool
    at_least: float | None = None
    at_most: float | None = None


_ON_GPU, _ON_CPU = f"linear_grpo_loss bf16 {GPU_SHAPE}", f"linear_grpo_loss bf16 {CPU_SHAPE} 50% live"
GEMMS = Target(f"{_ON_GPU} 100% live: time over the three bare GEMMs", "x", True, at_most=1.15)
MEMORY = Target(f"{_ON_GPU} 100% live: extra memory", "GB", True, at_most=3.0)
QUARTER = Target(f"{_ON_GPU}: time of 25% live over 100% live", "x", True, at_most=0.32)
BANDWIDTH = Target(
    f"grpo_loss bf16 N={GPU_LOGITS[0]} V={GPU_LOGITS[1]}: floor traffic over copy bandwidth", "%", True, at_least=85
)
ADVANTAGES = Target(f"group_advantages of {TRAJECTORIES} trajectories on a GPU: time", "us", True, at_most=100)
TORCH = Target(f"{_ON_CPU}: times as fast as plain torch", "x", False, at_least=2.5)
TRL = Target(f"{_ON_CPU}: times as fast as TRL chunked log-prob", "x", False, at_least=1.3)
TENTH = Target(f"{_ON_CPU}: extra memory over plain torch's", "x", False, at_most=0.1)
TARGETS = (GEMMS, MEMORY, QUARTER, BANDWIDTH, ADVANTAGES, TORCH, TRL, TENTH)

TargetValue = float | str  # the value, or the reason why there is none


def target_results(values: Mapping[Target, TargetValue], device: torch.device, quick: bool) -> list[Result]:
    """Return every target as a result, whether this machine could measure it or not."""

    def result(target: Target) -> Result:
        value = values.get(target, "--quick measures a smaller shape" if quick else "not measured")
        if target.on_gpu != (device.type == "cuda"):
            value = "no GPU" if target.on_gpu else "measured on machines without a GPU"
        number, why = (None, value) if isinstance(value, str) else (value, None)
        return figure(target.name, number, target.unit, at_least=target.at_least, at_most=target.at_most, why=why)

    return [result(target) for target in TARGETS]
