"""Predict the memory of each process of a run: what it always holds, and what training and sampling need for a while.

How things lie is decided elsewhere (policy/optimizer.py, model/causal_lm.py: split, inference/kv_cache.py), and a test
compares with a real policy:

* One process: weights in the compute dtype; for bfloat16, float32 masters beside them; two float32 moments from the
  first step on; float32 gradients from a step's first backward until its end.
* Several ranks (FSDP2): each holds its rows of float32 masters and moments. The gradients are whole on each rank until
  the last micro-batch. Of the weights in the compute dtype, two layers and all that is outside of layers are there.
* The KL's reference: weights in the compute dtype, by rows on several ranks.
* The key-value cache: room for compute.concurrency calls of max_context tokens, if they grow so long.

Legend: V vocabulary, H hidden size, T tokens of a micro-batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mgrpo.engine.cli.check.model_size import ModelSize
from mgrpo.engine.config.schema import AgentConfig, Config

MIB = 2**20
WIDE = 4  # bytes of a float32
CHUNK = 64 * MIB  # of logits that the loss holds at a time, unless one row has more
BLOCKS = {"cpu": 12 * MIB, "cuda": 128 * MIB}  # of softmax beside the logits
SLICE = 8192  # rows of the head's gradient that are computed at a time
DRAWING = 5  # float32 copies of the logits while tokens are drawn


@dataclass(frozen=True)
class Training:
    """Hold the bytes of one rank that trains an agent.

    weights, masters, moments, reference: held all the time. gradients, activations, loss: while it trains.
    """

    weights: int
    masters: int
    moments: int
    reference: int
    gradients: int
    activations: int
    loss: int

    @property
    def held(self) -> int:
        """What is held all the time."""
        return self.weights + self.masters + self.moments + self.reference

    @property
    def passing(self) -> int:
        """What is needed while it trains."""
        return self.gradients + self.activations + self.loss


@dataclass(frozen=True)
class Sampling:
    """Hold the bytes of sampling an agent in a process: its weights, the key-value cache, and what a step needs."""

    weights: int
    cache: int
    step: int


def training(size: ModelSize, agent: AgentConfig, config: Config, ranks: int, device: str) -> Training:
    """Return the memory of one of the ranks that train an agent."""
    width = getattr(torch, config.compute.dtype).itemsize
    alone, trained = ranks == 1, size.trained
    outside = size.parameters - size.all_layers
    gathered = (2 * size.widest_layer + outside) * width
    masters = (trained * WIDE if width < WIDE else 0) if alone else math.ceil(size.parameters / ranks) * WIDE
    steps = (agent.train and config.steps) or config.warmup.steps
    kept = size.parameters * width if alone else math.ceil(size.parameters / ranks) * width + gathered
    passing = size.passing
    activations = passing.checkpointed if config.compute.activation_checkpointing else passing.saved
    return Training(
        weights=size.parameters * width if alone else gathered,
        masters=masters,
        moments=2 * WIDE * math.ceil(trained / ranks) if steps else 0,
        reference=kept if config.algorithm.kl_coef else 0,
        gradients=WIDE * (trained if alone else trained + math.ceil(trained / ranks)) if steps else 0,
        activations=activations if steps else 0,
        loss=_loss(size, config, width, device) if steps else 0,
    )


def _loss(size: ModelSize, config: Config, width: int, device: str) -> int:
    """Return the most that the loss, or a layer's backward after it, needs beside gradients and activations."""
    tokens, row = config.compute.max_tokens, size.vocabulary * width
    head = size.vocabulary * size.hidden * WIDE
    hidden = tokens * size.hidden * width
    chunks = min(tokens * row, max(CHUNK, row)) + BLOCKS[device] + SLICE * size.hidden * width
    layer = size.passing.work + size.largest * width + 2 * hidden
    return max(head + hidden + chunks, layer + (head if size.tied else 0))


def sampling(size: ModelSize, agent: AgentConfig, config: Config, prompt: int) -> Sampling:
    """Return the memory of sampling an agent. prompt: tokens of its longest prompt."""
    width, calls = getattr(torch, config.compute.dtype).itemsize, config.compute.concurrency
    per_token = calls * agent.max_context * width
    logits = calls * size.vocabulary * (width + DRAWING * WIDE)
    fresh = math.ceil(calls / config.algorithm.rollouts) * prompt  # the rollouts of a query compute one prompt
    wide = 4 * size.passing.widest * fresh // config.compute.max_tokens
    return Sampling(
        weights=size.parameters * width,
        cache=sum(size.cached) * per_token,
        step=max(size.cached, default=0) * per_token + max(logits, wide),
    )
