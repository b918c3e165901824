"""Load a causal LM and make it run on packed batches: attention, sharding, checks at start."""
