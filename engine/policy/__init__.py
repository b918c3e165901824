"""Hold one agent's weights and optimizer: forward and backward passes, steps, checkpoints."""
