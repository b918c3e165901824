"""Sample turns from an agent's weights: the sampler protocol, the in-process sampler, its KV cache."""
