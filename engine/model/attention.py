"""Let the tokens of one flat row (1, T) attend to each other, in any causal LM of `transformers`.

One attention function, "mgrpo", is registered for all models. It follows a *layout* that is passed down through the
model's forward: `Packed` for training (sequences side by side, no padding), or the sampler's for decoding (tokens of
many calls against a key-value cache). A forward without a layout, such as the caller's `generate`, runs and is masked
as with "sdpa".

A layer's mask is the one that the model asks for: sliding windows and chunks are applied within each sequence, and a
model with any other mask is refused. The check at start (probe.py) finds out which of the two a model has, and calls
`register_local_kind`.

Legend: T tokens of the flat row, A query heads, G key-value heads, D head size, E that of the values, H hidden size,
B sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from mgrpo.engine.model.composite import text_lm, text_part
from mgrpo.engine.model.cpu_attention import Bucket, Scores, buckets, causal_attention
from mgrpo.engine.model.gpu_attention import BlockMask, block_mask, flash_attention, scored_attention, takes

LocalKind = Literal["window", "chunk"]

UNREAD = ("position_bias", "block_mask")  # arguments of the interface that no layout applies
# Whether a layout decides which tokens attend to which: then a mask is only a description.
_laid_out: ContextVar[bool] = ContextVar("laid_out", default=False)
_local_kinds: dict[str, LocalKind] = {}  # by model_type: what a layer that sees only near keys does


class UnsupportedAttentionError(Exception):
    """Report that a model needs attention that cannot be computed exactly here."""


@dataclass(frozen=True)
class Local:
    """Describe a mask narrower than the causal one.

    window: a token attends to this many tokens, including itself, the last one. chunk: a token attends to those since
    the last multiple of it.
    """

    window: int | None = None
    chunk: int | None = None

    def __getitem__(self, index: tuple[slice, ...]) -> Local:
        """Return itself: Gemma 4 cuts a mask to the queries that its last layers need, which are all of them here."""
        if any(part.start or part.stop is not None for part in index):
            raise UnsupportedAttentionError("drops queries of a packed row")
        return self


@dataclass(frozen=True)
class Rule:
    """Say how one layer attends.

    Scores are multiplied by scale and, with a softcap c, become c * tanh(score / c). local: which keys are near enough.
    sinks (A,): of each head the score of a further key whose value is zero.
    """

    scale: float
    local: Local = field(default_factory=Local)
    softcap: float | None = None
    sinks_A: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether torch's fused kernels compute it."""
        return self.softcap is None and self.sinks_A is None


@dataclass(frozen=True)
class Mixer:
    """Hold one run of a recurrent layer, which carries a state from token to token (recurrent.py).

    layer: its number. run: takes (B, L, H) of B sequences that begin together and returns as much; its keywords are a
    cache, or the bounds of sequences side by side. bounded: whether its kernels on a GPU take such bounds.
    """

    layer: int
    run: Callable[..., Tensor]
    bounded: bool


class Layout(Protocol):
    """Decide how the tokens of one flat row see each other.

    attend: q (A, T, D), k (G, T, D), v (G, T, E) -> (T, A, E), contiguous. mix: (1, T, H) -> (1, T, H).
    """

    def attend(self, layer: int, q_ATD: Tensor, k_GTD: Tensor, v_GTE: Tensor, rule: Rule) -> Tensor: ...

    def mix(self, mixer: Mixer, hidden_1TH: Tensor) -> Tensor: ...


