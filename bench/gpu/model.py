"""Measure a model's forward and backward, as it is written and with compiled layers.

Legend: P rows of a micro-batch.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mgrpo.bench.gpu.session import Session
from mgrpo.bench.harness import interleave
from mgrpo.bench.step.models import QWEN3_06B, TINY, Sizes, flop
from mgrpo.engine.batch.micro_batches import Batch
from mgrpo.engine.config.schema import ComputeConfig
from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.system.device import matmul_ceiling
from mgrpo.kernels import Objective

LENGTHS = (4096, 4096, 2048, 1024)  # of the sequences of a micro-batch


def causal_lm(sizes: Sizes, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model of random weights, the same in every dtype but for rounding."""
    torch.manual_seed(0)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes), dtype=torch.float32)
    return nn.Module.to(made, dtype)


def batches(sizes: Sizes, count: int, lengths: tuple[int, ...]) -> list[Batch]:
    """Return micro-batches of random tokens, every other one of which the agent chose."""
    generator = torch.Generator().manual_seed(0)
    rows = sum(lengths)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions_P = torch.cat([torch.arange(length) for length in lengths])
    weights_P = (torch.arange(rows) % 2 == 0).float() / rows
    made = []
    for _ in range(count):
        ids_P, targets_P = torch.randint(1, sizes["vocab_size"], (2, rows), generator=generator)
        advantages_P = torch.randn(rows, generator=generator)
        made.append(Batch(ids_P, positions_P, targets_P, bounds, max(lengths), advantages_P, weights_P))
    return made


def speed(session: Session) -> None:
    """Measure tokens/s and MFU of each way."""
    sizes, lengths = (QWEN3_06B, LENGTHS) if session.on_gpu else (TINY, (64, 32))
    given = batches(sizes, 1, lengths)
    for name, compiled in (("as it is written", False), ("with compiled layers", True)):
        if compiled and not session.on_gpu:
            session.add(name, None, "tokens/s", why="layers are compiled on a GPU only")
            continue
        policy = Policy.of(
            causal_lm(sizes, torch.bfloat16), compute=ComputeConfig(device=str(session.device), compile=compiled)
        )
        run = {name: lambda policy=policy: policy.forward_backward(given, Objective())}
        timing = interleave(run, rounds=3, device=session.device, warmup=2)[name]
        work = flop(policy.model, list(lengths), sum(lengths) // 2)
        ceiling = matmul_ceiling(session.device, torch.bfloat16)
        session.add(f"{name}: tokens/s", sum(lengths) / timing.seconds, "tokens/s")
        session.add(f"{name}: share of the matmul's rate", 100 * work / timing.seconds / ceiling, "%")
