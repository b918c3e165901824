"""Run one micro-batch through a model: its loss, or the log-probs of its targets, with the head on live rows only.

Backbone and head run within one forward of the `Actor`, and the logits of a chunk of rows are freed with the chunk
(mgrpo.kernels).

Legend: P rows of a micro-batch, L live rows (weight not 0), H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule

from mgrpo.engine.batch.micro_batches import Batch
from mgrpo.engine.model.attention import Packed
from mgrpo.engine.model.causal_lm import Actor
from mgrpo.engine.model.routers import Logits, Routers, Usage, balance_loss, usage
from mgrpo.engine.policy.optimizer import Masters
from mgrpo.engine.system import distributed
from mgrpo.kernels import Loss, Objective, linear_grpo_loss, linear_logprob, merge_metrics


class Output(NamedTuple):
    """Hold the result of a pass over micro-batches. metrics: numbers by name.

    logprobs: (P,) for each of this rank's micro-batches, in nats at the policy's temperature, float32 (float64 for a
    model in float64), detached; 0 at rows that were left out.
    """

    metrics: dict[str, float]
    logprobs: list[Tensor]


Rows = tuple[Tensor, Tensor]  # log-probs and entropies, (P,) each
Custom = Callable[[Sequence[Batch], list[Tensor], list[Tensor]], tuple[Tensor, dict[str, float]]]


class Balance(NamedTuple):
    """Ask for the routers' balance loss, times coef. whole: the choices of the step; None: one batch is the step."""

    coef: float
    routers: Routers
    whole: Usage | None = None


def grpo(
    actor: Actor,
    batch: Batch,
    objective: Objective,
    temperature: float,
    old_P: Tensor | None,
    ref_P: Tensor | None,
    balance: Balance | None = None,
    masters: Masters | None = None,
) -> Loss:
    """Return the loss of a micro-batch, and add its gradient to that of the weights, or of the head's master.

    balance: its share of the routers' balance loss is added, and is the metric "router_aux".
    """

    def work(hidden_PH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, logits: Logits = ()) -> Loss:
        loss = linear_grpo_loss(
            hidden_PH,
            weight_VH,
            batch.targets_P,
            batch.advantages_P,
            batch.weights_P,
            objective,
            old_logprobs_N=old_P,
            sampler_logprobs_N=batch.sampler_logprobs_P,
            ref_logprobs_N=ref_P,
            cu_seqlens=batch.cu_seqlens_B1,
            bias_V=bias_V,
            temperature=actor.temperature(temperature),
            softcap=actor.softcap,
            buffer_bytes=actor.buffer_bytes,
            master_VH=None if masters is None else masters.summed(weight_VH),
        )
        return loss if balance is None else _balanced(loss, balance, logits, batch)

    routed = {"routed": True} if balance else {}
    loss: Loss = actor(batch.input_ids_P, batch.positions_P, layout(batch), work, **routed)
    loss.loss.backward()
    return loss._replace(loss=loss.loss.detach())


def _balanced(loss: Loss, balance: Balance, logits: Logits, batch: Batch) -> Loss:
    share = balance_loss(logits, balance.routers, _counted(batch), balance.whole)
    return loss._replace(loss=loss.loss + balance.coef * share, metrics=loss.metrics | {"router_aux": share.detach()})


def _counted(batch: Batch) -> Tensor:
    """Return (P,) bool: the rows of sequences that have a weight, which a dummy micro-batch has not."""
    bounds_B = batch.cu_seqlens_B1[1:]
    sequences_P = torch.bucketize(torch.arange(len(batch), device=bounds_B.device), bounds_B, right=True)
    live_B = torch.zeros(len(bounds_B), device=bounds_B.device).index_add(
        0, sequences_P, (batch.weights_P != 0).float()
    )
    return (live_B > 0)[sequences_P]


def router_usage(actor: Actor, batches: Iterable[Batch], routers: Routers, group: ProcessGroup | None) -> Usage:
    """Count how often each expert is chosen in all micro-batches of all ranks: a forward of each, without the head."""
    device = actor.model.device
    times_E, rows = torch.zeros(routers.experts, dtype=torch.float64, device=device), torch.zeros((), device=device)
    for batch in batches:

        def work(_: Tensor, __: Tensor, ___: Tensor | None, logits: Logits, batch: Batch = batch) -> Usage:
            return usage(logits, routers, _counted(batch))

        with torch.no_grad():
            found: Usage = actor(batch.input_ids_P, batch.positions_P, layout(batch), work, routed=True)
        _drop_gathered(actor)
        times_E, rows = times_E + found.times_E, rows + found.rows
    parts = distributed.gather([*times_E.tolist(), float(rows)], list[float], group)
    *times, total = (sum(column) for column in zip(*parts, strict=True))
    whole_E1 = torch.tensor([*times, total], dtype=torch.float64, device=device)
    return Usage(whole_E1[:-1], whole_E1[-1])


