"""Define the candidates of `mgrpo bench kernels`: ours, and what other libraries run for the same loss.

Every candidate takes the same inputs and returns the loss with its gradients, so that the answers can be compared
before anything is timed. A peer that offers only log-probs gets the loss of `inputs.py` on top. Each is called as its
authors call it, in its fastest form for this loss: no entropy, no reference model, temperature 1. What is not
installed, or not made for the device, is left out by name.

Left out are functions that return one cross-entropy over all rows, such as quack's chunked one and Liger's: with their
gradient already computed, no row can get the weight that its clipped ratio gives it.

Legend: N rows, L live rows, S sequences of T rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgrpo.bench.kernels.inputs import OBJECTIVE, SEQUENCE, Inputs, Linear, Logits, clipped_loss
from mgrpo.kernels import grpo_loss, linear_grpo_loss, token_logprob

Answer = tuple[Tensor, ...]  # the loss, and its gradient with respect to each tensor of the source
# Rows of one of Liger's chunks; by default a chunk is one sequence.
LIGER_ROWS = 2048
# Columns of logits that TRL's trainer computes at a time.
TRL_COLUMNS = 32768
IGNORED = -100  # a target that cross-entropies leave out
TEMPERATURE = 1.0


class Unavailable(Exception):
    """Report that a candidate cannot run here; the message says why."""


def _differentiate(loss: Tensor, inputs: Inputs) -> Answer:
    return loss.detach(), *torch.autograd.grad(loss, inputs.source)


def _require_gpu(inputs: Inputs) -> None:
    if not inputs.targets_N.is_cuda:
        raise Unavailable("its Triton kernels need a GPU")


# ---- from hidden states and head


def ours_linear(inputs: Linear) -> Answer:
    """Run `linear_grpo_loss`."""
    vectors = (inputs.targets_N, inputs.advantages_N, inputs.weights_N)
    out = linear_grpo_loss(
        inputs.hidden_NH, inputs.weight_VH, *vectors, OBJECTIVE, old_logprobs_N=inputs.old_logprobs_N
    )
    return _differentiate(out.loss, inputs)


def torch_linear(inputs: Linear) -> Answer:
    """Compute all logits and mask afterwards, which is what one writes first."""
    return _differentiate(_torch_linear_loss(inputs.hidden_NH, inputs.weight_VH, inputs), inputs)


def compiled_linear(inputs: Linear) -> Answer:
    """Run `torch_linear` through torch.compile."""
    return _differentiate(_compiled(_torch_linear_loss)(inputs.hidden_NH, inputs.weight_VH, inputs), inputs)


def liger_linear(inputs: Linear) -> Answer:
    """Run Liger's fused linear loss, in chunks of whole sequences."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    peer = LigerFusedLinearGRPOLoss(
        beta=0.0,
        use_ref_model=False,
        compiled=inputs.targets_N.is_cuda,  # on a CPU each process would compile again, for an unimportant part
        chunk_size=LIGER_ROWS // SEQUENCE,
        epsilon_low=OBJECTIVE.clip_low,
        epsilon_high=OBJECTIVE.clip_high,
        temperature=TEMPERATURE,
    )
    shape = (inputs.sequences, SEQUENCE)
    loss, _ = peer(
        inputs.hidden_NH.view(*shape, -1),
        inputs.weight_VH,
        inputs.targets_N.view(shape),
        inputs.live_N.float().view(shape),
        inputs.advantages_N[::SEQUENCE],
        old_per_token_logps=inputs.old_logprobs_N.view(shape),
    )
    return _differentiate(loss, inputs)


def trl_linear(inputs: Linear) -> Answer:
    """Run TRL's log-probs on the live rows, which are selected before the head."""
    from trl.kernels import ChunkedLogProbFunction

    live_N = inputs.live_N
    arguments = (inputs.weight_VH, None, inputs.targets_N[live_N], TEMPERATURE, TRL_COLUMNS, None, 1.0, ())
    logprobs_L = ChunkedLogProbFunction.apply(inputs.hidden_NH[live_N], *arguments)[0]
    logprobs_N = logprobs_L.new_zeros(live_N.shape).masked_scatter(live_N, logprobs_L)
    return _differentiate(clipped_loss(logprobs_N, inputs), inputs)


