"""Configuration, floor 0, free of jax: what a run is, how it is given, what is wrong with it."""

from llamajax.config.commandline import parse_command_line, parse_weights_command
from llamajax.config.draft import new_config
from llamajax.config.flags import (
    BACKEND_FLAGS,
    CHECKPOINT,
    DTYPE,
    MACHINE_FLAGS,
    WORKDIR,
    Flag,
    backend_config,
    mesh_config,
)
from llamajax.config.help import help_text
from llamajax.config.load import freeze, load
from llamajax.config.nearest import did_you_mean, nearest
from llamajax.config.presets import PRESETS, preset
from llamajax.config.saved_config import common_values, diff, from_json_dict, to_json_dict
from llamajax.config.schema import (
    BackendConfig,
    CheckpointConfig,
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    MonitoringConfig,
    OptimConfig,
    RopeScaling,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "BACKEND_FLAGS",
    "CHECKPOINT",
    "DTYPE",
    "MACHINE_FLAGS",
    "PRESETS",
    "WORKDIR",
    "BackendConfig",
    "CheckpointConfig",
    "DataConfig",
    "Flag",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "MonitoringConfig",
    "OptimConfig",
    "RopeScaling",
    "RunConfig",
    "TrainConfig",
    "backend_config",
    "common_values",
    "did_you_mean",
    "diff",
    "freeze",
    "from_json_dict",
    "help_text",
    "load",
    "mesh_config",
    "nearest",
    "new_config",
    "parse_command_line",
    "parse_weights_command",
    "preset",
    "to_json_dict",
]
