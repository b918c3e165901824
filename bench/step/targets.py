"""Define what `mgrpo bench step` measures on which machine, and its targets there."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from mgrpo.bench.harness import Result, figure
from mgrpo.bench.step.models import QWEN3_06B, QWEN3_17B, SMOLLM2_135M, TINY, Sizes


@dataclass(frozen=True)
class Long:
    """Describe rollouts of one length, with nothing to leave out.

    published: prime-rl's tokens/s and MFU (%) of the trainer alone, on one H100.
    """

    model: str
    sizes: Sizes
    length: int
    rollouts: int
    published: tuple[float, float] | None
    compute: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.model}, {self.length >> 10}k tokens"


@dataclass(frozen=True)
class Plan:
    """Say what to measure.

    factor: divides the lengths of the agent mix. geography: its queries. seconds: after this time no new case begins.
    """

    model: str
    sizes: Sizes
    factor: int
    queries: int
    rollouts: int
    compute: dict[str, Any]
    geography: int
    rounds: int
    overrides: tuple[str, ...] = ()  # for the geography example
    seconds: float = math.inf


SHORT, FULL = {"compile": True}, {"activation_checkpointing": True}
LONG = (
    Long("Qwen3-0.6B", QWEN3_06B, 1 << 14, 4, (11_900, 11.1), SHORT),
    Long("Qwen3-0.6B", QWEN3_06B, 1 << 16, 4, (10_200, 26.8), FULL),
    Long("Qwen3-1.7B", QWEN3_17B, 1 << 14, 4, None, FULL),
    Long("Qwen3-1.7B", QWEN3_17B, 1 << 16, 4, None, FULL),
)
FASTER, SMALLER, TRL_FASTER, PRIME_FASTER, MFU = 5.0, 0.5, 2.0, 2.0, 40.0

_GPU = Plan(
    "Qwen3-0.6B", QWEN3_06B, 8, 3, 6, {"max_tokens": 16384, "activation_checkpointing": True}, 4, 3, seconds=100
)
_GPU_QUICK = Plan("Qwen3-0.6B", QWEN3_06B, 32, 3, 6, {"max_tokens": 8192}, 1, 2, seconds=20)
_CPU = Plan("SmolLM2-135M", SMOLLM2_135M, 64, 3, 6, {"max_tokens": 1024}, 3, 3)
_CPU_QUICK = Plan(
    "a tiny Llama",
    TINY,
    128,
    3,
    6,
    {"max_tokens": 512},
    2,
    2,
    tuple(f"agents.{agent}.model=runs/geography/data/tiny" for agent in ("main", "sub")),
)


def plan_for(device: torch.device, quick: bool) -> Plan:
    """Return the plan for that kind of machine."""
    if device.type == "cuda":
        return _GPU_QUICK if quick else _GPU
    return _CPU_QUICK if quick else _CPU


def long_results(long: Long, rate: float | None, mfu: float | None, why: str | None = None) -> list[Result]:
    """Return tokens/s and MFU of long rollouts, and prime-rl's published ones. rate None: not measured, see `why`."""
    held = mfu is not None and long.length == 1 << 16 and long.model == "Qwen3-0.6B"
    wanted = MFU if held or (mfu is None and long is LONG[1]) else None
    results = [
        figure(f"{long.name}: useful tokens/s", rate, "tokens/s", why=why),
        figure(f"{long.name}: MFU", mfu, "%", at_least=wanted, why=why),
    ]
    if long.published:
        tokens, share = long.published
        over = None if rate is None else rate / tokens
        wanted = PRIME_FASTER if long.length == 1 << 14 else None
        results += [
            Result(f"{long.name}: prime-rl, published: tokens/s", tokens, "tokens/s"),
            Result(f"{long.name}: prime-rl, published: MFU", share, "%"),
            figure(f"{long.name}: tokens/s over prime-rl's", over, "x", at_least=wanted, why=why),
        ]
    return results
