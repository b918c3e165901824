"""Make the models of `mgrpo bench step`: known architectures whose random weights cost as much as trained ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

EOS = "<eos>"
Sizes = dict[str, Any]

_LLAMA: Sizes = {"model_type": "llama", "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 0}
_QWEN3: Sizes = {
    **_LLAMA,
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
}
TINY: Sizes = {
    **_LLAMA,
    "vocab_size": 8192,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
}
SMOLLM2_135M: Sizes = {
    **_LLAMA,
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
}
QWEN3_06B: Sizes = {**_QWEN3, "hidden_size": 1024, "intermediate_size": 3072}
QWEN3_17B: Sizes = {**_QWEN3, "hidden_size": 2048, "intermediate_size": 6144}


def make_model(folder: Path, sizes: Sizes) -> Path:
    """Save a model of random bf16 weights with a tokenizer of one token, as no text is used."""
    tokenizer = Tokenizer(WordLevel({EOS: 0}, unk_token=EOS))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS).save_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(**sizes)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def flop(model: PreTrainedModel, lengths: list[int], actions: int) -> float:
    """Return the flop of a forward and backward without needless work: 6 per weight and token, without recomputation.

    These are the layers for all tokens, causal attention within each sequence of these lengths, and the head for the
    actions.
    """
    config = model.config
    head = config.vocab_size * config.hidden_size
    outside = head if config.tie_word_embeddings else 2 * head  # the input embedding needs no matmul
    layers = sum(w.numel() for w in model.parameters() if w.dim() == 2) - outside
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = config.num_hidden_layers * config.num_attention_heads * size
    return 6.0 * (layers * sum(lengths) + head * actions + attention * sum(length**2 for length in lengths))
