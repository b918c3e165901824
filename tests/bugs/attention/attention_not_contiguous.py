"""Policy.of ends in a RuntimeError about strides for some models that would otherwise be right.

The attention that the engine registers returns a transposed view on a CPU. transformers' own return contiguous
tensors, and some models call .view() on them (AFMoE, JetMoE, Dory). Accepted, or refused by a ValueError, is right.
"""

from transformers import AfmoeConfig, AfmoeForCausalLM, JetMoeConfig, JetMoeForCausalLM

from mgrpo.engine import Policy
from reproduction import fault, held
from reproduction.models import SIZES, llama

experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
jet = {key: value for key, value in SIZES.items() if key != "num_attention_heads"}
MODELS = (
    AfmoeForCausalLM(AfmoeConfig(**SIZES, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)),
    JetMoeForCausalLM(JetMoeConfig(**jet, kv_channels=8, **experts)),
)
Policy.of(llama())  # raises nothing: a healthy model
bad = []
for model in MODELS:
    name = type(model).__name__
    try:
        Policy.of(model.eval())
        print(name, "accepted")
    except ValueError as error:
        print(name, "refused:", error)
    except RuntimeError as error:
        bad.append(f"{name}: RuntimeError: {error}")
if bad:
    fault("; ".join(bad))
held("accepted, or refused by a ValueError")
