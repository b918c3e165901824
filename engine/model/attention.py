"""Let the tokens of one flat row (1, T) attend to each other, in any causal LM of `transformers`.

One attention function, "mgrpo", is registered for all models. It follows a *layout* that is passed down through the
model's forward: `Packed` for training (sequences side by side, no padding), or the sampler's for decoding (tokens of
many calls against a key-value cache). A forward without a layout, such as the caller's `generate`, runs and is masked
as with "sdpa".

Legend: T tokens of the flat row, A query heads, G key-value heads, D head size, H hidden size, B sequences.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from mgrpo.engine.model.cpu_attention import buckets, causal_attention

# Whether a layout decides which tokens attend to which: then no mask is made.
_laid_out: ContextVar[bool] = ContextVar("laid_out", default=False)


class Layout(Protocol):
    """Decide how the tokens of one flat row attend: q (A, T, D), k and v (G, T, D) -> (T, A, D)."""

    def attend(self, layer: int, q_ATD: Tensor, k_GTD: Tensor, v_GTD: Tensor, scale: float) -> Tensor: ...


class Packed:
    """Lay out B sequences side by side, each attending causally to itself. cu_seqlens (B + 1,) int32, from 0 to T."""

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int):
        self.cu_seqlens = cu_seqlens
        self.max_seqlen = max_seqlen
        self.buckets = [] if cu_seqlens.is_cuda else buckets(cu_seqlens.diff().tolist())

    def attend(self, layer: int, q_ATD: Tensor, k_GTD: Tensor, v_GTD: Tensor, scale: float) -> Tensor:
        """Return the attention's output (T, A, D)."""
        if q_ATD.is_cuda:
            return self._attend_cuda(q_ATD, k_GTD, v_GTD, scale)
        repeat = q_ATD.shape[0] // k_GTD.shape[0]
        k_ATD, v_ATD = k_GTD.repeat_interleave(repeat, 0), v_GTD.repeat_interleave(repeat, 0)
        return causal_attention(q_ATD, k_ATD, v_ATD, scale, self.buckets).transpose(0, 1)

    def _attend_cuda(self, q_ATD: Tensor, k_GTD: Tensor, v_GTD: Tensor, scale: float) -> Tensor:
        out_TAD = varlen_attn(
            q_ATD.transpose(0, 1).contiguous(),
            k_GTD.transpose(0, 1).contiguous(),
            v_GTD.transpose(0, 1).contiguous(),
            self.cu_seqlens,
            self.cu_seqlens,
            self.max_seqlen,
            self.max_seqlen,
            scale=scale,
            window_size=(-1, 0),  # causal
            enable_gqa=True,
        )
        assert isinstance(out_TAD, Tensor)
        return out_TAD


class UnsupportedAttentionError(Exception):
    """Report that a model needs more than plain causal attention."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    layout: Layout | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Implement the attention interface of transformers: (1, heads, T, D) in, (1, T, heads, D) out.

    Raises UnsupportedAttentionError for soft-capping and sinks.
    """
    if softcap is not None or s_aux is not None:
        raise UnsupportedAttentionError("has attention with soft-capping or sinks")
    if layout is None:
        sdpa: Any = AttentionInterface()["sdpa"]
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, **rest)
    layer = module.layer_idx
    assert isinstance(layer, int)
    out_TAD = layout.attend(layer, query[0], key[0], value[0], scaling)
    return out_TAD.unsqueeze(0), None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return None if _laid_out.get() else sdpa_mask(*args, **kwargs)


AttentionInterface.register("mgrpo", attention)
AttentionMaskInterface.register("mgrpo", _mask)


def hidden_states(model: PreTrainedModel, input_ids_T: Tensor, positions_T: Tensor, layout: Layout) -> Tensor:
    """Return the last hidden states (T, H) of the flat row, before the head."""
    before = _laid_out.set(True)
    try:
        out = model.base_model(
            input_ids=input_ids_T[None], position_ids=positions_T[None], use_cache=False, layout=layout
        )
    finally:
        _laid_out.reset(before)
    return out.last_hidden_state[0]
