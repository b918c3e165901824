"""Tiny hybrids: models in which recurrent layers stand beside attention, with random weights in float64."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    FalconH1Config,
    Lfm2Config,
    PreTrainedModel,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
)
from transformers.models.auto import AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "eos_token_id": 0,
    "bos_token_id": None,
    "pad_token_id": None,
}
DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_hidden_layers": 3,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
MAMBA = {
    "num_hidden_layers": 2,
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
CONFIGS: dict[str, Any] = {
    "qwen3_5": lambda: Qwen3_5TextConfig(**SIZES, **DELTA),
    "qwen3_next": lambda: Qwen3NextConfig(**SIZES, **DELTA, **EXPERTS),
    "falcon_h1": lambda: FalconH1Config(**SIZES, **MAMBA),
    "lfm2": lambda: Lfm2Config(**SIZES, layer_types=["conv", "full_attention", "conv"], num_hidden_layers=3),
}


def hybrid(name: str) -> PreTrainedModel:
    """Return a tiny model of the kind, whose every part matters to its log-probs."""
    config = CONFIGS[name]()
    config._experts_implementation = "eager"  # the grouped matmul has no float64
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn_like(param) * 0.25 if param.ndim > 1 else param + 0.1 * torch.randn_like(param))
    return model.eval()
