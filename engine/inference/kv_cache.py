"""Cache the keys and values of the calls being sampled, and attend to them from the tokens of a step.

Legend: T new tokens of a step, R calls in it, S slots of the cache, C its capacity in tokens, A query heads,
G key-value heads, D head size, H hidden size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mgrpo.engine.inference.recurrent_states import RecurrentStates
from mgrpo.engine.model.attention import Local, Mixer, Rule, UnsupportedAttentionError, masked_attention
from mgrpo.engine.system.device import send


class KVCache:
    """Hold keys and values of S calls: per layer k (S, G, C, D) and v (S, G, C, E), made when the layer first attends.

    S is fixed and C doubles as needed up to `most_tokens`. So the allocator gets few requests, with sizes that repeat,
    and can use the memory of the last step's attention again. A layer's heads and sizes are those of the keys and
    values that it passes.
    """

    def __init__(self, slots: int, most_tokens: int):
        self.slots, self.most_tokens, self.room = slots, most_tokens, 0
        self.layers: dict[int, list[Tensor]] = {}
        self.states = RecurrentStates(slots)

    def reserve(self, tokens: int) -> None:
        """Make room for calls of up to that many tokens."""
        if tokens <= self.room:
            return
        assert tokens <= self.most_tokens
        self.room = min(max(128, 2 * self.room, tokens), self.most_tokens)
        for held in self.layers.values():
            held[:] = [self._grown(old) for old in held]

    def layer(self, index: int, k_GTD: Tensor, v_GTE: Tensor) -> list[Tensor]:
        """Return the keys and values of a layer; it is made for heads and sizes like those of k and v."""
        if index not in self.layers:
            empty = [x.new_empty(self.slots, x.shape[0], 0, x.shape[2]) for x in (k_GTD, v_GTE)]
            self.layers[index] = [self._grown(old) for old in empty]
        return self.layers[index]

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first tokens of one slot to another: all of the source's prompt but the last one."""
        for held in self.layers.values():
            for x in held:
                x[target, :, :tokens] = x[source, :, :tokens]
        if tokens:
            self.states.copy(source, target)

    def forget(self, slot: int) -> None:
        """Give up the prompt of a slot, so that it cannot be copied any more."""
        self.states.begins.pop(slot, None)

    def _grown(self, old: Tensor) -> Tensor:
        slots, groups, have, size = old.shape
        # Zeros, because attention also reads masked positions, and 0 * NaN would be NaN.
        new = old.new_zeros(slots, groups, self.room, size)
        new[:, :, :have] = old
        return new


