"""From a nested dict to the frozen dataclasses of a run, collecting every problem on the way."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llamajax.config.check import check
from llamajax.config.draft import Uncomputable
from llamajax.config.keys import NOT_SET, all_keys, annotations, default_of, nested_class
from llamajax.config.nearest import did_you_mean, nearest, nearest_key
from llamajax.config.schema import ModelConfig, RunConfig
from llamajax.config.values import Mistyped, coerce, describe

_INVALID = object()


@dataclasses.dataclass
class _Reading:
    """What was found so far: valid values by path, problems, and paths already complained about."""

    known_bad: frozenset[str]
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)


def build(
    tree: Mapping[str, Any], *, known_bad: frozenset[str] = frozenset()
) -> tuple[RunConfig | None, list[str]]:
    """The run that a nested dict describes and no problems, or None and every problem.

    `known_bad` are paths whose problem the caller has already reported (a mistyped flag): they
    are not reported again as missing. Relations between keys are checked among the valid ones.
    """
    reading = _Reading(known_bad)
    run = _read(RunConfig, tree, prefix="", reading=reading)
    problems = reading.problems + check(reading.values)
    if problems or known_bad:
        return None, problems
    return run, []


def build_model(tree: Mapping[str, Any]) -> tuple[ModelConfig | None, list[str]]:
    """The architecture that a nested dict describes and no problems, or None and every problem."""
    reading = _Reading(frozenset())
    model = _read(ModelConfig, tree, prefix="model.", reading=reading)
    problems = reading.problems + check(reading.values)
    return (None, problems) if problems else (model, [])


def _read(cls: type, tree: Mapping[str, Any], *, prefix: str, reading: _Reading) -> Any:
    """An instance of `cls`, or _INVALID after adding to the problems."""
    types = annotations(cls)
    for name in tree:
        if name not in types:
            reading.problems.append(_unknown(f"{prefix}{name}", tree[name]))
    found = {}
    for field in dataclasses.fields(cls):
        path = prefix + field.name
        raw = tree.get(field.name, NOT_SET)
        if raw is NOT_SET:
            raw = {} if cls is RunConfig else default_of(field)
        found[field.name] = _read_one(raw, types[field.name], path=path, reading=reading)
    if any(value is _INVALID for value in found.values()):
        return _INVALID
    return cls(**found)


def _read_one(raw: Any, annotation: Any, *, path: str, reading: _Reading) -> Any:
    inner = nested_class(annotation)
    if inner and isinstance(raw, Mapping):
        value = _read(inner, raw, prefix=f"{path}.", reading=reading)
    elif inner and "." not in path:
        reading.problems.append(f"{path}: a section with keys, got {raw!r}")
        value = _INVALID
    elif raw is NOT_SET:
        value = _INVALID
        if path not in reading.known_bad:
            key = all_keys()[path]
            reading.problems.append(f"{path}: not set ({describe(annotation)}: {key.doc})")
    elif isinstance(raw, Uncomputable):
        reading.problems.append(f"{path}: {raw!r}")
        value = _INVALID
    else:
        try:
            value = coerce(raw, annotation)
        except Mistyped as error:
            reading.problems.append(f"{path}: {error}")
            value = _INVALID
    if value is not _INVALID:
        reading.values[path] = value
    return value


def _unknown(path: str, value: Any) -> str:
    """The problem of a key (or, at the top, a section) that does not exist."""
    known = list(all_keys())
    if "." in path:
        return f"{path}: unknown key{did_you_mean(nearest_key(path, known))}"
    names = list(annotations(RunConfig))
    by_name = {key.rpartition(".")[2]: key for key in reversed(known)}
    section, name = nearest(path, names), nearest(path, by_name)
    if name and not section and not isinstance(value, Mapping):
        return f"{path}: unknown key{did_you_mean(by_name[name])}"
    hint = section or f"one of {', '.join(names)}"
    return f"{path}: unknown section{did_you_mean(hint)}"
