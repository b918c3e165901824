"""The LM head and its softmax, one chunk of rows at a time: log-prob, entropy and gradient in a single sweep.

This differs from the standard method in two ways. The gradient with respect to the logits is computed as soon as a
row's log-prob is known, so one sweep costs three matmuls and keeps no logits. And the softmax processes a chunk in
blocks that fit the cache: in memory there is only the matmul's own (chunk x V) buffer, in the matmul's dtype, which
holds first the logits and then their gradient. On a GPU `triton/linear_head.py` does the same with Triton.

Legend: N all rows, L live rows, D rows left out, C rows of a chunk, B rows of a block, H hidden, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import require, require_whole
from .dispatch import takes_kernels, triton_module
from .terms import Coefficients
from .vocab_parallel import LOWEST, Shard, Statistics

# Enough rows for the matmuls to run at full speed (650 bf16 rows of a vocabulary of 49152), few against (N x V).
CHUNK_BYTES = 1 << 26
# Two blocks of this size stay in a CPU's last-level cache. Smaller blocks are not faster and need more thread barriers,
# each of which costs a time slice where cores are shared; on a GPU they need more launches.
BLOCK_BYTES = {"cpu": 3 << 21}
BLOCK_BYTES_ELSEWHERE = 1 << 26
# Vocabulary rows of dW computed at a time, so that the partial product is small and is added while still in the cache.
DWEIGHT_ROWS = 8192


@dataclass(frozen=True)
class HeadPlan:
    """Say which rows to sweep and how.

    index_L: the live rows, None: all rows are live. rest_D: the rows left out. temperature: a number or (L,).
    softcap: a logit x becomes softcap * tanh(x / softcap), before the temperature; None: it stays.
    buffer_bytes: the most that a GPU's buffers may take, see `triton/buffers.py`; None: as much as serves them.
    master_VH: the weight's master, to whose gradient that of the weight is added; None: the sweep returns it.
    With a shard, targets are relative to the first row of this rank's weight and may lie outside the shard.
    """

    targets_L: Tensor
    index_L: Tensor | None
    temperature: float | Tensor
    matmul_dtype: torch.dtype
    chunk_rows: int | None = None
    shard: Shard | None = None
    rest_D: Tensor | None = None
    softcap: float | None = None
    buffer_bytes: int | None = None
    master_VH: Tensor | None = None

    def take(self, source: Tensor, rows: slice) -> Tensor:
        """Return a slice of the live rows of an (N, ...) tensor."""
        return source[rows] if self.index_L is None else source.index_select(0, self.index_L[rows])

    def put(self, source_LX: Tensor, count: int) -> Tensor:
        """Return an (N, ...) tensor that holds these live rows, and zeros elsewhere."""
        if self.index_L is None:
            return source_LX
        return source_LX.new_zeros(count, *source_LX.shape[1:]).index_copy_(0, self.index_L, source_LX)

    def widest(self, vocabulary: int) -> int:
        """Return the columns of the widest rank's logits, from which every rank derives the same chunks and blocks."""
        return max(vocabulary, self.shard.widest) if self.shard else vocabulary

    def chunks(self, vocabulary: int) -> Iterator[slice]:
        """Return even chunks of at most `chunk_rows` rows, or of as many rows as fit CHUNK_BYTES."""
        fitting = CHUNK_BYTES // (self.widest(vocabulary) * self.matmul_dtype.itemsize)
        return slices(len(self.targets_L), self.chunk_rows or max(1, fitting), even=True)