class Packed:
    """Lay out B sequences side by side, each attending causally to itself. cu_seqlens (B + 1,) int32, from 0 to T."""

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int):
        self.cu_seqlens = cu_seqlens
        self.max_seqlen = max_seqlen
        self._cut: dict[int | None, list[Bucket]] = {}
        self._starts: dict[int, Tensor] = {}
        self._masks: dict[Local, BlockMask] = {}

    def attend(self, layer: int, q_ATD: Tensor, k_GTD: Tensor, v_GTE: Tensor, rule: Rule) -> Tensor:
        """Return the attention's output (T, A, E)."""
        if takes(q_ATD):
            return self._attend_cuda(q_ATD, k_GTD, v_GTE, rule)
        repeat = q_ATD.shape[0] // k_GTD.shape[0]
        k_ATD, v_ATE = k_GTD.repeat_interleave(repeat, 0), v_GTE.repeat_interleave(repeat, 0)
        scores = Scores(rule.scale, rule.local.window, rule.softcap)
        out_ATE = causal_attention(q_ATD, k_ATD, v_ATE, scores, self._buckets(rule.local.chunk), rule.sinks_A)
        return out_ATE.transpose(0, 1).contiguous()

    def _attend_cuda(self, q_ATD: Tensor, k_GTD: Tensor, v_GTE: Tensor, rule: Rule) -> Tensor:
        (cu_seqlens, longest), near = self._bounds(rule.local.chunk), rule.local
        if rule.plain:
            return flash_attention(q_ATD, k_GTD, v_GTE, cu_seqlens, longest, scale=rule.scale, window=near.window)
        if near not in self._masks:
            self._masks[near] = block_mask(cu_seqlens, q_ATD.shape[1], near.window)
        further: dict[str, Any] = {"softcap": rule.softcap, "sinks_A": rule.sinks_A}
        return scored_attention(q_ATD, k_GTD, v_GTE, self._masks[near], scale=rule.scale, **further)

    def mix(self, mixer: Mixer, hidden_1TH: Tensor) -> Tensor:
        """Return a recurrent layer's output (1, T, H), its state reset at the begin of each sequence.

        Kernels on a GPU that take the bounds of sequences get them. All others run over batches of sequences of similar
        length, padded at their ends, where what comes later changes nothing.
        """
        if hidden_1TH.is_cuda and mixer.bounded:
            return mixer.run(hidden_1TH, cu_seq_lens_q=self.cu_seqlens, seq_idx=self._sequence_1T)
        found = []
        for part in self._buckets(None):
            hidden_BLH = hidden_1TH[0, part.tokens_P].unflatten(0, (-1, part.longest))
            found.append(mixer.run(hidden_BLH).flatten(0, 1)[part.places])
        return torch.cat(found)[self._order_T][None]

    @cached_property
    def _sequence_1T(self) -> Tensor:
        """The number of each token's sequence, (1, T) int32."""
        lengths_B = self.cu_seqlens.diff()
        numbers_B = torch.arange(len(lengths_B), dtype=torch.int32, device=lengths_B.device)
        return numbers_B.repeat_interleave(lengths_B)[None]

    @cached_property
    def _order_T(self) -> Tensor:
        """Where each token of the row stands among those of all buckets, one after the other."""
        return torch.cat([part.flat for part in self._buckets(None)]).argsort()

    def _buckets(self, chunk: int | None) -> list[Bucket]:
        if chunk not in self._cut:
            lengths = self.cu_seqlens.diff().tolist()
            lengths = lengths if chunk is None else _chunks(lengths, chunk)
            self._cut[chunk] = buckets(lengths, self.cu_seqlens.device)
        return self._cut[chunk]

    def _bounds(self, chunk: int | None) -> tuple[Tensor, int]:
        """Return cu_seqlens and the length of the longest sequence; each chunk counts as a sequence."""
        if chunk is None or chunk >= self.max_seqlen:
            return self.cu_seqlens, self.max_seqlen
        if chunk not in self._starts:
            lengths = torch.tensor([0, *_chunks(self.cu_seqlens.diff().tolist(), chunk)])
            self._starts[chunk] = lengths.cumsum(0).to(self.cu_seqlens)
        return self._starts[chunk], chunk


def _chunks(lengths: list[int], chunk: int) -> list[int]:
    return [min(chunk, length - begin) for length in lengths for begin in range(0, length, chunk)]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Local | None,
    *,
    scaling: float | None = None,
    layout: Layout | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Implement the attention interface of transformers: (1, heads, T, D) in, (1, T, heads, E) out.

    Raises UnsupportedAttentionError for what a layout cannot compute.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if layout is None:
        if softcap is not None or s_aux is not None:
            assert not isinstance(attention_mask, Local)
            return _attend_alone(query, key, value, attention_mask, Rule(scale, Local(), softcap, s_aux)), None
        sdpa: Any = AttentionInterface()["sdpa"]
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **rest)
    if is_causal is False or not getattr(module, "is_causal", True):
        raise UnsupportedAttentionError("attends to later tokens")
    if isinstance(attention_mask, Tensor):
        raise UnsupportedAttentionError("has a mask of its own")
    if unread := {name for name in UNREAD if rest.get(name) is not None}:
        raise UnsupportedAttentionError(f"hands its attention {', '.join(sorted(unread))}")
    if rest.get("dropout"):  # only of a host's model: the trainer's own have none
        raise UnsupportedAttentionError(f"has a dropout of {rest['dropout']} in its attention")
    layer = module.layer_idx
    assert isinstance(layer, int)
    rule = Rule(scale, attention_mask or Local(), softcap, s_aux)
    kind = query.device.type
    query, key, value = (_cast(x, kind) for x in (query, key, value))
    with torch.autocast(kind, enabled=False):  # the backward computes without it too
        return layout.attend(layer, query[0], key[0], value[0], rule).unsqueeze(0), None


def _cast(x: Tensor, kind: str) -> Tensor:
    """Return a tensor in autocast's dtype where that is on, as torch's own attention takes it."""
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


