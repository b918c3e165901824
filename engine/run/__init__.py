"""Own a run's files: the run directory with its lock and checkpoints, metrics, trajectories, published weights."""
