"""Evaluate weights of any origin: checkpoints, models of a directory or a hub, servers; one arm or several compared."""
