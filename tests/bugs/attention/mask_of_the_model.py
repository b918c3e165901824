"""The packed attention ignores a model's own mask where that is no plain causal one.

Such are Doge's dynamic mask, Gemma 3 with use_bidirectional_attention, and an encoder's LM head (is_decoder=False).
"""

from transformers import (
    BertGenerationConfig,
    BertGenerationDecoder,
    DogeConfig,
    DogeForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
)

from reproduction.models import EAGER, SIZES, judge

bert = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
CONFIGS = {
    DogeForCausalLM: DogeConfig(**SIZES, keep_window_size=8),
    Gemma3ForCausalLM: Gemma3TextConfig(**SIZES, head_dim=8, use_bidirectional_attention=True),
    BertGenerationDecoder: BertGenerationConfig(**bert, num_attention_heads=4, is_decoder=False),
}
judge(kind._from_config(config, **EAGER) for kind, config in CONFIGS.items())
