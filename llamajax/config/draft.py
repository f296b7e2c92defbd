"""The ConfigDict that a config file fills in: every section and key there, defaults set.

It is unlocked and not type-safe on purpose: ml-collections would stop at the first misspelt or
mistyped key, while `load.py` names them all at once.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import RequiredValueError

from llamajax.config.keys import NOT_SET, default_of, sections


class Draft(ConfigDict):
    """A ConfigDict in which a misspelt section (`config.trian.steps = 3`) is kept, to be reported.

    Reading an absent attribute makes an empty section instead of ending the user's file there.
    """

    def __getattr__(self, attribute: str) -> Any:
        if attribute not in self and not attribute.startswith("_"):
            self[attribute] = ConfigDict(type_safe=False)
        return super().__getattr__(attribute)


def new_config() -> ConfigDict:
    """A whole run with every default filled in and NOT_SET at each required key."""
    config = Draft(type_safe=False)
    for section, cls in sections().items():
        values = {field.name: default_of(field) for field in dataclasses.fields(cls)}
        config[section] = ConfigDict(values, type_safe=False)
    return config


class Uncomputable:
    """A value that the file derives from others (`get_ref`) in a way that fails."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __repr__(self) -> str:
        return f"cannot be computed from other keys: {self.error}"


def plain(config: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    """The nested dict of a ConfigDict, references resolved; unset ones become NOT_SET."""
    tree = {}
    for name in config:
        try:
            value = config[name]
        except RequiredValueError:
            value = NOT_SET
        except (ArithmeticError, TypeError, ValueError) as error:
            value = Uncomputable(error)
        tree[name] = plain(value) if isinstance(value, ConfigDict | Mapping) else value
    return tree
