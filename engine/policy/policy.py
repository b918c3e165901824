"""One policy: a causal LM's weights and their optimisation, by one process or by the ranks of a process group.

The shape is Tinker's, as a local object; several policies are several objects. `mgrpo train` uses nothing else.

bf16 compute with fp32 master weights. One process: the model that runs (and that the in-process sampler reads) is bf16,
and its masters (`masters.py`) are rounded into it after a step. Several ranks (FSDP2): the model's own weights are the
masters, each rank holds its rows of them, and a layer's are gathered and rounded when it runs; every method is then a
collective, which all ranks call.

Departs from data-parallel training as usual: gradients are summed over ranks, not averaged, as every denominator is in
the loss weights already. So what a step does does not depend on how many ranks share its micro-batches (P: their rows).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mgrpo.engine.batch.micro_batches import Batch, as_batch, one_sequence, prefetch
from mgrpo.engine.batch.packing import MicroBatch
from mgrpo.engine.config.schema import AgentConfig, ComputeConfig, parse_agent
from mgrpo.engine.inference.in_process import InProcessSampler
from mgrpo.engine.model.causal_lm import Actor, frozen_copy, load_actor, load_tokenizer, take_over
from mgrpo.engine.policy import forward as passes
from mgrpo.engine.policy.checkpoint import Index, moments, read_index, read_into, read_moments, write_state
from mgrpo.engine.policy.forward import Custom, Output
from mgrpo.engine.policy.optimizer import Masters
from mgrpo.engine.run.weights import Published, publish_weights
from mgrpo.engine.system import distributed
from mgrpo.kernels import Loss, Objective


class Policy:
    """A model, its tokenizer and, if it is trained, master weights and optimizer.

    version counts the optimizer steps whose weights the model holds. dtype is that of the forward and backward; a model
    that ranks share is float32, its masters. sync_seconds: what the last step took to round masters into the model.
    """

    def __init__(
        self,
        name: str,
        agent: AgentConfig,
        compute: ComputeConfig,
        *,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        group: ProcessGroup | None = None,
    ):
        """An agent of a run; see `of` for a policy by itself. model None: it and its tokenizer are agent.model's."""
        self.name, self.agent, self.compute, self.group = name, agent, compute, group
        self.rank, self.ranks = distributed.rank(group), distributed.ranks(group)
        if model is None:
            self.tokenizer: PreTrainedTokenizerBase | None = tokenizer or load_tokenizer(name, agent)
            self.actor, self.dtype = load_actor(name, agent, compute, group), getattr(torch, compute.dtype)
        else:
            self.tokenizer = tokenizer
            self.actor, self.dtype = take_over(model, compute, group)
        self.model: PreTrainedModel = self.actor.model
        self.version = 0
        self.sync_seconds = 0.0
        self._held: Actor | None = None
        self.masters = Masters(self.model)
        self.parameters = sum(param.numel() for param in self.masters.params.values())
        self.reset_optimizer()

    @classmethod
    def of(
        cls,
        model: PreTrainedModel | str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        name: str = "policy",
        group: ProcessGroup | None = None,
        compute: ComputeConfig | None = None,
        **settings: Any,
    ) -> Policy:
        """A policy of a model that the caller made, or of a directory with a model and its tokenizer.

        A caller's model is trained where it is, in its dtype (bfloat16, float32 or float64); parameters without
        requires_grad stay as they are. Its attention and dropout are replaced, all else that it does, `generate` too,
        it still does. settings: keys of an agent in `engine/config/schema.py`: lr, temperature, grad_clip, stop, ….
        group: the ranks that train it together, by FSDP2; None: all of the default group, or this process alone. Each
        passes the same model, whole. Raises ValueError for a setting or a model that will not do.
        """
        path, made = (str(model), None) if isinstance(model, str | Path) else ("", model)
        agent = parse_agent(name, {"model": path, **settings})
        return cls(name, agent, compute or ComputeConfig(), model=made, tokenizer=tokenizer, group=group)

    # ---- gradients

    def forward_backward(
        self,
        batches: Sequence[Batch | MicroBatch],
        objective: Objective,
        old_logprobs: Sequence[Tensor] | None = None,
    ) -> Output:
        """The loss of some micro-batches; its gradient is added to what the masters hold until `optim_step`.

        batches: this rank's, as `mgrpo.engine.pack` makes them: as many on each, else ValueError on all.
        old_logprobs: (P,) of each micro-batch that brings none, such as an earlier pass found; None: on-policy, current
        and old at once. The KL's reference: the log-probs that a micro-batch brings, or of what `keep_reference` kept.
        Metrics are all ranks'. Ranks exchange gradients with the last micro-batch of a call only; until then
        each holds the whole gradient in float32 (4 bytes a weight).
        """
        distributed.require_alike("micro-batches", len(batches), self.group)
        losses: list[Loss] = []
        olds: Sequence[Tensor | None] = old_logprobs or [None] * len(batches)
        for batch, given_P in zip(self._prefetched(batches), olds, strict=True):
            passes.exchange_gradients(self.actor, len(losses) == len(batches) - 1)
            old_P = given_P if batch.old_logprobs_P is None else batch.old_logprobs_P
            ref_P = self._reference_logprobs(batch) if objective.kl_coef else None
            losses.append(passes.grpo(self.actor, batch, objective, self.agent.temperature, old_P, ref_P))
        return Output(passes.merged(losses, self.group), [loss.logprobs_N for loss in losses])

    def forward_backward_custom(self, batches: Sequence[Batch | MicroBatch], fn: Custom) -> Output:
        """The gradient of a loss of the caller's own, added to what the masters hold.

        fn(batches, logprobs, entropies) -> (loss, metrics): all of this rank's micro-batches at once, of each (P,)
        log-probs and entropies in nats, differentiable, 0 at rows of weight 0. The loss is a 0-dim tensor; those of the
        ranks add up. One micro-batch costs one forward, several cost two each: the first for fn, the second, with fn's
        derivatives, for the gradient. Logits are never kept. metrics: fn's own, and the loss over all ranks as "loss".
        """
        distributed.require_alike("micro-batches", len(batches), self.group)
        given = list(self._prefetched(batches))
        with torch.set_grad_enabled(len(given) == 1):
            found = [passes.rows(self.actor, batch, self.agent.temperature) for batch in given]
        if not found:
            return Output({"loss": 0.0}, [])
        leaves = passes.leaves(found)
        loss, metrics = fn(given, [logprobs for logprobs, _ in leaves], [entropies for _, entropies in leaves])
        slopes = passes.derivatives(loss, leaves)
        for i, batch in enumerate(given):
            passes.exchange_gradients(self.actor, i == len(given) - 1)
            rows = found[i] if len(given) == 1 else passes.rows(self.actor, batch, self.agent.temperature)
            passes.backward(rows, slopes[i])
        total = sum(distributed.gather(float(loss.detach()), float, self.group))
        return Output(metrics | {"loss": total}, [logprobs.detach() for logprobs, _ in leaves])

    @torch.no_grad()
    def forward(self, batches: Sequence[Batch | MicroBatch]) -> list[Tensor]:
        """Log-probs of each micro-batch (P,), in nats; 0 at rows of weight 0. As many micro-batches on each rank."""
        distributed.require_alike("micro-batches", len(batches), self.group)
        return [passes.rows(self.actor, batch, self.agent.temperature)[0] for batch in self._prefetched(batches)]

    def optim_step(self, lr: float | None = None) -> float:
        """Clip, move the masters, round them into the model; returns the gradient's norm before clipping.

        lr None: the settings'. A weight that no micro-batch reached has gradient zero: its moments decay as they would
        with all of the batch. Raises RuntimeError if the gradient is not finite; the weights are then as they were.
        """
        for weight in self.masters.trained:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        norm = float(_whole(nn.utils.clip_grad_norm_(self.masters.trained, self.agent.grad_clip)))
        if not math.isfinite(norm):
            raise RuntimeError(f"agents.{self.name}: the gradient of version {self.version} is non-finite: {norm}")
        for group in self.optimizer.param_groups:
            group["lr"] = self.agent.lr if lr is None else lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        started = time.monotonic()
        self.masters.publish()
        self.sync_seconds = time.monotonic() - started
        self.version += 1
        return norm

    def step(
        self, batches: Sequence[Batch | MicroBatch], objective: Objective, lr: float | None = None, epochs: int = 1
    ) -> dict[str, float]:
        """`forward_backward` and `optim_step`, `epochs` times, as many on each rank; metrics of the last.

        The first epoch is on-policy, later ones take its log-probs as the old ones; but for batches that bring theirs.
        """
        distributed.require_alike("epochs", epochs, self.group)
        first: list[Tensor] | None = None
        for _ in range(epochs):
            found = self.forward_backward(batches, objective, first)
            first = first or found.logprobs
            norm = self.optim_step(lr)
        return found.metrics | {"grad_norm": norm, "lr": self.agent.lr if lr is None else lr}

    def reset_optimizer(self) -> None:
        """Forget moments: a stage begins."""
        settings: dict[str, Any] = {"betas": self.agent.betas, "weight_decay": self.agent.weight_decay}
        self.optimizer = torch.optim.AdamW(self.masters.trained, lr=self.agent.lr, fused=True, **settings)

    # ---- the KL's reference

    @property
    def reference(self) -> PreTrainedModel | None:
        """The weights that the KL term holds on to; None before `keep_reference`."""
        return self._held.model if self._held else None

    @torch.no_grad()
    def keep_reference(self) -> None:
        """Freeze a copy of the present weights, which the KL term holds on to."""
        self._held = frozen_copy(self.actor, self.masters.weights, self.compute, self.dtype, self.group)

    @torch.no_grad()
    def _reference_logprobs(self, batch: Batch) -> Tensor:
        if batch.ref_logprobs_P is not None:
            return batch.ref_logprobs_P
        if self._held is None:
            raise ValueError("objective: kl_coef > 0 given: expected keep_reference() before, or ref_logprobs packed")
        return passes.rows(self._held, batch, self.agent.temperature)[0]

    # ---- what others see

    def sampler(self) -> InProcessSampler:
        """Samples from the very weights that are trained; tell it `version` after a step.

        Raises ValueError if ranks share the model, or there is no tokenizer.
        """
        if self.ranks > 1 or self.tokenizer is None:
            given = f"{self.ranks} ranks" if self.ranks > 1 else "no tokenizer"
            raise ValueError(f"sampler: a policy with {given} given: expected one process and a tokenizer")
        return InProcessSampler(self.model, self.tokenizer, self.agent, self.compute.concurrency, self.version)

    def publish(self, root: str) -> Published:
        """Write the weights for samplers elsewhere, whole, into a file below <root>/<name>/ with a checksum.

        root: rank 0's, as `weights.publish_weights` takes it. Raises OSError on every rank if it cannot be written.
        """
        weights = dict(self.full_weights())
        written, failure = None, None
        try:
            written = publish_weights(root, self.name, self.version, weights) if self.rank == 0 else None
        except (OSError, ValueError) as error:
            failure = error
        distributed.require_success(f"{root}", failure, self.group)
        published: Published = distributed.broadcast(written, Published, self.group)
        return published

    @torch.no_grad()
    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Rank 0: each weight by its name, whole, in the compute dtype, on the CPU. The others: nothing, but every rank
        must run through it.

        One weight at a time is gathered. On one CPU these are the model's own weights, not copies: use them up before
        the next step.
        """
        for name, param in self.masters.params.items():
            whole = _whole(param.detach().to(self.dtype))
            if self.rank == 0:
                yield name, whole.cpu()

    @torch.no_grad()
    def logprobs(self, tokens: Sequence[int]) -> list[float]:
        """log p of each token but the first, given those before it, in nats at the policy's temperature: what training
        computes, to compare a sampler with. The same tokens on every rank."""
        batch = one_sequence(tokens, self.model.device)
        return passes.rows(self.actor, batch, self.agent.temperature)[0].tolist()

    # ---- saving

    def save_state(self, folder: str | Path | None = None) -> dict[str, Any]:
        """Write masters, moments, the reference if there is one, and the version; returns the last, as plain JSON.

        Rank 0 names the folder, which must not be there and which all ranks must see; the others' argument is ignored.
        Safetensors, each rank its rows. No rank returns before all have written. Raises OSError or SafetensorError on
        every rank if any could not write: the folder is then not whole, and `load_state` refuses it.
        """
        weights: Mapping[str, Tensor] = self.masters.weights
        tensors = {"weights": weights, "moments": moments(self.optimizer, weights)}
        if self.reference is not None:
            tensors["reference"] = dict(self.reference.named_parameters())
        write_state(folder, tensors, Index(self.version, self.reference is not None), self.group)
        return {"version": self.version}

    @torch.no_grad()
    def load_state(self, folder: str | Path) -> None:
        """What `save_state` wrote, on however many ranks. Raises ValueError if it is not whole, or another model's."""
        folder = Path(folder)
        index = read_index(folder, self.group)
        read_into(self.masters.weights, folder, "weights")
        self.reset_optimizer()
        read_moments(self.optimizer, self.masters.weights, folder)
        self.masters.publish()
        if index.reference:
            self.keep_reference()
            assert self.reference is not None
            read_into(dict(self.reference.named_parameters()), folder, "reference")
        self.version = index.version

    def _prefetched(self, batches: Sequence[Batch | MicroBatch]) -> Iterator[Batch]:
        return prefetch([as_batch(batch) for batch in batches], self.model.device)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