def cut_cross_entropy_linear(inputs: Linear) -> Answer:
    """Run Apple's log-probs, which leave out the rows whose target is marked as ignored."""
    _require_gpu(inputs)
    from cut_cross_entropy import linear_cross_entropy

    loss_N = linear_cross_entropy(inputs.hidden_NH, inputs.weight_VH, _marked(inputs), reduction="none")
    return _differentiate(clipped_loss(-loss_N, inputs), inputs)


def liger_linear_logprob(inputs: Linear) -> Answer:
    """Run Liger's log-probs: kernels for Hopper, cuTile's under LIGER_KERNEL_IMPL=cutile, or else chunks of torch."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Peer

    loss_N = Peer.apply(inputs.hidden_NH, inputs.weight_VH, _marked(inputs), TEMPERATURE, IGNORED)
    return _differentiate(clipped_loss(-loss_N, inputs), inputs)


def torch_linear_cross_entropy(inputs: Linear) -> Answer:
    """Run torch's own cross-entropy of a head, in chunks of rows; its log-probs are bf16, and so are the ratios."""
    options = getattr(nn, "LinearCrossEntropyOptions", None)
    if options is None:
        raise Unavailable(f"torch {torch.__version__} has no cross-entropy of a head in chunks")
    arguments = (inputs.hidden_NH, inputs.weight_VH, _marked(inputs))
    loss_N = F.linear_cross_entropy(*arguments, reduction="none", ignore_index=IGNORED, options=options())
    return _differentiate(clipped_loss(-loss_N, inputs), inputs)


def verl_linear(inputs: Linear) -> Answer:
    """Run verl's Triton log-probs on the live rows."""
    _require_gpu(inputs)
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    live_N = inputs.live_N
    arguments = (inputs.weight_VH, inputs.targets_N[live_N], TEMPERATURE, "none")
    logprobs_L = linear_cross_entropy(inputs.hidden_NH[live_N], *arguments)[0]
    logprobs_N = logprobs_L.new_zeros(live_N.shape).masked_scatter(live_N, logprobs_L)
    return _differentiate(clipped_loss(logprobs_N, inputs), inputs)


def quack_linear(inputs: Linear) -> Answer:
    """Run quack's cross-entropy behind a plain matmul, the form of it that gives each row's own loss."""
    _require_gpu(inputs)
    from quack.linear_cross_entropy import linear_cross_entropy_func

    arguments = (inputs.hidden_NH, inputs.weight_VH, None, _marked(inputs))
    loss_N = linear_cross_entropy_func(*arguments, IGNORED, "none", inplace_backward=True)
    return _differentiate(clipped_loss(-loss_N, inputs), inputs)


def _marked(inputs: Inputs) -> Tensor:
    """Return the targets, those of rows that do not count marked as ignored."""
    return torch.where(inputs.live_N, inputs.targets_N, IGNORED)


# ---- from logits


def ours_logits(inputs: Logits) -> Answer:
    """Run `grpo_loss`."""
    vectors = (inputs.targets_N, inputs.advantages_N, inputs.weights_N)
    out = grpo_loss(inputs.logits_NV, *vectors, OBJECTIVE, old_logprobs_N=inputs.old_logprobs_N)
    return _differentiate(out.loss, inputs)


def torch_logits(inputs: Logits) -> Answer:
    """Compute the loss with a log-softmax in float32 and a gather."""
    return _differentiate(clipped_loss(_torch_logprobs(inputs.logits_NV, inputs.targets_N), inputs), inputs)


def compiled_logits(inputs: Logits) -> Answer:
    """Run `torch_logits` through torch.compile."""
    logprobs_N = _compiled(_torch_logprobs)(inputs.logits_NV, inputs.targets_N)
    return _differentiate(clipped_loss(logprobs_N, inputs), inputs)