class Sweep(NamedTuple):
    """Hold log-prob and entropy of each live row, and the gradients that were asked for (None: not asked for).

    dhidden has the live rows only, in hidden's dtype. dweight and dbias, and with a shard dhidden too, are float32 or
    float64.
    """

    logprobs_L: Tensor
    entropy_L: Tensor
    dhidden_LH: Tensor | None
    dweight_VH: Tensor | None
    dbias_V: Tensor | None


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of everything outside the matmuls: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def slices(total: int, size: int, *, even: bool = False) -> Iterator[slice]:
    """Cut range(total) into slices of at most `size`; `even`: of about equal length."""
    if even and total:
        size = math.ceil(total / math.ceil(total / size))
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def sweep(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    plan: HeadPlan,
    coefficients: Coefficients | None = None,
    needs: tuple[bool, ...] = (False, False, False),
) -> Sweep:
    """Compute log-prob and entropy of the plan's rows and, with `coefficients`, the gradients that `needs` asks for.

    needs: whether the gradients of hidden, weight and bias are needed. With a sharded head each rank gets the gradient
    of its own rows of weight and bias, and the whole gradient of hidden. If the plan has a master, the weight's
    gradient is added to the master's instead of returned.
    """
    method = triton_module("linear_head").linear_sweep if takes_kernels(hidden_NH, plan.matmul_dtype) else _sweep
    with torch.no_grad(), torch.autocast(hidden_NH.device.type, enabled=False):
        coefficients = coefficients if any(needs) else None
        if len(weight_VH):
            out = method(hidden_NH, weight_VH, bias_V, plan, coefficients, needs)
        else:
            out = _sweep_empty_shard(method, hidden_NH, weight_VH, bias_V, plan, coefficients, needs)
        if plan.shard is not None and out.dhidden_LH is not None:
            dist.all_reduce(out.dhidden_LH, group=plan.shard.group)
    if plan.master_VH is not None and out.dweight_VH is not None:
        plan.master_VH.grad = out.dweight_VH
        out = out._replace(dweight_VH=None)
    return out


def earlier_sum(plan: HeadPlan) -> Tensor | None:
    """Return the master's gradient, to which dW is added; None: dW needs a tensor of its own."""
    return None if plan.master_VH is None else plan.master_VH.grad


