"""Predict how a decoupled run would go on a given number of GPUs, without running it."""
