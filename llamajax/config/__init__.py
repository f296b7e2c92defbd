"""Configuration, free of jax: what a run is, how it is given, what is wrong with it.

In the order of what happens: `values`, `forms`, `schema` with the `*_schema` of its sections,
`keys` and `presets` declare; `config_file` runs the user's file; `load` applies overrides and
freezes it, after `check` and `stages`; `flags` and `command_line` do the same for a verb's flags;
`saved_config` writes and reads `config.json`. Only what works on a ConfigDict (`new_config`,
`preset`, `freeze`, `load`) imports ml-collections.
"""

from typing import Any

from llamajax.config.command_line import parse_command_line
from llamajax.config.flags import (
    BackendFlags,
    Flags,
    MachineFlags,
    RunFlags,
    TrainFlags,
    WeightsFlags,
    mesh_config,
)
from llamajax.config.forms import parse_address, parse_fork
from llamajax.config.load import build_model, freeze, load
from llamajax.config.presets import PRESETS, find_preset, preset
from llamajax.config.saved_config import common_values, diff, from_json_dict, to_json_dict
from llamajax.config.schema import BackendConfig, MeshConfig, ModelConfig, RunConfig
from llamajax.config.stages import stage_named, stages_of
from llamajax.config.values import Mistyped, key


def __getattr__(name: str) -> Any:
    if name != "new_config":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llamajax.config.config_file import new_config

    return new_config
