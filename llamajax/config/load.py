"""From a config file and overrides to a frozen run, every problem reported at once."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from llamajax.config.build import build
from llamajax.config.draft import plain
from llamajax.config.file import read_file
from llamajax.config.keys import all_keys, sections
from llamajax.config.nearest import did_you_mean, nearest, nearest_key
from llamajax.config.schema import RunConfig
from llamajax.config.values import Mistyped, coerce, parse
from llamajax.errors import UserError, combine


def load(path_arg: str, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """The run of FILE.py[:ARG] with overrides by path: `{"train.steps": "1e3"}`.

    A text is parsed as on the command line; any other value is taken as it is.

    Raises:
        UserError: names every problem of the file and of the overrides.
    """
    run, problems = resolve(path_arg, overrides or {}, flag="")
    if run is None:
        raise combine(problems, title=f"{_count(problems)} in {path_arg}:")
    return run


def freeze(config: ConfigDict, *, source: str = "config") -> RunConfig:
    """The run that a ConfigDict made in Python describes.

    Raises:
        UserError: names every problem.
    """
    run, problems = build(plain(config))
    if run is None:
        raise combine(problems, title=f"{_count(problems)} in {source}:")
    return run


def resolve(
    path_arg: str, overrides: Mapping[str, Any], *, flag: str
) -> tuple[RunConfig | None, list[str]]:
    """The run and no problems, or None and every problem; `flag` goes before an override's path.

    Overrides are applied before references are resolved, so a value that the file derives from
    another one (`config.train.get_ref("steps") // 10`) follows an override of it.
    """
    values, problems = _convert(overrides, flag=flag)
    try:
        config = read_file(path_arg)
    except UserError as error:
        return None, [str(error), *problems]
    with config.ignore_type():
        for path, value in values.items():
            _put(config, path, value)
    run, found = build(plain(config), known_bad=frozenset(overrides) - frozenset(values))
    return (None if problems else run), [*found, *problems]


def _convert(overrides: Mapping[str, Any], *, flag: str) -> tuple[dict[str, Any], list[str]]:
    """The overrides as values of their declared types, and the problems with the others."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    for path, given in overrides.items():
        if path not in all_keys():
            problems.append(_unknown(path, flag=flag))
            continue
        annotation = all_keys()[path].annotation
        try:
            values[path] = (parse if isinstance(given, str) else coerce)(given, annotation)
        except Mistyped as error:
            problems.append(f"{flag}{path}={given}: {error}")
    return values, problems


def _unknown(path: str, *, flag: str) -> str:
    if path in sections():
        first = next(key for key in all_keys() if key.startswith(f"{path}."))
        return f"{flag}{path}: names a section; set one of its keys, e.g. {flag}{first}"
    found = nearest_key(path, all_keys())
    if "." not in path:
        by_name = {key.rpartition(".")[2]: key for key in reversed(all_keys())}
        name = nearest(path, by_name)
        found = by_name[name] if name else found
    return f"{flag}{path}: unknown key{did_you_mean(found and flag + found)}"


def _put(config: ConfigDict, path: str, value: Any) -> None:
    """Set a known path, making the sections on the way; a section that is no section stays."""
    *parents, name = path.split(".")
    for depth, parent in enumerate(parents):
        if parent not in config or (depth > 0 and not isinstance(config[parent], ConfigDict)):
            config[parent] = ConfigDict(type_safe=False)
        config = config[parent]
        if not isinstance(config, ConfigDict):
            return
    config[name] = value


def _count(problems: list[str]) -> str:
    return "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
