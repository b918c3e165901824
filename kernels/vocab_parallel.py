"""An LM head whose vocabulary is split over a process group (tensor parallel).

Each rank holds some consecutive rows of the weight, possibly none, and sees every row of the input. A row's softmax
over the whole vocabulary follows from the softmax over each shard: with q the probability mass of a shard,
log p = log p(within the shard) + log q for the target's shard, and H = sum q (H(within the shard) - log q).

Instead of the usual three all-reduces (maximum, sum, target's logit) the ranks gather four numbers per row, once. Each
rank merges the same numbers in the same order, so that the results are the same to the bit on all ranks.

Legend: N rows, B rows merged at once, S shards, H hidden, V vocabulary of this rank.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import FLOATS, check_head, require

# exp() of this is 0 in any dtype, so clamping shifted logits to it is exact, and -inf * 0 never occurs.
LOWEST = -1e4


class Statistics(NamedTuple):
    """Hold each row's target log-prob, its entropy and, if kept, the maximum x and log sum e^((x - max) / T)."""

    logprobs_L: Tensor
    entropy_L: Tensor
    top_L: Tensor | None = None
    log_sum_L: Tensor | None = None


@dataclass(frozen=True)
class Shard:
    """Describe this rank's rows of the weight: from `first` on, of `total`; `widest`: rows of the largest shard."""

    group: dist.ProcessGroup
    first: int
    total: int
    widest: int

    def merge(self, mine: Statistics, temperature: float | Tensor) -> Statistics:
        """Return the statistics over the whole vocabulary, given those over this rank's part.

        mine: log-prob -inf for a target in another shard. All ranks must merge the same rows at the same time.
        """
        mine_4B = torch.stack([values_B for values_B in mine if values_B is not None])
        parts_S4B = mine_4B.new_empty(self.group.size(), *mine_4B.shape)
        dist.all_gather(list(parts_S4B), mine_4B, group=self.group)
        logprob_SB, entropy_SB, top_SB, log_sum_SB = parts_S4B.unbind(1)
        empty_SB = log_sum_SB == -torch.inf  # the shard has no rows, or only logits of -inf
        top_B = top_SB.amax(0)
        mass_SB = (top_SB - top_B) / temperature + log_sum_SB
        log_sum_B = mass_SB.logsumexp(0)
        log_share_SB = mass_SB - log_sum_B
        logprob_B = (logprob_SB.masked_fill(empty_SB, -torch.inf) + log_share_SB).amax(0)
        log_share_SB = log_share_SB.clamp(min=LOWEST)
        entropy_B = (log_share_SB.exp() * (entropy_SB.masked_fill(empty_SB, 0) - log_share_SB)).sum(0)
        return Statistics(logprob_B, entropy_B, top_B, log_sum_B)


def check_sharded_head(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    chunk_rows: int | None,
    buffer_bytes: int | None,
    group: dist.ProcessGroup | None,
) -> tuple[torch.dtype, Shard | None]:
    """Check the head and return the matmuls' dtype and, with a group, this rank's shard.

    If a check fails on one rank, or the ranks disagree, all ranks raise ValueError: a rank that raised alone would
    leave the others waiting for it.
    """
    for name, given in (("chunk_rows", chunk_rows), ("buffer_bytes", buffer_bytes)):
        require(given is None or given > 0, name, given, "a number > 0 or None")
    if group is None:
        return check_head(hidden_NH, weight_VH, bias_V), None
    mistake, facts = None, [0] * len(FACTS)
    try:
        dtype = check_head(hidden_NH, weight_VH, bias_V, may_be_empty=True)
        facts = _facts(hidden_NH, weight_VH, bias_V, chunk_rows, buffer_bytes, dtype)
    except ValueError as error:
        mistake = error
    rows_S, facts_FS = _gather(len(weight_VH) if weight_VH.ndim else 0, facts, hidden_NH.device, group)
    if mistake is not None:
        raise mistake
    for name, values_S in zip(FACTS, facts_FS, strict=True):
        require(len(set(values_S)) == 1, "group", f"{name} {values_S} by rank", "the same on all ranks")
    require(sum(rows_S) > 0, "weight_VH", "no rows on any rank", "V > 0")
    return dtype, Shard(group, sum(rows_S[: group.rank()]), sum(rows_S), max(rows_S))


# These must be the same on all ranks, or their collectives would not match.
FACTS = (
    *("sound head", "rows", "columns", "matmul dtype", "chunk_rows", "buffer_bytes"),
    *("gradient of hidden_NH", "any gradient"),
)


def _facts(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    chunk_rows: int | None,
    buffer_bytes: int | None,
    dtype: torch.dtype,
) -> list[int]:
    """Return this rank's values of FACTS."""
    leaves = (hidden_NH, weight_VH, bias_V)
    needs = [torch.is_grad_enabled() and leaf is not None and leaf.requires_grad for leaf in leaves]
    return [1, *hidden_NH.shape, FLOATS.index(dtype), chunk_rows or 0, buffer_bytes or 0, needs[0], any(needs)]


def _gather(
    rows: int, facts: list[int], device: torch.device, group: dist.ProcessGroup
) -> tuple[list[int], list[list[int]]]:
    """Return the rows of each rank's shard, and for each of FACTS its values by rank."""
    mine_F = torch.tensor([rows, *facts], device=device)
    all_SF = mine_F.new_empty(group.size(), len(mine_F))
    dist.all_gather(list(all_SF), mine_F, group=group)
    rows_S, *facts_FS = all_SF.t().tolist()
    return rows_S, facts_FS
