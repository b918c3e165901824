#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0, Python 3.11. Seen 2026-11-30.
#
# A Mamba-2 layer of Nemotron-H bounds its time step from below by `time_step_min` when it reads several tokens, but not
# when it reads one token with a cache: there the step goes to `selective_state_update`, which knows no bound. So
# `generate` samples from another distribution than the one that a forward over the same tokens, such as a trainer's,
# computes. With the bound at 0 the two agree. Log-probs that are recorded while decoding are then off wherever a step
# falls below the bound, which is 0.001 by default. Bamba, which has the same layer and no such bound, agrees.
#
# Output seen:
#   time_step_min 0.0: decoding agrees with the forward
#   time_step_min 0.1: decoding differs from the forward
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 2>/dev/null
cat >"$folder/try.py" <<'PY'
import torch
from transformers import NemotronHConfig, NemotronHForCausalLM

sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
mamba = dict(mamba_num_heads=4, mamba_head_dim=16, n_groups=1, ssm_state_size=8, chunk_size=16)
for least in (0.0, 0.1):
    torch.manual_seed(0)
    kinds = ["linear_attention", "full_attention"]
    model = NemotronHForCausalLM(NemotronHConfig(**sizes, **mamba, layers_block_type=kinds, time_step_min=0.001)).eval()
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (least, float("inf"))
    with torch.no_grad():  # as drawn at first, the layer hardly matters
        for param in model.parameters():
            param.copy_(torch.randn_like(param) * 0.25 if param.ndim > 1 else param + 0.1 * torch.randn_like(param))
    ids = torch.randint(1, 64, (1, 24))
    with torch.no_grad():
        truth = model(ids, use_cache=False).logits[0, -1].log_softmax(-1)
        cache = model(ids[:, :8], use_cache=True)
        for i in range(8, 24):
            cache = model(ids[:, i : i + 1], cache=cache.cache, use_cache=True)
        found = cache.logits[0, -1].log_softmax(-1)
    gap = float((found - truth).abs().max())
    print(f"time_step_min {least}: decoding {'agrees with' if gap < 1e-4 else 'differs from'} the forward")
PY
seen=$("$folder/venv/bin/python" "$folder/try.py" 2>/dev/null)
echo "$seen"
[[ $seen == "time_step_min 0.0: decoding agrees with the forward
time_step_min 0.1: decoding differs from the forward" ]]