def check_master(master_VH: Tensor | None, weight_VH: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError unless there is none, or it is a leaf that may be the weight's master for matmuls in `dtype`."""
    if master_VH is None:
        return
    require_whole("master_VH", master_VH)
    given = tuple(master_VH.shape), master_VH.dtype, master_VH.device, master_VH.is_leaf
    wanted = tuple(weight_VH.shape), wide(dtype), weight_VH.device, True
    require(given == wanted, "master_VH", f"shape, dtype, device, is_leaf {given}", str(wanted))


def _sweep_empty_shard(
    method: Callable[..., Sweep],
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    plan: HeadPlan,
    *rest: Any,
) -> Sweep:
    """Take part in the ranks' sweep with a single row whose bias of -inf keeps it out of every softmax.

    That row's logits are not capped: a cap would make finite numbers of them.
    """
    row_1H, bias_1 = weight_VH.new_zeros(1, weight_VH.shape[1]), weight_VH.new_full((1,), -torch.inf)
    out = method(hidden_NH, row_1H, bias_1, replace(plan, softcap=None, master_VH=None), *rest)
    dweight_VH, dbias_V = (None if t is None else t[:0] for t in (out.dweight_VH, out.dbias_V))
    return out._replace(dweight_VH=dweight_VH, dbias_V=dbias_V)


def _sweep(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    plan: HeadPlan,
    coefficients: Coefficients | None,
    needs: tuple[bool, ...],
) -> Sweep:
    """Compute `sweep` in plain PyTorch."""
    matmul_VH = weight_VH.to(plan.matmul_dtype)
    (vocabulary, width), count, dtype = weight_VH.shape, len(plan.targets_L), wide(plan.matmul_dtype)
    new = hidden_NH.new_empty
    out = Sweep(
        new(count, dtype=dtype),
        new(count, dtype=dtype),
        new(count, width, dtype=dtype if plan.shard else hidden_NH.dtype) if needs[0] else None,
        _dweight(weight_VH, plan, dtype) if needs[1] else None,
        hidden_NH.new_zeros(vocabulary, dtype=dtype) if needs[2] else None,
    )
    chunks = list(plan.chunks(vocabulary))
    longest = max((rows.stop - rows.start for rows in chunks), default=0)
    buffer_CV = new(longest, vocabulary, dtype=plan.matmul_dtype)
    softmax = Softmax(vocabulary, dtype, hidden_NH.device, longest, plan)
    for rows in chunks:
        hidden_CH = plan.take(hidden_NH, rows).to(plan.matmul_dtype)
        logits_CV = torch.mm(hidden_CH, matmul_VH.t(), out=buffer_CV[: rows.stop - rows.start])
        for block in softmax.blocks(rows):
            inside = slice(block.start - rows.start, block.stop - rows.start)
            gradient_BV = softmax.block(logits_CV[inside], bias_V, block, out, coefficients)
            if gradient_BV is not None:
                logits_CV[inside].copy_(gradient_BV)
                if out.dbias_V is not None:
                    out.dbias_V.add_(gradient_BV.sum(0))
        if out.dhidden_LH is not None:
            out.dhidden_LH[rows] = torch.mm(logits_CV, matmul_VH)
        if out.dweight_VH is not None:
            _add_dweight(out.dweight_VH, logits_CV, hidden_CH)
    return out


def _dweight(weight_VH: Tensor, plan: HeadPlan, dtype: torch.dtype) -> Tensor:
    """Return the tensor to which dW is added: the master's gradient, or zeros."""
    earlier_VH = earlier_sum(plan)
    if earlier_VH is not None:
        return earlier_VH
    return torch.zeros_like(weight_VH, dtype=dtype, memory_format=torch.contiguous_format)


def _add_dweight(dweight_VH: Tensor, dlogits_CV: Tensor, hidden_CH: Tensor) -> None:
    """Add dlogits^T hidden to dW in dW's wide dtype: a sum over many chunks would lose its small terms in bf16."""
    for part in slices(len(dweight_VH), DWEIGHT_ROWS):
        dweight_VH[part].add_(torch.mm(dlogits_CV[:, part].t(), hidden_CH))


class BlockTerms(NamedTuple):
    """Hold what a block's gradient reuses from its forward.

    slope: the derivative of the capped logits with respect to the logits, None without a cap. e, e z and slope lie in
    the buffers of `Softmax` and are valid until its next block. at: the target's column, 0 or V - 1 if it lies in
    another shard; here: whether it lies in this one.
    """

    e_BV: Tensor
    ez_BV: Tensor
    top_B1: Tensor
    at_B1: Tensor
    here_B1: Tensor
    temperature: float | Tensor
    slope_BV: Tensor | None


class Softmax:
    """Compute log-softmax, entropy and gradient of one block of rows at a time, in two reused buffers.

    With z = (x - max x) / T, e = exp z and Z = sum e:  logp = z_y - log Z,  H = log Z - sum(e z) / Z,
    dlogp/dz_j = [j = y] - p_j,  dH/dz_j = -p_j (log p_j + H).  With a shard everything but z is that of the whole
    vocabulary. If the plan has a cap c, x is c t with t = tanh(logit / c); a third buffer holds its derivative 1 - t^2.
    """

    def __init__(self, vocabulary: int, dtype: torch.dtype, device: torch.device, longest: int, plan: HeadPlan) -> None:
        size = BLOCK_BYTES.get(device.type, BLOCK_BYTES_ELSEWHERE) // (plan.widest(vocabulary) * dtype.itemsize)
        self.rows, self.plan = max(1, min(size, longest)), plan
        count = 2 if plan.softcap is None else 3
        self.work_WBV = torch.empty(count, self.rows, vocabulary, dtype=dtype, device=device)

    def blocks(self, rows: slice) -> Iterator[slice]:
        """Cut the slice into blocks that fit the buffers."""
        return (slice(rows.start + s.start, rows.start + s.stop) for s in slices(rows.stop - rows.start, self.rows))

    def block(
        self,
        logits_BV: Tensor,
        bias_V: Tensor | None,
        rows: slice,
        out: "Sweep | TokenSweep",
        coefficients: Coefficients | None,
    ) -> Tensor | None:
        """Write the rows' log-prob and entropy to `out`; with coefficients return the gradient w.r.t. their logits.

        The gradient lies in a buffer and is valid until the next block.
        """
        temperature = self.plan.temperature
        if isinstance(temperature, Tensor):
            temperature = temperature[rows, None].to(self.work_WBV.dtype)
        statistics, terms = self._forward(logits_BV, bias_V, self.plan.targets_L[rows], temperature)
        if self.plan.shard is not None:
            per_row = temperature if isinstance(temperature, float) else temperature[:, 0]
            statistics = self.plan.shard.merge(statistics, per_row)
        out.logprobs_L[rows], out.entropy_L[rows] = statistics[:2]
        if coefficients is None:
            return None
        return _gradient(terms, statistics, *coefficients.of(statistics.logprobs_L, rows))

    def _forward(
        self, logits_BV: Tensor, bias_V: Tensor | None, targets_B: Tensor, temperature: float | Tensor
    ) -> tuple[Statistics, BlockTerms]:
        """Return the statistics of each row over this rank's vocabulary, and the terms of the gradient."""
        z_BV, e_BV, *slope = self.work_WBV[:, : len(logits_BV)]
        z_BV.copy_(logits_BV)
        if bias_V is not None:
            z_BV.add_(bias_V)
        if self.plan.softcap is not None:
            _cap(z_BV, self.plan.softcap, *slope)
        top_B1 = z_BV.amax(1, keepdim=True).clamp_(min=torch.finfo(z_BV.dtype).min)
        z_BV.sub_(top_B1)
        if isinstance(temperature, Tensor) or temperature != 1.0:
            z_BV.div_(temperature)
        here_B1 = ((targets_B >= 0) & (targets_B < z_BV.shape[1]))[:, None]
        at_B1 = targets_B[:, None].clamp(0, z_BV.shape[1] - 1)
        target_B1 = z_BV.gather(1, at_B1).masked_fill_(~here_B1, -torch.inf)
        torch.exp(z_BV.clamp_(min=LOWEST), out=e_BV)
        ez_BV = z_BV.mul_(e_BV)
        sum_B1 = e_BV.sum(1, keepdim=True)
        log_sum_B1 = sum_B1.log()
        entropy_B1 = log_sum_B1 - ez_BV.sum(1, keepdim=True) / sum_B1
        logprob_B1 = target_B1 - log_sum_B1
        statistics = Statistics(logprob_B1[:, 0], entropy_B1[:, 0], top_B1[:, 0], log_sum_B1[:, 0])
        return statistics, BlockTerms(e_BV, ez_BV, top_B1, at_B1, here_B1, temperature, *(slope or [None]))


def _cap(x_BV: Tensor, softcap: float, slope_BV: Tensor) -> None:
    """Replace x by softcap * tanh(x / softcap), and write the derivative to slope_BV."""
    x_BV.div_(softcap).tanh_()
    torch.mul(x_BV, x_BV, out=slope_BV).neg_().add_(1)
    x_BV.mul_(softcap)


def _gradient(terms: BlockTerms, statistics: Statistics, by_logprob_B: Tensor, by_entropy_B: Tensor | None) -> Tensor:
    """Return the gradient with respect to a block's logits before any cap, written over its e_BV."""
    _, entropy_B1, top_B1, log_sum_B1 = (t[:, None] for t in statistics if t is not None)
    c_B1 = by_logprob_B[:, None] / terms.temperature
    log_p_less_z_B1 = ((terms.top_B1 - top_B1) / terms.temperature - log_sum_B1).clamp_(min=LOWEST)
    p_per_e_B1 = log_p_less_z_B1.exp()
    if by_entropy_B is None:
        terms.e_BV.mul_(-c_B1 * p_per_e_B1)
    else:
        g_B1 = by_entropy_B[:, None] / terms.temperature
        terms.e_BV.mul_(-(c_B1 + g_B1 * (entropy_B1 + log_p_less_z_B1)) * p_per_e_B1)
        terms.e_BV.addcmul_(terms.ez_BV, -g_B1 * p_per_e_B1)
    gradient_BV = terms.e_BV.scatter_add_(1, terms.at_B1, c_B1 * terms.here_B1)
    return gradient_BV if terms.slope_BV is None else gradient_BV.mul_(terms.slope_BV)


class TokenSweep(NamedTuple):
    """Hold log-prob and entropy of each row."""

    logprobs_L: Tensor
    entropy_L: Tensor


@torch.no_grad()
def token_sweep(
    logits_NV: Tensor, plan: HeadPlan, coefficients: Coefficients | None = None, gradient_NV: Tensor | None = None
) -> TokenSweep:
    """Compute the sweep of existing logits; with `coefficients` also write the live rows of `gradient_NV`.

    gradient_NV may be the logits themselves: a block of rows is copied before its gradient is written.
    """
    count, dtype = len(plan.targets_L), wide(logits_NV.dtype)
    new = logits_NV.new_empty
    out = TokenSweep(new(count, dtype=dtype), new(count, dtype=dtype))
    softmax = Softmax(logits_NV.shape[1], dtype, logits_NV.device, count, plan)
    for rows in softmax.blocks(slice(0, count)):
        gradient_BV = softmax.block(plan.take(logits_NV, rows), None, rows, out, coefficients)
        if gradient_NV is not None and gradient_BV is not None:
            where = rows if plan.index_L is None else plan.index_L[rows]
            gradient_NV[where] = gradient_BV.to(gradient_NV.dtype)
    return out
