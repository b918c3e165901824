"""Cache the keys and values of the calls being sampled, and attend to them from the tokens of a step.

Legend: T new tokens of a step, R calls in it, S slots of the cache, C its capacity in tokens, A query heads,
G key-value heads, D head size.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel


class KVCache:
    """Hold the keys and the values of S calls, (layers, S, G, C, D) each, in the model's dtype.

    S is fixed and C doubles as needed up to `most_tokens`. The allocator thus gets few requests, of sizes that repeat,
    and can use the memory of the last step's attention again.
    """

    def __init__(self, model: PreTrainedModel, slots: int, most_tokens: int):
        self.most_tokens = most_tokens
        config = model.config
        heads = config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        parameter = next(model.parameters())
        self.k = parameter.new_empty(config.num_hidden_layers, slots, groups, 0, head_dim)
        self.v = self.k.clone()

    def reserve(self, tokens: int) -> None:
        """Make room for calls of up to that many tokens."""
        layers, slots, groups, have, head_dim = self.k.shape
        if tokens <= have:
            return
        assert tokens <= self.most_tokens
        room = min(max(128, 2 * have, tokens), self.most_tokens)
        for name in "kv":
            # Zeros, because attention also reads masked positions, and 0 * NaN would be NaN.
            new = self.k.new_zeros(layers, slots, groups, room, head_dim)
            new[:, :, :, :have] = getattr(self, name)
            setattr(self, name, new)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first tokens of one slot to another."""
        self.k[:, target, :, :tokens] = self.k[:, source, :, :tokens]
        self.v[:, target, :, :tokens] = self.v[:, source, :, :tokens]


class CachedLayout:
    """Lay out the attention of one step: call r adds counts[r] tokens to the starts[r] tokens in slots[r]."""

    def __init__(self, cache: KVCache, slots: list[int], starts: list[int], counts: list[int]):
        self.cache, self.counts = cache, counts
        device = cache.k.device
        self.slots_T = torch.tensor(slots, device=device).repeat_interleave(torch.tensor(counts, device=device))
        self.positions_T = torch.cat(
            [torch.arange(s, s + n, device=device) for s, n in zip(starts, counts, strict=True)]
        )
        # Calls with one new token attend together, the others one by one.
        self.single_R = torch.tensor([n == 1 for n in counts], device=device)
        ends = np.cumsum(counts)
        self.chunks = [
            (slot, start, int(end) - n, int(end))
            for slot, start, n, end in zip(slots, starts, counts, ends, strict=True)
            if n > 1
        ]
        self.single_T = self.single_R.repeat_interleave(torch.tensor(counts, device=device)).nonzero()[:, 0]
        self._plan_singles()

    def _plan_singles(self) -> None:
        slots, positions = self.slots_T[self.single_T], self.positions_T[self.single_T]
        if not len(slots):
            return
        self.length = int(positions.max()) + 1
        low, high = int(slots.min()), int(slots.max()) + 1
        # Read the slots in place if most of their range is in use, otherwise gather them.
        self.span = slice(low, high) if high - low < 2 * len(slots) else None
        rows = high - low if self.span else len(slots)
        self.row_S = slots - low if self.span else torch.arange(len(slots), device=slots.device)
        lengths = torch.ones(rows, dtype=torch.long, device=slots.device)
        lengths[self.row_S] = positions + 1
        self.mask_S11C = (torch.arange(self.length, device=slots.device) < lengths[:, None])[:, None, None]

    def attend(self, layer: int, q_ATD: Tensor, k_GTD: Tensor, v_GTD: Tensor, scale: float) -> Tensor:
        """Store one layer's new keys and values, and return what its queries attend to, (T, A, D)."""
        k_SGCD, v_SGCD = self.cache.k[layer], self.cache.v[layer]
        k_SGCD[self.slots_T, :, self.positions_T] = k_GTD.transpose(0, 1)
        v_SGCD[self.slots_T, :, self.positions_T] = v_GTD.transpose(0, 1)
        out_TAD = torch.empty_like(q_ATD.transpose(0, 1), memory_format=torch.contiguous_format)
        if len(self.single_T):
            out_TAD[self.single_T] = self._attend_singles(q_ATD.transpose(0, 1)[self.single_T], k_SGCD, v_SGCD, scale)
        groups = k_GTD.shape[0]
        for slot, start, a, b in self.chunks:
            q_GMD, count = q_ATD[:, a:b].reshape(groups, -1, q_ATD.shape[2]), b - a
            k_GCD, v_GCD = k_SGCD[slot, :, : start + count], v_SGCD[slot, :, : start + count]
            mask_NC = torch.ones(count, start + count, dtype=torch.bool, device=q_ATD.device).tril(start)
            mask_MC = mask_NC.repeat(q_ATD.shape[0] // groups, 1)
            out = F.scaled_dot_product_attention(q_GMD[None], k_GCD[None], v_GCD[None], mask_MC, scale=scale)
            out_TAD[a:b] = out.view(q_ATD.shape[0], count, -1).transpose(0, 1)
        return out_TAD

    def _attend_singles(self, q_RAD: Tensor, k_SGCD: Tensor, v_SGCD: Tensor, scale: float) -> Tensor:
        """Attend with one query per call: heads that share a key-value head are the rows of one small attention."""
        (rows, heads, head_dim), groups = q_RAD.shape, k_SGCD.shape[1]
        index = self.span if self.span is not None else self.slots_T[self.single_T]
        k, v = k_SGCD[index, :, : self.length], v_SGCD[index, :, : self.length]
        q = q_RAD.new_zeros(len(k), groups, heads // groups, head_dim)
        q[self.row_S] = q_RAD.view(rows, groups, heads // groups, head_dim)
        out = F.scaled_dot_product_attention(q, k, v, self.mask_S11C, scale=scale)
        return out[self.row_S].view(rows, heads, head_dim)