def _drop_gathered(actor: Actor) -> None:
    """Free the weights that FSDP gathered: without a backward it keeps them and would not see the next step's."""
    if isinstance(actor, FSDPModule):
        actor.reshard()


def rows(actor: Actor, batch: Batch, temperature: float) -> Rows:
    """Return log-probs and entropies of the live rows, differentiable unless no_grad is on; 0 at the others."""
    live_L = batch.weights_P.nonzero()[:, 0]

    def work(hidden_PH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Rows:
        return linear_logprob(
            hidden_PH[live_L],
            weight_VH,
            batch.targets_P[live_L],
            bias_V=bias_V,
            temperature=actor.temperature(temperature),
            softcap=actor.softcap,
            buffer_bytes=actor.buffer_bytes,
        )

    found: Rows = actor(batch.input_ids_P, batch.positions_P, layout(batch), work)
    if not torch.is_grad_enabled():
        _drop_gathered(actor)
    logprobs_P, entropies_P = (x_L.new_zeros(len(batch)).index_copy(0, live_L, x_L) for x_L in found)
    return logprobs_P, entropies_P


def exchange_gradients(actor: Actor, on: bool) -> None:
    """Set whether the next backward sums gradients over the ranks."""
    if isinstance(actor, FSDPModule):
        actor.set_requires_gradient_sync(on)


def layout(batch: Batch) -> Packed:
    """Return the attention layout of a micro-batch: its sequences side by side."""
    return Packed(batch.cu_seqlens_B1, batch.max_seqlen)


def leaves(found: Sequence[Rows]) -> list[Rows]:
    """Detach each tensor and make it a leaf that requires grad."""
    return [(logprobs.detach().requires_grad_(), entropies.detach().requires_grad_()) for logprobs, entropies in found]


def derivatives(loss: Any, given: Sequence[Rows]) -> list[tuple[Tensor, Tensor | None]]:
    """Return the derivatives of a caller's loss with respect to each micro-batch's log-probs and entropies.

    Those of the entropies are None if the loss depends on none. Raises ValueError if the loss is not a 0-dim tensor
    that depends on the log-probs.
    """
    if not (isinstance(loss, Tensor) and loss.ndim == 0 and loss.requires_grad):
        raise ValueError(f"fn: a loss of {loss!r} returned: expected a 0-dim tensor that depends on the log-probs")
    flat = [x for pair in given for x in pair]
    found = torch.autograd.grad(loss, flat, allow_unused=True)
    slopes = [torch.zeros_like(x) if slope is None else slope for x, slope in zip(flat, found, strict=True)]
    entropy = any(slope is not None for slope in found[1::2])
    return [(slopes[i], slopes[i + 1] if entropy else None) for i in range(0, len(slopes), 2)]


def backward(found: Rows, slopes: tuple[Tensor, Tensor | None]) -> None:
    """Add the gradient of a micro-batch, given the loss' derivatives with respect to its log-probs and entropies."""
    pairs = [(x, slope) for x, slope in zip(found, slopes, strict=True) if slope is not None]
    torch.autograd.backward([x for x, _ in pairs], [slope for _, slope in pairs])


def numbers(of_losses: Sequence[dict[str, Tensor]]) -> list[dict[str, float]]:
    """Read dicts of 0-dim tensors on one device, for which the host waits once."""
    flat = [value for values in of_losses for value in values.values()]
    read = iter(torch.stack(flat).tolist() if flat else [])
    return [{name: float(next(read)) for name in values} for values in of_losses]


def merged(losses: Sequence[Loss], group: ProcessGroup | None) -> dict[str, float]:
    """Return the metrics of all ranks' micro-batches, with the sum of their losses as "loss"."""
    mine = numbers([loss.metrics | {"loss": loss.loss.detach()} for loss in losses])
    parts = [part for parts in distributed.gather(mine, list[dict[str, float]], group) for part in parts]
    summed = ["loss", "router_aux"] if parts and "router_aux" in parts[0] else ["loss"]
    totals = {name: sum(part.pop(name) for part in parts) for name in summed}
    return merge_metrics(parts) | totals
