#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0, Python 3.11. Seen 2026-11-30.
#
# `base_model` of a causal LM is documented as the backbone without its head. Of Llama4ForCausalLM it is the causal LM
# itself, head and all, because its base_model_prefix ("language_model") names an attribute that it does not have (the
# backbone is `.model`). `get_decoder()` gives the causal LM too. Code that asks `model.base_model(...)` for the last
# hidden state gets logits over the whole vocabulary and no `last_hidden_state`. Other families answer as documented.
#
# Output seen:
#   LlamaForCausalLM: base_model is LlamaModel, get_decoder() is LlamaModel
#   Qwen3MoeForCausalLM: base_model is Qwen3MoeModel, get_decoder() is Qwen3MoeModel
#   Llama4ForCausalLM: base_model is Llama4ForCausalLM, get_decoder() is Llama4ForCausalLM, prefix language_model
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 2>/dev/null
cat >"$folder/try.py" <<'PY'
from transformers import Llama4ForCausalLM, Llama4TextConfig, LlamaConfig, LlamaForCausalLM
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, head_dim=8)
kinds = [
    (LlamaForCausalLM, LlamaConfig(**sizes)),
    (Qwen3MoeForCausalLM, Qwen3MoeConfig(**sizes, num_experts=4, moe_intermediate_size=16)),
    (Llama4ForCausalLM, Llama4TextConfig(**sizes, num_local_experts=4, intermediate_size_mlp=48)),
]
for kind, config in kinds:
    model = kind(config)
    named = [type(part).__name__ for part in (model.base_model, model.get_decoder())]
    more = f", prefix {model.base_model_prefix}" if model.base_model is model else ""
    print(f"{kind.__name__}: base_model is {named[0]}, get_decoder() is {named[1]}{more}")
PY
seen=$("$folder/venv/bin/python" "$folder/try.py" 2>/dev/null)
echo "$seen"
[[ $seen == "LlamaForCausalLM: base_model is LlamaModel, get_decoder() is LlamaModel
Qwen3MoeForCausalLM: base_model is Qwen3MoeModel, get_decoder() is Qwen3MoeModel
Llama4ForCausalLM: base_model is Llama4ForCausalLM, get_decoder() is Llama4ForCausalLM, prefix language_model" ]]
