"""One agent's weights and their optimisation.

bf16 compute with fp32 master weights: the model that runs (and that the in-process sampler reads) is bf16; each
gradient is added to its fp32 master the moment it is made, and freed; AdamW moves the masters, and `publish` rounds
them into the model.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mgrpo.engine.batch import Batch, prefetch
from mgrpo.engine.config import AgentConfig, ComputeConfig
from mgrpo.engine.model import Packed, hidden_states, load_model, load_tokenizer
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


class Masters:
    """fp32 master weights of a model's parameters, and their gradients. A model in fp32 is its own master."""

    def __init__(self, model: nn.Module):
        self.params = dict(model.named_parameters())
        self.weights = {name: self._master(param) for name, param in self.params.items()}

    def _master(self, param: nn.Parameter) -> nn.Parameter:
        if param.dtype == torch.float32:
            return param
        master = nn.Parameter(param.detach().float())

        def take_gradient(param: Tensor) -> None:
            assert param.grad is not None
            if master.grad is None:
                master.grad = param.grad.float()
            else:
                master.grad.add_(param.grad)
            param.grad = None

        param.register_post_accumulate_grad_hook(take_gradient)
        return master

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the model."""
        for name, param in self.params.items():
            if self.weights[name] is not param:
                param.copy_(self.weights[name])


class Policy:
    """An agent: its model, tokenizer and, if it is trained, master weights and optimizer.

    version counts the optimizer steps whose weights the model holds, warm-up included.
    """

    def __init__(self, name: str, agent: AgentConfig, compute: ComputeConfig):
        self.name, self.agent = name, agent
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(name, agent)
        self.model: PreTrainedModel = load_model(name, agent, compute)
        self.version = 0
        self.sync_seconds = 0.0  # of the last publish
        self.reference: PreTrainedModel | None = None
        self.masters = Masters(self.model)
        self.parameters = sum(param.numel() for param in self.masters.params.values())
        self.reset_optimizer()

    def reset_optimizer(self) -> None:
        """Forget moments: a stage begins."""
        weights = list(self.masters.weights.values())
        self.optimizer = torch.optim.AdamW(
            weights, lr=self.agent.lr, betas=self.agent.betas, weight_decay=self.agent.weight_decay, fused=True
        )

    def keep_reference(self) -> None:
        """Freeze a copy of the present weights, which the KL term holds on to."""
        self.reference = copy.deepcopy(self.model).requires_grad_(False)

    def step(self, batches: Sequence[Batch], objective: Objective, lr: float, epochs: int = 1) -> dict[str, float]:
        """`epochs` optimizer steps on all micro-batches together; metrics of the last epoch.

        The first epoch is on-policy: its log-probs are current and old at once. Later epochs take them from it.
        """
        old: list[Tensor | None] = [None] * len(batches)
        for _ in range(epochs):
            moved = prefetch(batches, self.model.device)
            losses = [self.forward_backward(batch, objective, old[i]) for i, batch in enumerate(moved)]
            if epochs > 1:
                old = [
                    before if before is not None else loss.logprobs_N for before, loss in zip(old, losses, strict=True)
                ]
            norm = self.optim_step(lr)
        merged = merge_metrics([loss.metrics for loss in losses])
        return merged | {"loss": sum(float(loss.loss.detach()) for loss in losses), "grad_norm": norm, "lr": lr}

    def forward_backward(self, batch: Batch, objective: Objective, old_logprobs_P: Tensor | None = None) -> Loss:
        """Loss of one micro-batch on the model's device; its gradient is added to what the masters hold."""
        head = self.model.get_output_embeddings()
        loss = linear_grpo_loss(
            self._hidden(self.model, batch),
            head.weight,
            batch.targets_P,
            batch.advantages_P,
            batch.weights_P,
            objective,
            old_logprobs_N=old_logprobs_P,
            sampler_logprobs_N=batch.sampler_logprobs_P,
            ref_logprobs_N=self._reference_logprobs(batch) if objective.kl_coef else None,
            cu_seqlens=batch.cu_seqlens_B1,
            bias_V=head.bias,
            temperature=self.agent.temperature,
        )
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
        norm = nn.utils.clip_grad_norm_(weights, self.agent.grad_clip)
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

    def save(self, folder: Path) -> dict[str, Any]:
        """Write masters and moments as safetensors; returns what else `load` needs, as plain JSON values."""
        folder.mkdir()
        save_file(
            {name: weight.detach() for name, weight in self.masters.weights.items()}, folder / "weights.safetensors"
        )
        save_file(self._moments(), folder / "moments.safetensors")
        if self.reference is not None:
            save_file(dict(self.reference.named_parameters()), folder / "reference.safetensors")
        return {"version": self.version}

    @torch.no_grad()
    def load(self, folder: Path, saved: dict[str, Any]) -> None:
        """What `save` wrote. Raises ValueError if it belongs to another model."""
        _copy_into(self.masters.weights, load_file(folder / "weights.safetensors"), folder)
        self._load_moments(load_file(folder / "moments.safetensors"))
        self.masters.publish()
        if (folder / "reference.safetensors").exists():
            self.keep_reference()
            assert self.reference is not None
            _copy_into(dict(self.reference.named_parameters()), load_file(folder / "reference.safetensors"), folder)
        self.version = saved["version"]

    def _moments(self) -> dict[str, Tensor]:
        state = self.optimizer.state
        named = self.masters.weights.items()
        return {f"{key}/{name}": value for name, weight in named for key, value in state.get(weight, {}).items()}

    def _load_moments(self, saved: dict[str, Tensor]) -> None:
        self.reset_optimizer()
        device = self.model.device
        for key_name, value in saved.items():
            key, _, name = key_name.partition("/")
            self.optimizer.state[self.masters.weights[name]][key] = value.to(device)

    def _hidden(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        return hidden_states(model, batch.input_ids_P, batch.positions_P, Packed(batch.cu_seqlens_B1, batch.max_seqlen))

    @torch.no_grad()
    def _reference_logprobs(self, batch: Batch) -> Tensor:
        assert self.reference is not None
        head = self.reference.get_output_embeddings()
        live_L = batch.weights_P.nonzero()[:, 0]  # the head on the rows that count
        hidden_LH = self._hidden(self.reference, batch)[live_L]
        logprobs_L, _ = linear_logprob(
            hidden_LH, head.weight, batch.targets_P[live_L], bias_V=head.bias, temperature=self.agent.temperature
        )
        return logprobs_L.new_zeros(len(batch)).index_copy_(0, live_L, logprobs_L)


def _copy_into(target: dict[str, Any], saved: dict[str, Tensor], folder: Path) -> None:
    shapes = {name: tuple(value.shape) for name, value in target.items()}
    found = {name: tuple(value.shape) for name, value in saved.items()}
    if shapes != found:
        odd = sorted(set(shapes.items()) ^ set(found.items()))[0][0]
        raise ValueError(
            f"{folder}: weight {odd!r} has shape {found.get(odd)}, expected {shapes.get(odd)}: made by another model"
        )
    for name, value in saved.items():
        target[name].copy_(value)
