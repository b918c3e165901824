"""Hold and train one policy, a causal LM's weights, in one process or on the ranks of a process group.

The methods are modelled on Tinker's API, on a local object; a process may hold several such objects. `mgrpo train`
itself trains only through this class.

Compute is bf16 with fp32 master weights. In one process, the model that runs (and that the in-process sampler reads) is
bf16, and its masters (`optimizer.py`) are rounded into it after a step. On several ranks (FSDP2), the model's own
weights are the masters: each rank holds its rows of them, and a layer's weights are gathered and rounded when it runs.
Every method is then a collective, which all ranks must call.

Unlike in usual data-parallel training, gradients are summed over ranks, not averaged, because the loss weights include
every denominator. So the result of a step does not depend on how many ranks share its micro-batches.

Legend: P rows of a micro-batch.
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
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mgrpo.engine.batch.micro_batches import Batch, one_sequence, prefetch
from mgrpo.engine.batch.shares import MicroBatch
from mgrpo.engine.config.schema import AgentConfig, ComputeConfig, check_trainable, parse_agent
from mgrpo.engine.hub.snapshots import folder
from mgrpo.engine.inference.in_process import InProcessSampler
from mgrpo.engine.model.causal_lm import Actor, frozen_copy, load_actor, load_tokenizer, take_over
from mgrpo.engine.model.pretrained import Read, base_name, require_dtype, write_made, write_pretrained
from mgrpo.engine.model.routers import routers_of
from mgrpo.engine.policy import forward
from mgrpo.engine.policy.checkpoint import (
    Index,
    check_files,
    moments,
    read_index,
    read_into,
    read_moments,
    whole,
    write_state,
    write_whole,
)
from mgrpo.engine.policy.forward import Custom, Output
from mgrpo.engine.policy.optimizer import Masters
from mgrpo.engine.run.manifest import VersionManifest
from mgrpo.engine.run.weights import Published, checksum_of, publish_weights
from mgrpo.engine.system import distributed
from mgrpo.engine.types import WeightsVersion
from mgrpo.kernels import Loss, Objective


class Policy:
    """Hold a model, its tokenizer, its master weights and their optimizer.

    version counts the optimizer steps that led to the model's weights. dtype is that of the forward and backward; the
    weights of a model that several ranks share are its masters, in float32. sync_seconds: how long the last step took
    to round the masters into the model.
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
        """Make the policy of an agent of a run; `of` makes one without a run. model None: load it from agent.model."""
        self.name, self.agent, self.compute, self.group = name, agent, compute, group
        self.rank, self.ranks = distributed.rank(group), distributed.ranks(group)
        if model is None:
            self.tokenizer: PreTrainedTokenizerBase | None = tokenizer or load_tokenizer(name, agent)
            self.actor, self.dtype = load_actor(name, agent, compute, group), getattr(torch, compute.dtype)
        else:
            self.tokenizer = tokenizer
            self.actor, self.dtype = take_over(model, compute, group)
        self.model: PreTrainedModel = self.actor.model
        self.actor.buffer_bytes = compute.buffer_bytes
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
        """Return a policy of a model that the caller made, or of a directory with a model and its tokenizer.

        A caller's model is trained in place, in its dtype (bfloat16, float32 or float64); parameters without
        requires_grad stay as they are. Its attention and dropout are replaced; everything else, such as `generate`,
        still works. settings are keys of an agent in `engine/config/schema.py`: lr, temperature, grad_clip, stop, ….
        group: the ranks that train it together, by FSDP2; None: all ranks of the default group, or this process alone.
        Each rank passes the same whole model. Raises ValueError for a wrong setting, and for a model without a head or
        of another kind that is not supported.
        """
        path, made = (str(model), None) if isinstance(model, str | Path) else ("", model)
        agent = parse_agent(name, {"model": path, **settings})
        if agent.train:
            check_trainable(agent, name)
        return cls(name, agent, compute or ComputeConfig(), model=made, tokenizer=tokenizer, group=group)

    # ---- gradients

    def forward_backward(
        self,
        batches: Sequence[Batch | MicroBatch],
        objective: Objective,
        old_logprobs: Sequence[Tensor] | None = None,
        *,
        router_aux_coef: float = 0.0,
    ) -> Output:
        """Compute the loss of some micro-batches and add its gradient to the masters' until `optim_step`.

        batches: the micro-batches of this rank, as `mgrpo.engine.pack` makes them. Raises ValueError on all ranks if
        their numbers differ. old_logprobs: (P,) for each micro-batch that has none of its own, for example from an
        earlier pass; None: on-policy, the current log-probs are the old ones. The KL's reference is the log-probs in a
        micro-batch, or else those of the weights that `keep_reference` kept. The metrics are those of all ranks. Ranks
        exchange gradients at the last micro-batch of a call only; until then each holds the whole gradient in float32
        (4 bytes per weight).

        router_aux_coef: add this times the balance loss of a mixture of experts, see `engine/model/routers.py`, over
        all tokens of the call that run: those of the ranks' micro-batches together, up to each sequence's last action.
        So it does not depend on how they are split into micro-batches; if there are several, each costs one more
        forward without the head. Raises ValueError for a model without such a loss. The metric "router_aux" is the
        loss without the coefficient.
        """
        distributed.require_alike("micro-batches", len(batches), self.group)
        balance = self._balance(batches, router_aux_coef) if router_aux_coef else None
        losses: list[Loss] = []
        olds: Sequence[Tensor | None] = old_logprobs or [None] * len(batches)
        for batch, given_P in zip(self._prefetched(batches), olds, strict=True):
            forward.exchange_gradients(self.actor, len(losses) == len(batches) - 1)
            old_P = given_P if batch.old_logprobs_P is None else batch.old_logprobs_P
            ref_P = self._reference_logprobs(batch) if objective.kl_coef else None
            temperature = self.agent.temperature
            losses.append(forward.grpo(self.actor, batch, objective, temperature, old_P, ref_P, balance, self.masters))
        return Output(forward.merged(losses, self.group), [loss.logprobs_N for loss in losses])

    def _balance(self, batches: Sequence[Batch | MicroBatch], coef: float) -> forward.Balance:
        routers = routers_of(self.model, f"router_aux_coef: {coef}")
        if self.ranks == 1 and len(batches) == 1:
            return forward.Balance(coef, routers)
        whole = forward.router_usage(self.actor, self._prefetched(batches), routers, self.group)
        return forward.Balance(coef, routers, whole)

    def forward_backward_custom(self, batches: Sequence[Batch | MicroBatch], fn: Custom) -> Output:
        """Compute the caller's own loss and add its gradient to the masters'.

        fn(batches, logprobs, entropies) -> (loss, metrics) gets all micro-batches of this rank at once, and for each
        its log-probs and entropies (P,) in nats, differentiable, 0 at rows of weight 0. It returns a 0-dim tensor; the
        losses of the ranks add up. One micro-batch costs one forward. Several cost two each: one for fn and one, with
        fn's derivatives, for the gradient. Logits are never kept. The metrics are fn's own, with the loss over all
        ranks as "loss". Raises ValueError if the loss is not a number that depends on the log-probs.
        """
        distributed.require_alike("micro-batches", len(batches), self.group)
        given = list(self._prefetched(batches))
        with torch.set_grad_enabled(len(given) == 1):
            found = [forward.rows(self.actor, batch, self.agent.temperature) for batch in given]
        if not found:
            return Output({"loss": 0.0}, [])
        leaves = forward.leaves(found)
        loss, metrics = fn(given, [logprobs for logprobs, _ in leaves], [entropies for _, entropies in leaves])
        slopes = forward.derivatives(loss, leaves)
        for i, batch in enumerate(given):
            forward.exchange_gradients(self.actor, i == len(given) - 1)
            rows = found[i] if len(given) == 1 else forward.rows(self.actor, batch, self.agent.temperature)
            forward.backward(rows, slopes[i])
        total = sum(distributed.gather(float(loss.detach()), float, self.group))
        return Output(metrics | {"loss": total}, [logprobs.detach() for logprobs, _ in leaves])

    @torch.no_grad()
    def forward(self, batches: Sequence[Batch | MicroBatch]) -> list[Tensor]:
        """Return the log-probs (P,) of each micro-batch, in nats; 0 at rows of weight 0.

        Raises ValueError on all ranks if their numbers of micro-batches differ.
        """
        distributed.require_alike("micro-batches", len(batches), self.group)
        return [forward.rows(self.actor, batch, self.agent.temperature)[0] for batch in self._prefetched(batches)]

    def optim_step(self, lr: float | None = None) -> float:
        """Clip the gradient, step the masters, round them into the model; return the norm before clipping.

        lr None: the rate of the settings. A weight that no micro-batch reached has a gradient of zero, so its moments
        decay as they would in a whole batch. Raises RuntimeError if the gradient is not finite; the weights are then
        unchanged.
        """
        for weight in self.masters.trained:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        norm = float(whole(nn.utils.clip_grad_norm_(self.masters.trained, self.agent.grad_clip)))
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
        self,
        batches: Sequence[Batch | MicroBatch],
        objective: Objective,
        lr: float | None = None,
        epochs: int = 1,
        *,
        router_aux_coef: float = 0.0,
    ) -> dict[str, float]:
        """Call `forward_backward` and `optim_step` `epochs` times; return the metrics of the last epoch.

        The first epoch is on-policy, and later ones take its log-probs as the old ones, except for batches that have
        old log-probs. Raises ValueError on all ranks if their numbers of epochs differ.
        """
        distributed.require_alike("epochs", epochs, self.group)
        first: list[Tensor] | None = None
        for _ in range(epochs):
            found = self.forward_backward(batches, objective, first, router_aux_coef=router_aux_coef)
            first = first or found.logprobs
            norm = self.optim_step(lr)
        return found.metrics | {"grad_norm": norm, "lr": self.agent.lr if lr is None else lr}

    def reset_optimizer(self) -> None:
        """Forget the moments, as at the beginning of a stage."""
        settings: dict[str, Any] = {"betas": self.agent.betas, "weight_decay": self.agent.weight_decay}
        self.optimizer = torch.optim.AdamW(self.masters.trained, lr=self.agent.lr, fused=True, **settings)

    # ---- the KL's reference

    @property
    def reference(self) -> PreTrainedModel | None:
        """The frozen weights that the KL term compares with; None before `keep_reference`."""
        return self._held.model if self._held else None

    @torch.no_grad()
    def keep_reference(self) -> None:
        """Freeze a copy of the present weights for the KL term to compare with."""
        self._held = frozen_copy(self.actor, self.masters.weights, self.compute, self.dtype, self.group)

    @torch.no_grad()
    def _reference_logprobs(self, batch: Batch) -> Tensor:
        if batch.ref_logprobs_P is not None:
            return batch.ref_logprobs_P
        if self._held is None:
            raise ValueError("objective: kl_coef > 0 given: expected keep_reference() before, or packed ref_logprobs")
        return forward.rows(self._held, batch, self.agent.temperature)[0]

    # ---- samplers and publication

    def sampler(self) -> InProcessSampler:
        """Return a sampler that reads the weights in training; set its `version` after a step.

        Raises ValueError if several ranks share the model, or there is no tokenizer.
        """
        if self.ranks > 1 or self.tokenizer is None:
            given = f"{self.ranks} ranks" if self.ranks > 1 else "no tokenizer"
            raise ValueError(f"sampler: a policy with {given} given: expected one process and a tokenizer")
        version = WeightsVersion(self.version, 0)
        return InProcessSampler(self.model, self.tokenizer, self.agent, self.compute.concurrency, version)

    def publish(self, root: str) -> Published:
        """Write the whole weights, for samplers elsewhere, into a file below <root>/<name>/ with a checksum.

        root: as `weights.publish_weights` takes it; only rank 0's is used. Raises OSError on every rank if the file
        cannot be written.
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

    def checksum(self) -> str:
        """Return the checksum that a published file of the present weights would have, without writing it."""
        weights = dict(self.full_weights())
        found: str = distributed.broadcast(checksum_of(weights) if self.rank == 0 else None, str, self.group)
        return found

    @torch.no_grad()
    def full_weights(self, *, on_host: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Yield each whole weight with its name, in the compute dtype, on rank 0 only.

        Every rank must iterate to the end; one weight at a time is gathered. on_host: yield it on the CPU; otherwise
        where it is. Weights of one process that need no copy are the model's own, so use them before the next step.
        """
        for name, param in self.masters.params.items():
            gathered = whole(param.detach().to(self.dtype))
            if self.rank == 0:
                yield name, gathered.cpu() if on_host else gathered

    @torch.no_grad()
    def logprobs(self, tokens: Sequence[int]) -> list[float]:
        """Return log p of each token except the first, given those before it, as training computes it.

        In nats, at the policy's temperature, to compare with a sampler's. Every rank must pass the same tokens.
        """
        batch = one_sequence(tokens, self.model.device)
        return forward.rows(self.actor, batch, self.agent.temperature)[0].tolist()

    # ---- saving

    def save_state(self, folder: str | Path | None = None) -> dict[str, Any]:
        """Write masters, moments, the reference if there is one, and the version; return the version as plain JSON.

        Rank 0's folder is used; it must not exist yet, and all ranks must see it. Each rank writes its rows, as
        safetensors, and none returns before all have written. Raises OSError or SafetensorError on every rank if any
        could not write: the folder is then incomplete, and `load_state` refuses it.
        """
        weights: Mapping[str, Tensor] = self.masters.weights
        tensors = {"weights": weights, "moments": moments(self.optimizer, weights)}
        if self.reference is not None:
            tensors["reference"] = dict(self.reference.named_parameters())
        index = Index(self.version, self.reference is not None, bool(tensors["moments"]))
        write_state(folder, tensors, index, self.group)
        return {"version": self.version}

    def save_pretrained(self, path: str | Path, dtype: str = "bfloat16") -> VersionManifest:
        """Write the whole master weights as a model that transformers and vLLM load; return what was written.

        Every rank calls it, and gathers one weight at a time; rank 0's path is used, which must not exist yet. dtype:
        of the weights, "float32", "bfloat16" or "float16". Raises ValueError for another one or a path that exists,
        OSError if the disk is full, on every rank: nothing is then left there.
        """
        require_dtype("dtype", dtype)

        def fill(out: Path, read: Read) -> VersionManifest:
            if self.agent.model:
                base = folder(self.name, self.agent, weights=True)
                shards = write_pretrained(out, base, self.agent, list(self.masters.weights), read, dtype)
            else:
                shards = write_made(out, self.model, self.tokenizer, read, dtype)
            step, origin = self.version, base_name(self.agent)
            return VersionManifest(
                kind="model", agent=self.name, stage="", step=step, base=origin, dtype=dtype, shards=shards
            )

        return write_whole(path, self.masters.weights, fill, self.group)

    @torch.no_grad()
    def load_state(self, folder: str | Path, *, verified: bool = False) -> None:
        """Load what `save_state` wrote on any number of ranks.

        Each file's SHA-256 is compared with the one beside it, which version 0.1.0 did not write. verified: not again,
        because the checkpoint was compared with its manifest. Raises ValueError if the state is incomplete or damaged
        or belongs to another model.
        """
        folder = Path(folder)
        if not verified:
            check_files(folder, self.group)
        index = read_index(folder, self.group)
        read_into(self.masters.weights, folder, "weights")
        self.reset_optimizer()
        read_moments(self.optimizer, self.masters.weights, folder, index.moments)
        self.masters.publish()
        if index.reference:
            self.keep_reference()
            assert self.reference is not None
            read_into(dict(self.reference.named_parameters()), folder, "reference")
        self.version = index.version

    def _prefetched(self, batches: Sequence[Batch | MicroBatch]) -> Iterator[Batch]:
        return prefetch([Batch.of(batch) for batch in batches], self.model.device)
