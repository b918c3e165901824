"""In hybrids with attention and a state-space mixer in every layer, the mixer's state runs into the next sequence.

The check at loading sees attention in each layer of Falcon-H1 and Zamba2 and lets them pass; in a packed row the state
then leaks from one sequence into the next.
"""

from transformers import FalconH1Config, FalconH1ForCausalLM, Zamba2Config, Zamba2ForCausalLM

from reproduction.models import EAGER, SIZES, judge

falcon = FalconH1Config(
    **SIZES,
    head_dim=8,
    mamba_d_ssm=32,
    mamba_n_heads=4,
    mamba_d_head=8,
    mamba_d_state=8,
    mamba_n_groups=1,
    mamba_chunk_size=16,
    lm_head_multiplier=1.0,
)
zamba = Zamba2Config(
    **SIZES | {"num_key_value_heads": 4},
    mamba_ngroups=1,
    n_mamba_heads=4,
    mamba_d_state=8,
    mamba_headdim=16,
    chunk_size=16,
    num_mem_blocks=1,
    layers_block_type=["hybrid", "hybrid"],
)
judge([FalconH1ForCausalLM._from_config(falcon, **EAGER), Zamba2ForCausalLM._from_config(zamba, **EAGER)])
