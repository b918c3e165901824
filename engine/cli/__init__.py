"""The `mgrpo` command: train, check, evaluate, report and look into a run's store."""
