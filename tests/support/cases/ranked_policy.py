"""Make policies of several ranks, and the micro-batches of each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from cases.weighed import Weighed, packed
from mgrpo.engine.batch.micro_batches import Batch
from mgrpo.engine.config.schema import AgentConfig
from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.system import distributed
from mgrpo.engine.types import Trajectory
from toy import toy_config

LR = 1e-3


def make(folder: Path, tied: bool, dtype: str = "float32", checkpointing: bool = False, **agent: Any) -> Policy:
    """Load the policy of this rank. agent: keys of its config."""
    compute = msgspec.structs.replace(toy_config(folder).compute, dtype=dtype, activation_checkpointing=checkpointing)
    path = str(folder / ("tied" if tied else "untied"))
    return Policy("main", AgentConfig(model=path, **{"max_context": 64, "lr": LR, **agent}), compute)


def batches(seed: int, count: int = 7, max_tokens: int = 40) -> list[Batch]:
    """Return the micro-batches of all ranks, of trajectories of 2 to 33 tokens."""
    rng = np.random.default_rng(seed)
    weighed = []
    for _ in range(count):
        length = int(rng.integers(2, 34))
        sampled = rng.random(length) < 0.6
        sampled[1] = True
        tokens = rng.integers(1, 257, length).astype(np.int32)
        trajectory = Trajectory(tokens, sampled, np.full(length, -5, np.float32), 0)
        weighed.append(Weighed(trajectory, float(rng.normal()), 0.05))
    return packed(weighed, max_tokens)


def dummy(batch: Batch) -> Batch:
    """Return a micro-batch that counts for nothing."""
    return replace(batch, weights_P=torch.zeros_like(batch.weights_P))


def mine(everyones: list[Batch]) -> list[Batch]:
    """Return this rank's micro-batches, dealt in turn, with dummies up to the same number for all ranks."""
    rest = -len(everyones) % distributed.ranks()
    return [*everyones, *([dummy(everyones[0])] * rest)][distributed.rank() :: distributed.ranks()]
