"""Policy.of accepts a model with a sliding window and attends to everything, silently."""

from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from reproduction.models import EAGER, SIZES, judge

CONFIGS = {
    MistralForCausalLM: MistralConfig(**SIZES, head_dim=8, sliding_window=8),
    Qwen2ForCausalLM: Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=0),
    Gemma3ForCausalLM: Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=8),
    Olmo3ForCausalLM: Olmo3Config(**SIZES, sliding_window=8),
}
judge(kind._from_config(config, **EAGER) for kind, config in CONFIGS.items())
