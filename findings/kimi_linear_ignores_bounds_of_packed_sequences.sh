#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0, Python 3.11. Seen 2026-11-30.
#
# Callers hand the bounds of packed sequences to a model as `cu_seq_lens_q` and `cu_seq_lens_k`. Qwen3-Next renames them
# to `cu_seqlens` for its gated delta rule, so that a kernel keeps the sequences apart and, without one, transformers
# refuses with a ValueError. Kimi Linear passes its keyword arguments on to its delta attention as they are: the wrapper
# around it keeps only those that the kernel names (`cu_seqlens`), so the bounds are dropped without a word, whether a
# kernel is installed or not, and nothing is refused. Its full-attention layers keep the sequences apart. A sequence's
# logits then depend on what is packed before it.
#
# Output seen:
#   Qwen3-Next: refused, ValueError
#   Kimi Linear: logits of the second sequence change with the first
#   Kimi Linear, names given to its delta attention: cu_seq_lens_k cu_seq_lens_q
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 2>/dev/null
cat >"$folder/try.py" <<'PY'
import torch
from transformers import KimiLinearConfig, KimiLinearForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.models.kimi_linear import modeling_kimi_linear as kimi

common = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
kinds = dict(layer_types=["linear_attention", "full_attention"])
experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
qwen = dict(num_key_value_heads=1, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=2)
qwen |= dict(linear_key_head_dim=16, linear_value_head_dim=16)
latent = dict(kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, num_key_value_heads=2, head_dim=16)
latent |= dict(num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1, topk_group=1, pad_token_id=None)


def second(model, first):
    """Return the logits of ids 20 to 29, packed behind `first`, with their bounds handed over."""
    ids = torch.cat([first, torch.arange(20, 30)])[None]
    bounds = torch.tensor([0, len(first), ids.shape[1]], dtype=torch.int32)
    positions = torch.cat([torch.arange(len(first)), torch.arange(10)])[None]
    with torch.no_grad():
        packed = dict(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=10, max_length_k=10)
        logits = model(ids, position_ids=positions, use_cache=False, **packed).logits
    return logits[0, len(first) :]


names = set()
delta = kimi.chunk_kimi_delta_attention


def noted(*args, **kwargs):
    names.update(name for name in kwargs if name.startswith("cu_"))
    return delta(*args, **kwargs)


kimi.chunk_kimi_delta_attention = noted
torch.manual_seed(0)
models = {
    "Qwen3-Next": Qwen3NextForCausalLM(Qwen3NextConfig(**common, **kinds, **experts, **qwen)),
    "Kimi Linear": KimiLinearForCausalLM(KimiLinearConfig(**common, **kinds, **latent)),
}
for name, model in models.items():
    model.eval()
    try:
        gap = float((second(model, torch.arange(1, 11)) - second(model, torch.arange(11, 1, -1))).abs().max())
        print(f"{name}: logits of the second sequence {'change' if gap > 1e-6 else 'do not change'} with the first")
    except ValueError:
        print(f"{name}: refused, ValueError")
print("Kimi Linear, names given to its delta attention:", *sorted(names))
PY
seen=$("$folder/venv/bin/python" "$folder/try.py" 2>/dev/null)
echo "$seen"
[[ $seen == "Qwen3-Next: refused, ValueError
Kimi Linear: logits of the second sequence change with the first
Kimi Linear, names given to its delta attention: cu_seq_lens_k cu_seq_lens_q" ]]
