"""In a packed row, short sequences get the rotary frequencies of the longest sequence beside them.

That concerns positions whose frequencies follow the longest sequence of a forward: longrope, as in Phi-3.5 and
Phi-4-mini, and dynamic NTK.
"""

from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from reproduction.models import EAGER, SIZES, judge

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "long_factor": [4.0] * 4,
    "short_factor": [1.0] * 4,
    "original_max_position_embeddings": 16,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
phi = Phi3Config(**SIZES, original_max_position_embeddings=16, rope_parameters=LONGROPE)
llama = LlamaConfig(**SIZES | {"max_position_embeddings": 16}, rope_parameters=DYNAMIC)
judge([Phi3ForCausalLM._from_config(phi, **EAGER), LlamaForCausalLM._from_config(llama, **EAGER)])
