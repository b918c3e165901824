"""One agent's weights and their optimisation, by one process or by several ranks.

bf16 compute with fp32 master weights. One process: the model that runs (and that the in-process sampler reads) is bf16,
and its masters (`masters.py`) are rounded into it after a step. Several ranks (FSDP2): the model's own weights are the
masters, each rank holds its rows of them, and a layer's are gathered and rounded when it runs; every method is then a
collective, which all ranks call.

Departs from data-parallel training as usual: gradients are summed over ranks, not averaged, as every denominator is in
the loss weights already. So what a step does does not depend on how many ranks share its micro-batches.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mgrpo.engine import distributed
from mgrpo.engine.batch import Batch, prefetch
from mgrpo.engine.config import AgentConfig, ComputeConfig
from mgrpo.engine.masters import Masters
from mgrpo.engine.model import Actor, Packed, compile_layers, load_actor, load_tokenizer
from mgrpo.engine.shards import Shards, local, write_shards
from mgrpo.kernels import Loss, Objective, linear_grpo_loss, linear_logprob, merge_metrics


def learning_rate(agent: AgentConfig, step: int, steps: int) -> float:
    """The rate of step `step` (from 0) of `steps`: a linear rise, then the schedule down to zero at the end."""
    if step < agent.lr_warmup_steps:
        return agent.lr * (step + 1) / (agent.lr_warmup_steps + 1)
    done = (step - agent.lr_warmup_steps) / max(1, steps - agent.lr_warmup_steps)
    return (
        agent.lr
        * {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[agent.lr_schedule]
    )


class Policy:
    """An agent: its model, tokenizer and, if it is trained, master weights and optimizer.

    version counts the optimizer steps whose weights the model holds, warm-up included. dtype is that of the forward and
    backward; a model that ranks share is float32, its masters.
    """

    def __init__(self, name: str, agent: AgentConfig, compute: ComputeConfig):
        self.name, self.agent, self.compute = name, agent, compute
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(name, agent)
        self.actor = load_actor(name, agent, compute)
        self.model: PreTrainedModel = self.actor.model
        self.dtype: torch.dtype = getattr(torch, compute.dtype)
        self.version = 0
        self.sync_seconds = 0.0  # of the last publish
        self._held: Actor | None = None
        self.masters = Masters(self.model)
        self.parameters = sum(param.numel() for param in self.masters.params.values())
        self.reset_optimizer()

    @property
    def reference(self) -> PreTrainedModel | None:
        """The weights that the KL term holds on to; None before `keep_reference`."""
        return self._held.model if self._held else None

    def reset_optimizer(self) -> None:
        """Forget moments: a stage begins."""
        weights = list(self.masters.weights.values())
        self.optimizer = torch.optim.AdamW(
            weights, lr=self.agent.lr, betas=self.agent.betas, weight_decay=self.agent.weight_decay, fused=True
        )

    @torch.no_grad()
    def keep_reference(self) -> None:
        """Freeze a copy of the present weights, which the KL term holds on to."""
        if distributed.ranks() == 1:
            self._held = copy.deepcopy(self.actor).requires_grad_(False)
            if self.compute.compile:  # a copy of compiled layers is not
                compile_layers(self._held.model)
            return
        self._held = load_actor(self.name, self.agent, self.compute, master=False).requires_grad_(False)
        for kept, weight in zip(self._held.parameters(), self.masters.weights.values(), strict=True):
            local(kept).copy_(local(weight))

    def step(self, batches: Sequence[Batch], objective: Objective, lr: float, epochs: int = 1) -> dict[str, float]:
        """`epochs` optimizer steps on all ranks' micro-batches together; metrics of the last epoch, over all ranks.

        The first epoch is on-policy: its log-probs are current and old at once. Later epochs take them from it.
        batches are this rank's: as many on each, else ValueError on all. Ranks exchange gradients with the last one
        only; until then each holds the whole gradient in float32 (4 bytes a weight).
        """
        distributed.require_alike("micro-batches, epochs", [len(batches), epochs])
        old: list[Tensor | None] = [None] * len(batches)
        for _ in range(epochs):
            losses = []
            for i, batch in enumerate(prefetch(batches, self.model.device)):
                self._exchange_gradients(i == len(batches) - 1)
                losses.append(self.forward_backward(batch, objective, old[i]))
            if epochs > 1:
                old = [
                    before if before is not None else loss.logprobs_N for before, loss in zip(old, losses, strict=True)
                ]
            norm = self.optim_step(lr)
        return _metrics(losses) | {"grad_norm": norm, "lr": lr}

    def _exchange_gradients(self, on: bool) -> None:
        """Whether the next backward sums them over the ranks."""
        if isinstance(self.actor, FSDPModule):
            self.actor.set_requires_gradient_sync(on)

    def forward_backward(self, batch: Batch, objective: Objective, old_logprobs_P: Tensor | None = None) -> Loss:
        """Loss of one micro-batch on the model's device; its gradient is added to what the masters hold."""
        ref_logprobs_P = self._reference_logprobs(batch) if objective.kl_coef else None

        def work(hidden_PH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Loss:
            return linear_grpo_loss(
                hidden_PH,
                weight_VH,
                batch.targets_P,
                batch.advantages_P,
                batch.weights_P,
                objective,
                old_logprobs_N=old_logprobs_P,
                sampler_logprobs_N=batch.sampler_logprobs_P,
                ref_logprobs_N=ref_logprobs_P,
                cu_seqlens=batch.cu_seqlens_B1,
                bias_V=bias_V,
                temperature=self.agent.temperature,
            )

        loss: Loss = self.actor(batch.input_ids_P, batch.positions_P, _layout(batch), work)
        loss.loss.backward()
        return loss._replace(loss=loss.loss.detach())

    def optim_step(self, lr: float) -> float:
        """Clip, move the masters, publish; returns the gradient's norm before clipping.

        A weight that no micro-batch reached has gradient zero: its moments decay as they would with all of the batch.
        Raises RuntimeError if the gradient is not finite.
        """
        weights = list(self.masters.weights.values())
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        norm = _whole(nn.utils.clip_grad_norm_(weights, self.agent.grad_clip))
        if not math.isfinite(norm):
            raise RuntimeError(f"agents.{self.name}: the gradient of version {self.version} is non-finite: {norm}")
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        started = time.monotonic()
        self.masters.publish()
        self.sync_seconds = time.monotonic() - started
        self.version += 1
        return float(norm)

    def logprobs(self, tokens: Sequence[int]) -> list[float]:
        """log p of each token but the first, given those before it, in nats at the agent's temperature: what training
        computes, to compare a sampler with. The same tokens on every rank."""
        ids_T = torch.tensor(tokens, device=self.model.device)
        rows = len(tokens) - 1
        layout = Packed(torch.tensor([0, rows], dtype=torch.int32, device=ids_T.device), rows)
        positions_P = torch.arange(rows, device=ids_T.device)
        return self._logprobs(self.actor, ids_T[:-1], positions_P, layout, ids_T[1:], positions_P).tolist()

    @torch.no_grad()
    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Rank 0: each weight by its name, whole, in the compute dtype, on the CPU. The others: nothing, but every rank
        must run through it.

        One weight at a time is gathered. On one CPU these are the model's own weights, not copies: use them up before
        the next step.
        """
        for name, param in self.masters.params.items():
            whole = _whole(param.detach().to(self.dtype))
            if distributed.rank() == 0:
                yield name, whole.cpu()

    def save(self, folder: Path | None = None) -> dict[str, Any]:
        """Write masters and moments as safetensors, each rank its rows; returns what else `load` needs, as plain JSON.

        Rank 0 names the folder, which must not be there and which all ranks must see; the others' argument is ignored.
        No rank returns before all have written. Raises OSError or SafetensorError on every rank if any could not write.
        """
        failure: Exception | None = None
        try:
            if distributed.rank() == 0:
                assert folder is not None
                folder.mkdir()
        except OSError as error:
            failure = error
        distributed.require_success("checkpoint", failure)
        folder = Path(distributed.broadcast(str(folder), str))
        try:
            write_shards(folder, "weights", self.masters.weights)
            write_shards(folder, "moments", self._moments())
            if self.reference is not None:
                write_shards(folder, "reference", dict(self.reference.named_parameters()))
        except (OSError, SafetensorError) as error:
            failure = error
        distributed.require_success(f"{folder}", failure)
        return {"version": self.version}

    @torch.no_grad()
    def load(self, folder: Path, saved: dict[str, Any]) -> None:
        """What `save` wrote, on however many ranks. Raises ValueError if it belongs to another model."""
        _copy_into(self.masters.weights, folder, "weights")
        self._load_moments(folder)
        self.masters.publish()
        if (folder / "reference.safetensors").exists():
            self.keep_reference()
            assert self.reference is not None
            _copy_into(dict(self.reference.named_parameters()), folder, "reference")
        self.version = saved["version"]

    def _moments(self) -> dict[str, Tensor]:
        state = self.optimizer.state
        named = self.masters.weights.items()
        return {f"{key}/{name}": value for name, weight in named for key, value in state.get(weight, {}).items()}

    def _load_moments(self, folder: Path) -> None:
        self.reset_optimizer()
        shards = Shards(folder, "moments")
        for key_name, shape in shards.shapes.items():
            key, _, name = key_name.partition("/")
            weight = self.masters.weights[name].detach()
            moment = torch.zeros_like(weight) if shape else torch.zeros((), device=weight.device)
            shards.read_into(moment, key_name)
            self.optimizer.state[self.masters.weights[name]][key] = moment

    def _reference_logprobs(self, batch: Batch) -> Tensor:
        assert self._held is not None
        live_L = batch.weights_P.nonzero()[:, 0]  # the head on the rows that count
        logprobs_L = self._logprobs(
            self._held, batch.input_ids_P, batch.positions_P, _layout(batch), batch.targets_P, live_L
        )
        return logprobs_L.new_zeros(len(batch)).index_copy_(0, live_L, logprobs_L)

    @torch.no_grad()
    def _logprobs(
        self, actor: Actor, ids_P: Tensor, positions_P: Tensor, layout: Packed, targets_P: Tensor, live_L: Tensor
    ) -> Tensor:
        """(L,) float32: log-probs of the targets of some rows."""

        def work(hidden_PH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
            return linear_logprob(
                hidden_PH[live_L], weight_VH, targets_P[live_L], bias_V=bias_V, temperature=self.agent.temperature
            )[0]

        logprobs_L: Tensor = actor(ids_P, positions_P, layout, work)
        if isinstance(actor, FSDPModule):
            actor.reshard()  # without a backward FSDP keeps what it gathered, and would not see the next step's weights
        return logprobs_L


def _layout(batch: Batch) -> Packed:
    return Packed(batch.cu_seqlens_B1, batch.max_seqlen)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _metrics(losses: Sequence[Loss]) -> dict[str, float]:
    """Of all ranks' micro-batches."""
    mine = [{name: float(value) for name, value in (loss.metrics | {"loss": loss.loss}).items()} for loss in losses]
    parts = [part for parts in distributed.gather(mine, list[dict[str, float]]) for part in parts]
    total = sum(part.pop("loss") for part in parts)
    return merge_metrics(parts) | {"loss": total}


def _copy_into(target: dict[str, Any], folder: Path, stem: str) -> None:
    shards = Shards(folder, stem)
    shapes = {name: tuple(value.shape) for name, value in target.items()}
    if shapes != shards.shapes:
        odd = sorted(set(shapes.items()) ^ set(shards.shapes.items()))[0][0]
        raise ValueError(
            f"{folder}: weight {odd!r} has shape {shards.shapes.get(odd)}, expected {shapes.get(odd)}: "
            "made by another model"
        )
    for name, value in target.items():
        shards.read_into(value, name)
