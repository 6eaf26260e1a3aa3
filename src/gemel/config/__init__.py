"""What a run is: frozen, typed, plain data. No torch here."""

from gemel.config.base import Config
from gemel.config.engine import Batching, ContinuousBatching, DynamicBatching, EngineConfig, StaticBatching
from gemel.config.errors import CapacityError, CheckpointError, ConfigError, GemelError, RequestError, UnsupportedError
from gemel.config.model import ModelConfig
from gemel.config.sampling import SamplingParams

__all__ = [
    "Batching",
    "CapacityError",
    "CheckpointError",
    "Config",
    "ConfigError",
    "ContinuousBatching",
    "DynamicBatching",
    "EngineConfig",
    "GemelError",
    "ModelConfig",
    "RequestError",
    "SamplingParams",
    "StaticBatching",
    "UnsupportedError",
]
