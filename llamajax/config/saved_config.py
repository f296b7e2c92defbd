"""A resolved run as JSON (`DIR/config.json`) and back, and what differs between two runs."""

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from llamajax.config.keys import REMOVED, all_keys, leaves
from llamajax.config.load import build
from llamajax.config.presets import PRESETS
from llamajax.config.schema import RunConfig
from llamajax.config.stages import config_of_step
from llamajax.config.values import show
from llamajax.errors import combine

# Keys in which the processes of one run may differ, and why.
PER_PROCESS = {
    "data.num_threads": "changes speed only",
    "data.prefetch_batches": "changes speed only",
    "backend.plugin": "each host may keep the library elsewhere",
    "backend.options": "may name this process's own devices",
    "backend.coordinator_address": "one host has several names; the processes meet, or end",
    "backend.num_processes": "compared when they meet; a scheduler's variables also give it",
    "backend.process_id": "each process has its own",
    "backend.timeout_s": "changes waiting only",
    "backend.device_table": "each host may keep the file elsewhere; changes the logged MFU only",
    "backend.compile_cache": "each host may have its own folder",
    "monitoring.sinks": "process 0 alone writes",
    "monitoring.progress": "process 0 alone shows it",
    "monitoring.dump_hlo": "process 0 alone writes",
}

# Keys that say how one start begins, and nothing about the run.
ONCE = ("train.resume_step", "train.restart")


def to_json_dict(run: RunConfig) -> dict[str, Any]:
    """Return the run as nested dicts of JSON values, with every key."""
    return json.loads(json.dumps(dataclasses.asdict(run), allow_nan=False))


def read_saved_config(workdir: Path) -> dict[str, Any]:
    """Return the config that a run left in `workdir/config.json`; {} if it cannot be read."""
    try:
        found = json.loads((workdir / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def from_json_dict(tree: Mapping[str, Any], *, source: str = "config.json") -> RunConfig:
    """Return the run that `to_json_dict` wrote; a key added since then takes its default.

    Raises:
        UserError: unknown, mistyped or missing keys, all of them; `source` names the file.
    """
    kept = {
        name: {key: value for key, value in section.items() if f"{name}.{key}" not in REMOVED}
        if isinstance(section, Mapping)
        else section
        for name, section in tree.items()
    }
    run, problems = build(kept)
    if run is None:
        raise combine(problems, title=f"{source} is not the record of a run of this version:")
    return run


def record_of_step(tree: Mapping[str, Any], step: int) -> Mapping[str, Any]:
    """Return the record of a run's config as it was at update `step`; itself without stages."""
    if not (tree.get("data") or {}).get("stages"):
        return tree
    return to_json_dict(config_of_step(from_json_dict(tree), step))


def diff(old: RunConfig, new: RunConfig) -> dict[str, tuple[str, str]]:
    """Return the old and the new value, as written on the command line, of each key that differs.

    By path, in the schema's order; only the deepest paths, and none of ONCE.
    """
    before, after = leaves(old), leaves(new)
    changed = [path for path in all_keys() if path not in ONCE and before[path] != after[path]]
    return {
        path: (show(before[path]), show(after[path]))
        for path in changed
        if not any(p.startswith(f"{path}.") for p in changed)
    }


def origins(run: RunConfig, overrides: Collection[str]) -> Iterator[tuple[str, str, str]]:
    """Yield path, value as written on the command line, and origin of each value.

    overrides: paths that the command line gives. A value of the file that is the default counts as
    the default.
    """
    published = PRESETS.get(run.model.name)
    values = leaves(run)
    preset = {} if published is None else leaves(dataclasses.replace(run, model=published))
    for path, key in all_keys().items():
        section = path.rpartition(".")[0]
        if dataclasses.is_dataclass(values[path]) or values.get(section, run) is None:
            continue  # its keys follow; or a key of a section that is none
        origin = "config file"
        if path in overrides:
            origin = "command line"
        elif values[path] == key.default:
            origin = "default"
        elif path.startswith("model.") and values[path] == preset.get(path):
            origin = f"preset {run.model.name}"
        yield path, show(values[path]), origin


def common_values(run: RunConfig) -> dict[str, str]:
    """Return the values, by path, that all processes of a run must have in common."""
    values = {path: show(value) for path, value in leaves(run).items()}
    return {path: value for path, value in values.items() if path not in PER_PROCESS}