def liger_logits(inputs: Logits) -> Answer:
    """Run Liger's Triton loss on all rows as one sequence, without overwriting the logits."""
    _require_gpu(inputs)
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    logits_1MV = inputs.padded_MV[None].detach().requires_grad_()
    loss, _ = triton_grpo_loss(
        logits_1MV,
        inputs.old_logprobs_N[None],
        None,
        inputs.targets_N[None],
        inputs.advantages_N[:1],
        inputs.live_N.float()[None],
        temperature=TEMPERATURE,
        beta=0.0,
        eps_low=OBJECTIVE.clip_low,
        eps_high=OBJECTIVE.clip_high,
        inplace=False,
        reduce=True,
    )
    (gradient_1MV,) = torch.autograd.grad(loss, logits_1MV)
    return loss.detach(), gradient_1MV[0, :-1]


def quack_logits(inputs: Logits) -> Answer:
    """Run quack's cross-entropy of existing logits, which are not overwritten."""
    _require_gpu(inputs)
    from quack import cross_entropy

    loss_N = cross_entropy(inputs.logits_NV, _marked(inputs), ignore_index=IGNORED, reduction="none")
    return _differentiate(clipped_loss(-loss_N, inputs), inputs)


# ---- log-probs of logits


def ours_token(inputs: Logits) -> Answer:
    """Run `token_logprob` with a different upstream gradient for each row."""
    return _differentiate(_weighted(token_logprob(inputs.logits_NV, inputs.targets_N)[0], inputs), inputs)


def torch_token(inputs: Logits) -> Answer:
    """Compute log-probs with a log-softmax in float32 and a gather."""
    return _differentiate(_weighted(_torch_logprobs(inputs.logits_NV, inputs.targets_N), inputs), inputs)


def compiled_token(inputs: Logits) -> Answer:
    """Run `torch_token` through torch.compile."""
    return _differentiate(_weighted(_compiled(_torch_logprobs)(inputs.logits_NV, inputs.targets_N), inputs), inputs)


def quack_token(inputs: Logits) -> Answer:
    """Run quack's cross-entropy, whose negative is the log-prob."""
    _require_gpu(inputs)
    from quack import cross_entropy

    return _differentiate(
        _weighted(-cross_entropy(inputs.logits_NV, inputs.targets_N, reduction="none"), inputs), inputs
    )


def _weighted(logprobs_N: Tensor, inputs: Logits) -> Tensor:
    return (logprobs_N * inputs.old_logprobs_N).mean()


def _torch_logprobs(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    logprobs_NV = torch.log_softmax(logits_NV.float() / TEMPERATURE, dim=-1)
    return logprobs_NV.gather(1, targets_N[:, None])[:, 0]


def _torch_linear_loss(hidden_NH: Tensor, weight_VH: Tensor, inputs: Linear) -> Tensor:
    return clipped_loss(_torch_logprobs(hidden_NH @ weight_VH.T, inputs.targets_N), inputs)


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Any]:
    return torch.compile(function)


OURS = "ours"
LINEAR: dict[str, Callable[[Linear], Answer]] = {
    OURS: ours_linear,
    "plain torch": torch_linear,
    "torch.compile": compiled_linear,
    "torch's linear cross-entropy": torch_linear_cross_entropy,
    "Liger fused linear GRPO": liger_linear,
    "Liger log-prob": liger_linear_logprob,
    "TRL chunked log-prob": trl_linear,
    "verl Triton log-prob": verl_linear,
    "quack cross-entropy": quack_linear,
    "cut-cross-entropy": cut_cross_entropy_linear,
}
LOGITS: dict[str, Callable[[Logits], Answer]] = {
    OURS: ours_logits,
    "plain torch": torch_logits,
    "torch.compile": compiled_logits,
    "Liger Triton GRPO": liger_logits,
    "quack cross-entropy": quack_logits,
}
TOKEN: dict[str, Callable[[Logits], Answer]] = {
    OURS: ours_token,
    "plain torch": torch_token,
    "torch.compile": compiled_token,
    "quack cross-entropy": quack_token,
}
