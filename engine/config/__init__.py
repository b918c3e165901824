"""Read and check a run's TOML file; decide what may change when a run is resumed."""
