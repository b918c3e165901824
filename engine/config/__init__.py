"""Read and check a run's TOML file; decide what may change when a run is resumed."""

from mgrpo.engine.config.schema import (
    AgentConfig,
    AlgorithmConfig,
    CheckpointConfig,
    ComputeConfig,
    Config,
    EnvironmentConfig,
    EvalConfig,
    RewardConfig,
    SamplingConfig,
    StoreConfig,
    VLLMConfig,
    WarmupConfig,
    load_config,
    parse_config,
)

__all__ = [
    "AgentConfig",
    "AlgorithmConfig",
    "CheckpointConfig",
    "ComputeConfig",
    "Config",
    "EnvironmentConfig",
    "EvalConfig",
    "RewardConfig",
    "SamplingConfig",
    "StoreConfig",
    "VLLMConfig",
    "WarmupConfig",
    "load_config",
    "parse_config",
]