class CachedLayout:
    """Lay out the attention of one step: call r adds counts[r] tokens to the starts[r] tokens in slots[r]."""

    def __init__(self, cache: KVCache, slots: list[int], starts: list[int], counts: list[int], device: torch.device):
        self.cache, self.seen, self.mixed = cache, set[int](), set[int]()
        self.masks: dict[Local, Tensor] = {}
        self.calls = list(zip(slots, starts, counts, strict=True))
        # All is planned on the host and sent at once, so that a step never waits for a GPU to say where something is.
        slots_R, starts_R, counts_R = (np.array(numbers, np.int64) for numbers in (slots, starts, counts))
        ends_R = counts_R.cumsum()
        within_T = np.arange(ends_R[-1]) - np.repeat(ends_R - counts_R, counts_R)
        # Calls with one new token attend together, the others one by one.
        single_R = counts_R == 1
        self.chunks = [
            (slot, start, int(end) - n, int(end))
            for (slot, start, n), end in zip(self.calls, ends_R, strict=True)
            if n > 1
        ]
        seen_R, steps_R = starts_R[single_R], ends_R[single_R] - 1
        going_R = seen_R > 0  # those that have a state of a recurrent layer to go on from
        planned = self._plan_singles(slots_R[single_R], seen_R)
        placed_T = [np.repeat(slots_R, counts_R), np.repeat(starts_R, counts_R) + within_T]
        stepping = [slots_R[single_R][going_R], steps_R[going_R]]
        sent = send([*placed_T, ends_R - 1, slots_R[single_R], steps_R, *planned, *stepping], device)
        self.slots_T, self.positions_T, self.last_R, self.single_slots, self.single_T = sent[:5]
        self.row_S, self.last_S, *self.stepping = sent[5:]

    def _plan_singles(self, slots_R: np.ndarray, seen_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Choose which slots the calls with one new token read; return each one's row of them, and each row's last key.

        The slots are read in place when most of their range is in use, and gathered otherwise.
        """
        count = len(slots_R)
        self.length = int(seen_R.max(initial=-1)) + 1
        low, high = (int(slots_R.min()), int(slots_R.max()) + 1) if count else (0, 0)
        self.span = slice(low, high) if high - low < 2 * count else None
        row_S = slots_R - low if self.span else np.arange(count)
        last_S = np.zeros(high - low if self.span else count, np.int64)
        last_S[row_S] = seen_R
        return row_S, last_S

    def attend(self, layer: int, q_ATD: Tensor, k_GTD: Tensor, v_GTE: Tensor, rule: Rule) -> Tensor:
        """Add the new keys and values to the layer's, and attend to them; (T, A, E).

        Raises UnsupportedAttentionError if a layer attends twice in a step: the second would overwrite the first.
        """
        if layer in self.seen:
            raise UnsupportedAttentionError("attends more than once in a layer")
        self.seen.add(layer)
        k_SGCD, v_SGCE = self.cache.layer(layer, k_GTD, v_GTE)
        k_SGCD[self.slots_T, :, self.positions_T] = k_GTD.transpose(0, 1)
        v_SGCE[self.slots_T, :, self.positions_T] = v_GTE.transpose(0, 1)
        out_TAE = q_ATD.new_empty(q_ATD.shape[1], q_ATD.shape[0], v_GTE.shape[2])
        if len(self.single_T):
            out_TAE[self.single_T] = self._attend_singles(q_ATD.transpose(0, 1)[self.single_T], k_SGCD, v_SGCE, rule)
        for slot, start, a, b in self.chunks:
            k_GCD, v_GCE = k_SGCD[slot, :, : start + b - a], v_SGCE[slot, :, : start + b - a]
            out_TAE[a:b] = self._attend_chunk(q_ATD[:, a:b], k_GCD, v_GCE, start, rule)
        return out_TAE

    def mix(self, mixer: Mixer, hidden_1TH: Tensor) -> Tensor:
        """Run a recurrent layer on from each call's state; (1, T, H).

        Calls with a state and one new token run together, the others one by one. Raises UnsupportedAttentionError if
        there are several mixers in a layer: the second would overwrite the first's state.
        """
        if mixer.layer in self.mixed:
            raise UnsupportedAttentionError("has several recurrent states in a layer")
        self.mixed.add(mixer.layer)
        states, out_1TH = self.cache.states, torch.empty_like(hidden_1TH)
        slots_R, tokens_R = self.stepping
        if len(slots_R):
            out_1TH[0, tokens_R] = states.advance(mixer, slots_R, hidden_1TH[0, tokens_R][:, None])[:, 0]
        end = 0
        for slot, start, count in self.calls:
            begin, end = end, end + count
            if not start:
                out_1TH[:, begin:end] = states.begin(mixer, slot, hidden_1TH[:, begin:end])
            elif count > 1:
                slots_1 = self.slots_T[begin : begin + 1]
                out_1TH[:, begin:end] = states.advance(mixer, slots_1, hidden_1TH[:, begin:end])
        return out_1TH

    def _attend_chunk(self, q_AND: Tensor, k_GCD: Tensor, v_GCE: Tensor, start: int, rule: Rule) -> Tensor:
        """Attend from the N new tokens of one call to its C tokens, of which they are the last; (N, A, E)."""
        heads, count, size = q_AND.shape
        groups, keys, _ = k_GCD.shape
        q_GMD = q_AND.reshape(groups, -1, size)
        queries_N = torch.arange(start, start + count, device=q_AND.device)
        mask_MC = visible(queries_N, keys, rule.local).repeat(heads // groups, 1)
        out = masked_attention(q_GMD[None], k_GCD[None], v_GCE[None], mask_MC, rule, count)
        return out.view(heads, count, -1).transpose(0, 1)

    def _attend_singles(self, q_RAD: Tensor, k_SGCD: Tensor, v_SGCE: Tensor, rule: Rule) -> Tensor:
        """Attend with one query per call: the heads that share a key-value head are the rows of one small attention."""
        (rows, heads, head_dim), groups = q_RAD.shape, k_SGCD.shape[1]
        index = self.single_slots if self.span is None else self.span
        k, v = k_SGCD[index, :, : self.length], v_SGCE[index, :, : self.length]
        q = q_RAD.new_zeros(len(k), groups, heads // groups, head_dim)
        q[self.row_S] = q_RAD.view(rows, groups, heads // groups, head_dim)
        if rule.local not in self.masks:
            self.masks[rule.local] = visible(self.last_S, self.length, rule.local)[:, None, None]
        out = masked_attention(q, k, v, self.masks[rule.local], rule, 1)
        return out[self.row_S].view(rows, heads, -1)


def visible(queries_N: Tensor, keys: int, local: Local) -> Tensor:
    """Return (N, C) bool: whether a query at each of these positions attends to each of so many keys."""
    keys_C, queries_N1 = torch.arange(keys, device=queries_N.device), queries_N[:, None]
    mask_NC = keys_C <= queries_N1
    if local.window is not None:
        mask_NC &= keys_C > queries_N1 - local.window
    if local.chunk is not None:
        mask_NC &= keys_C >= queries_N1 // local.chunk * local.chunk
    return mask_NC