def _attend_alone(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: Rule) -> Tensor:
    """Attend without a layout where sdpa has no such scores; mask as sdpa takes it, None: causal; (B, Q, A, E)."""
    batch, heads, queries, size = query.shape
    groups, keys = key.shape[1:3]
    if mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    mask = mask.expand(batch, 1, queries, keys).repeat(1, 1, heads // groups, 1)
    grouped = query.reshape(batch, groups, -1, size)
    return masked_attention(grouped, key, value, mask, rule, queries).view(batch, heads, queries, -1).transpose(1, 2)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rule: Rule, per_head: int) -> Tensor:
    """Attend under a mask: q (…, G, M, D), k (…, G, C, D), v (…, G, C, E) -> (…, G, M, E).

    M rows are the heads that share a key-value head, per_head queries of each.
    """
    if rule.plain:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=rule.scale)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.matmul((q * rule.scale).to(wide), k.to(wide).transpose(-1, -2))
    if rule.softcap is not None:
        scores = (scores / rule.softcap).tanh() * rule.softcap
    lowest = torch.finfo(scores.dtype).min  # not -inf: padding that sees no token at all would become NaN
    scores = scores.masked_fill(~mask, lowest)
    if rule.sinks_A is None:
        return torch.matmul(scores.softmax(-1).to(v.dtype), v)
    sinks_GM = rule.sinks_A.to(wide).view(k.shape[-3], -1).repeat_interleave(per_head, -1)
    sinks = sinks_GM[..., None].expand(*scores.shape[:-1], 1)
    return torch.matmul(torch.cat([scores, sinks], -1).softmax(-1)[..., :-1].to(v.dtype), v)


def _mask(*args: Any, **kwargs: Any) -> Tensor | Local | None:
    """Return a description of the mask that a model asks for; None: plain causal. Without a layout, sdpa's mask."""
    if not _laid_out.get():
        return sdpa_mask(*args, **kwargs)
    size = kwargs.get("local_size")
    if size is None:
        return None
    kind = _local_kinds.get(kwargs["config"].model_type)
    return Local(chunk=size) if kind == "chunk" else Local(window=size)


def register_local_kind(model_type: str, kind: LocalKind) -> None:
    """Set what layers of this type of model do that see near keys only; without it, they have sliding windows."""
    _local_kinds[model_type] = kind


def _packed_sequences(position_ids: Tensor) -> Tensor | None:
    """Return the number of each token's sequence, as masks need it; nothing under a layout, which knows it.

    transformers would wait for the GPU to say whether there are several, once for each kind of mask.
    """
    return None if _laid_out.get() else _find_packed(position_ids)


AttentionInterface.register("mgrpo", attention)
AttentionMaskInterface.register("mgrpo", _mask)
_find_packed = masking_utils.find_packed_sequence_indices
masking_utils.find_packed_sequence_indices = _packed_sequences


def output_head(model: PreTrainedModel, whose: str = "model") -> nn.Linear:
    """Return the layer that turns hidden states into logits. Raises ValueError if the model has none."""
    head: nn.Linear | None = model.get_output_embeddings()
    if head is None:
        kind = type(model).__name__
        raise ValueError(f"{whose}: {kind} given: expected a causal LM, with a head over its vocabulary")
    return head


def backbone(model: PreTrainedModel) -> nn.Module:
    """Return the part of a causal LM that makes the hidden states of a text, without its head."""
    text = text_lm(model)
    if text is model and (part := text_part(model)) is not model:
        return part
    base = text.base_model
    if base is not text:
        return base
    inner = getattr(text, "model", None)  # a class whose base_model_prefix names no attribute
    if not isinstance(inner, nn.Module):
        raise UnsupportedAttentionError("has no backbone of its own")
    return inner


@contextmanager
def laid_out() -> Iterator[None]:
    """Say that a layout decides which tokens attend to which: a mask is then only a description."""
    before = _laid_out.set(True)
    try:
        yield
    finally:
        _laid_out.reset(before)


def hidden_states(model: PreTrainedModel, input_ids_T: Tensor, positions_T: Tensor, layout: Layout) -> Tensor:
    """Return the last hidden states (T, H) of the flat row, before the head."""
    hidden_TH: Tensor = run_backbone(model, input_ids_T, positions_T, layout).last_hidden_state[0]
    return hidden_TH


def run_backbone(
    model: PreTrainedModel, input_ids_T: Tensor, positions_T: Tensor, layout: Layout, **options: Any
) -> Any:
    """Return what the backbone returns for the flat row. options: further arguments of its forward."""
    with laid_out():
        return backbone(model)(
            input_ids=input_ids_T[None], position_ids=positions_T[None], use_cache=False, layout=layout, **options
        )
