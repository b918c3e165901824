"""Run our loss, packing and advantages inside TRL, transformers' Trainer and verl; import their recorded rollouts."""
