"""From a config file and overrides to a frozen run, every problem reported at once."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from llamajax.config.check import check
from llamajax.config.keys import (
    all_keys,
    key_hint,
    listed_class,
    nearest_key,
    nested_class,
    own_keys,
    sections,
)
from llamajax.config.schema import ModelConfig, RunConfig
from llamajax.config.stages import stage_problems
from llamajax.config.values import NOT_SET, Key, Mistyped, coerce, show
from llamajax.errors import UserError, combine, did_you_mean, nearest

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def load(path_arg: str, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Return the run of FILE.py[:ARG] with overrides by path: `{"train.steps": "1e3"}`.

    A text is parsed as on the command line; any other value is taken as it is.

    Raises:
        UserError: names every problem of the file and of the overrides.
    """
    return _valid(*resolve(path_arg, overrides or {}), source=path_arg)


def freeze(config: "ConfigDict | Mapping", *, source: str = "config") -> RunConfig:
    """Return the run that a ConfigDict or nested dicts made in Python describe.

    Raises:
        UserError: names every problem.
    """
    if not isinstance(config, Mapping):
        from llamajax.config.config_file import values_of

        config = values_of(config)
    return _valid(*build(config), source=source)


def _valid(run: RunConfig | None, problems: list[str], *, source: str) -> RunConfig:
    if run is None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise combine(problems, title=f"{count} in {source}:")
    return run


def resolve(
    path_arg: str, overrides: Mapping[str, Any], *, flag: str = ""
) -> tuple[RunConfig | None, list[str]]:
    """Return the run and no problems, or None and every problem.

    `flag` is written before the path of an override. Overrides are applied before references are
    resolved: what the file derives from another value (`config.train.get_ref("steps") // 10`)
    follows an override of that value.
    """
    from llamajax.config.config_file import read_file, set_value, values_of

    values: dict[str, Any] = {}
    problems = []
    for path, given in overrides.items():
        key = all_keys().get(path)
        if key is None:
            problems.append(_unknown_override(path, flag=flag))
            continue
        try:
            is_text = isinstance(given, str)
            values[path] = key.parse(given) if is_text else coerce(given, key.annotation)
        except Mistyped as error:
            problems.append(f"{flag}{path}={given}: {error}")
    try:
        config = read_file(path_arg)
    except UserError as error:
        return None, [str(error), *problems]
    with config.ignore_type():
        for path, value in values.items():
            set_value(config, path, value)
    run, found = build(values_of(config), reported=set(overrides) - set(values))
    return (None if problems else run), [*found, *problems]


def _unknown_override(path: str, *, flag: str) -> str:
    if path in sections():
        first = next(key for key in all_keys() if key.startswith(f"{path}."))
        return f"{flag}{path}: names a section; set one of its keys, e.g. {flag}{first}"
    return f"{flag}{path}: unknown key{key_hint(path, flag)}"


def build(tree: Mapping, *, reported: Collection[str] = ()) -> tuple[RunConfig | None, list[str]]:
    """Return the run that nested values describe and no problems, or None and every problem.

    `reported` are paths whose problem the caller has reported already (a mistyped flag): they are
    not reported again as missing. Constraints between keys are checked among the valid ones.
    """
    reader = _Reader(reported)
    found = {
        name: reader.section(name, cls, tree.get(name, {})) for name, cls in sections().items()
    }
    reader.problems += [_unknown(name) for name in tree if name not in found]
    problems = reader.problems + check(reader.values)
    if problems or reported:
        return None, problems
    run = RunConfig(**found)
    problems = list(stage_problems(run))
    return (None if problems else run), problems


def build_model(tree: Mapping) -> tuple[ModelConfig | None, list[str]]:
    """Return the architecture of nested values and no problems, or None and every problem."""
    reader = _Reader()
    model = reader.section("model", ModelConfig, tree)
    problems = reader.problems + check(reader.values)
    return (None if problems else model), problems


def build_list(path: str, cls: type, items: list) -> tuple[list, list[str]]:
    """Return an instance of `cls` for each of these mappings, and every problem, as of `path`."""
    reader = _Reader()
    found = [reader.section(f"{path}[{i}]", cls, item) for i, item in enumerate(items)]
    return found, reader.problems


class _Reader:
    """Turn nested values into dataclasses; collect the valid values by path, and every problem."""

    def __init__(self, reported: Collection[str] = ()) -> None:
        self.values: dict[str, Any] = {}
        self.problems: list[str] = []
        self._reported = reported

    def section(self, path: str, cls: type, tree: Any) -> Any:
        """Return an instance of `cls`, or NOT_SET after adding to the problems."""
        if not isinstance(tree, Mapping):
            self.problems.append(f"{path}: a section with keys, got {tree!r}")
            return NOT_SET
        keys = own_keys(cls, f"{path}.")
        self.problems += [_unknown(f"{path}.{name}", keys) for name in tree if name not in keys]
        found = {name: self._value(key, tree, name) for name, key in keys.items()}
        return NOT_SET if NOT_SET in found.values() else cls(**found)

    def _value(self, key: Key, tree: Mapping, name: str) -> Any:
        """Return the valid value of a key, or NOT_SET after adding to the problems."""
        if key.path in self._reported:
            return NOT_SET  # no rule is checked against the value that the flag was to replace
        inner = nested_class(key.annotation)
        try:
            raw = tree.get(name, key.default)
            if isinstance(raw, Mistyped):
                raise raw
            if inner and isinstance(raw, Mapping):
                value = self.section(key.path, inner, raw)
            elif (item := listed_class(key.annotation)) and isinstance(raw, list | tuple):
                value = tuple(self.section(f"{key.path}[{i}]", item, x) for i, x in enumerate(raw))
                value = NOT_SET if NOT_SET in value else value
            elif raw is not NOT_SET:
                value = coerce(raw, key.annotation)
            else:
                raise Mistyped(f"not set ({key.type_words}: {key.doc})")
        except Mistyped as error:
            self.problems.append(f"{key.path}: {error}")
            return NOT_SET
        if value is NOT_SET:
            return NOT_SET
        if problem := key.problem_with(value):
            self.problems.append(f"{key.path} = {show(value)}: {problem}")
            return NOT_SET
        self.values[key.path] = value
        return value


def _unknown(path: str, known: Collection[str] = ()) -> str:
    """Return the problem of a key (or, at the top, a section) that does not exist.

    known: the keys beside it, where it is none of a section.
    """
    if "]." in path:
        hint = nearest(path.rpartition(".")[2], known) or f"one of {', '.join(known)}"
        return f"{path}: unknown key{did_you_mean(hint)}"
    section = None if "." in path else nearest(path, sections())
    if "." in path or (nearest_key(path) and not section):
        return f"{path}: unknown key{key_hint(path)}"
    hint = section or f"one of {', '.join(sections())}"
    return f"{path}: unknown section{did_you_mean(hint)}"
