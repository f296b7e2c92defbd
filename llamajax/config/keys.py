"""Tables of what dataclasses declare: all config keys by path, and the flags of a verb by name."""

import dataclasses
import functools
import typing
from typing import Any

from llamajax.config.schema import RunConfig
from llamajax.config.values import NOT_SET, Key, split_optional
from llamajax.errors import did_you_mean, nearest


def nested_class(annotation: Any) -> type | None:
    """Return the dataclass of an annotation (`RopeScaling | None` -> RopeScaling), or None."""
    inner, _ = split_optional(annotation)
    return inner if dataclasses.is_dataclass(inner) else None


def listed_class(annotation: Any) -> type | None:
    """Return the dataclass of a list's items (`tuple[DataStage, ...]` -> DataStage), or None."""
    items = typing.get_args(annotation)[:1] if typing.get_origin(annotation) is tuple else ()
    return next(filter(dataclasses.is_dataclass, items), None)


@functools.cache
def own_keys(cls: type, prefix: str = "") -> dict[str, Key]:
    """Return the keys that a dataclass declares, by field name; `prefix` begins their paths.

    The trailing underscore of a field named like a Python keyword is no part of the path.
    """
    hints = typing.get_type_hints(cls)
    return {
        field.name: Key(
            path=prefix + field.name.removesuffix("_"),
            annotation=hints[field.name],
            default=NOT_SET if field.default is dataclasses.MISSING else field.default,
            **field.metadata,
        )
        for field in dataclasses.fields(cls)
        if field.metadata
    }


@functools.cache
def sections() -> dict[str, type]:
    """Return the sections of a run: name to dataclass, in the schema's order."""
    hints = typing.get_type_hints(RunConfig)
    return {field.name: hints[field.name] for field in dataclasses.fields(RunConfig)}


@functools.cache
def all_keys() -> dict[str, Key]:
    """Return every key of the schema by path, in its order; a nested class before its own keys."""
    table: dict[str, Key] = {}
    for section, cls in sections().items():
        for key in own_keys(cls, f"{section}.").values():
            table[key.path] = key
            if inner := nested_class(key.annotation):
                table |= {
                    nested.path: nested for nested in own_keys(inner, f"{key.path}.").values()
                }
    return table


def leaves(run: RunConfig) -> dict[str, Any]:
    """Return every value of a run by path; a nested optional dataclass also under its own path."""
    values: dict[str, Any] = {}
    for path in all_keys():
        value: Any = run
        for name in path.split("."):
            value = getattr(value, name, None)
        values[path] = value
    return values


# Names that other systems have for a key.
_ELSEWHERE = {
    "lr": "optim.learning_rate", "wd": "optim.weight_decay", "max_grad_norm": "optim.clip_norm",
    "grad_clip": "optim.clip_norm", "batch_size": "data.global_batch_size",
    "block_size": "data.seq_len", "context_length": "data.seq_len", "max_seq_len": "data.seq_len",
    "max_steps": "train.steps", "num_steps": "train.steps", "epochs": "train.steps",
    "max_iters": "train.steps", "grad_accum": "train.accumulation_steps",
    "gradient_accumulation_steps": "train.accumulation_steps", "precision": "train.dtype",
    "dp": "mesh.data", "tp": "mesh.tensor", "pp": "mesh.stage", "cp": "mesh.sequence",
    "wandb": "monitoring.sinks", "tensorboard": "monitoring.sinks",
    "rope_type": "model.rope_scaling.type",
    "original_max_position_embeddings": "model.rope_scaling.original_max_seq_len",
}  # fmt: skip


# What replaces a key that is no more; {} begins a key on the command line. Saved configs have it.
REMOVED = {
    "monitoring.tensorboard": "; false is now {}monitoring.sinks=jsonl, and true "
    "{}monitoring.sinks=tensorboard, the default"
}


def key_hint(path: str, prefix: str = "") -> str:
    """Return a clause on what replaces an unknown key, or which one was probably meant.

    prefix: before each key that is named.
    """
    if path in REMOVED:
        return REMOVED[path].replace("{}", prefix)
    found = nearest_key(path)
    return did_you_mean(found and prefix + found)


def nearest_key(path: str) -> str | None:
    """Return the key most like `path`: in the same section, else of the same name in another."""
    paths = list(all_keys())
    section, _, name = path.rpartition(".")
    if name in _ELSEWHERE and f"{section}.{name}" not in paths:
        return _ELSEWHERE[name]
    by_name = {p.rpartition(".")[2]: p for p in reversed(paths) if p.startswith(f"{section}.")}
    if not section:
        by_name = {p.rpartition(".")[2]: p for p in reversed(paths)}
    if found := nearest(name, by_name):
        return by_name[found]
    if same := [p for p in paths if p.rpartition(".")[2] == name]:
        return nearest(path, same) or same[0]
    # Paths of one section are alike by their prefix alone, so ask for more.
    return nearest(path, paths, cutoff=0.8)
