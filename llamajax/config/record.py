"""A resolved run as JSON (`DIR/config.json`) and back, and what differs between two runs."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llamajax.config.build import build
from llamajax.config.keys import all_keys
from llamajax.config.schema import RunConfig
from llamajax.errors import combine


def to_json_dict(run: RunConfig) -> dict[str, Any]:
    """The run as nested dicts of JSON values, every key written out."""
    return _jsonable(dataclasses.asdict(run))


def from_json_dict(tree: Mapping[str, Any], *, source: str = "config.json") -> RunConfig:
    """The run that `to_json_dict` wrote; a key added since then takes its default.

    Raises:
        UserError: unknown, mistyped or missing keys, all of them; `source` names the file.
    """
    run, problems = build(tree)
    if run is None:
        raise combine(problems, title=f"{source} is not the record of a run of this version:")
    return run


def diff(old: RunConfig, new: RunConfig) -> list[str]:
    """The paths whose values differ, in the schema's order; only the deepest ones."""
    before, after = _leaves(old), _leaves(new)
    changed = [path for path in all_keys() if before.get(path) != after.get(path)]
    return [path for path in changed if not any(p.startswith(f"{path}.") for p in changed)]


def _leaves(run: RunConfig) -> dict[str, Any]:
    """Every value by its path; a nested optional dataclass also under its own path."""
    values: dict[str, Any] = {}
    for path in all_keys():
        value: Any = run
        for name in path.split("."):
            value = getattr(value, name, None)
        values[path] = value
    return values


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    return [_jsonable(item) for item in value] if isinstance(value, list | tuple) else value
