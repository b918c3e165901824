"""Turn scored rollouts into micro-batches: rewards, alignment, advantages, loss weights, packing."""
