"""Config files: the ConfigDict that they fill in, and running `get_config()` or `get_config(arg)`.

A config may import the files beside it, as `import sibling` or `from . import sibling`. Whatever
goes wrong in a file is the user's to fix and becomes one UserError with the file's line. The only
module that imports ml-collections with itself: `doctor` and `benchmarks/` read no config file, and
run where it is not installed.
"""

import contextlib
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FieldReference, FrozenConfigDict
from ml_collections.config_dict import RequiredValueError

from llamajax.config.keys import own_keys, sections
from llamajax.config.user_code import errors_name_the_line, quoted, set_config_folder
from llamajax.config.values import NOT_SET, Mistyped
from llamajax.errors import UserError, did_you_mean, nearest

_CONFIGS = Path(__file__).parents[1] / "configs"
_PACKAGE = "llamajax_run_config"  # of a config and the files beside it


class _NewConfig(ConfigDict):
    """A ConfigDict that keeps a misspelt section (`config.trian.steps = 3`) so it can be reported.

    Reading an absent attribute makes an empty section instead of ending the user's file there.
    """

    def __getattr__(self, attribute: str) -> Any:
        if attribute not in self and not attribute.startswith("_"):
            self[attribute] = ConfigDict(type_safe=False)
        return super().__getattr__(attribute)


def new_config() -> ConfigDict:
    """Return a whole run with every default filled in and NOT_SET at each required key.

    It accepts unknown keys and any type: `load` reports all of them at once.
    """
    config = _NewConfig(type_safe=False)
    for section, cls in sections().items():
        values = {name: key.default for name, key in own_keys(cls).items()}
        config[section] = ConfigDict(values, type_safe=False)
    return config


def set_value(config: ConfigDict, path: str, value: Any) -> None:
    """Set a known path and make the sections on the way; no-op where a section is another value."""
    *parents, name = path.split(".")
    for depth, parent in enumerate(parents):
        if parent not in config or (depth > 0 and not isinstance(config[parent], ConfigDict)):
            config[parent] = ConfigDict(type_safe=False)
        config = config[parent]
        if not isinstance(config, ConfigDict):
            return
    config[name] = value


def values_of(config: ConfigDict) -> dict[str, Any]:
    """Return a config as nested dicts, with references (`get_ref`) computed.

    A required value that is missing is NOT_SET, one that cannot be computed a Mistyped.
    """
    return {name: _value(config, name) for name in config}


def _value(config: ConfigDict, name: str) -> Any:
    try:
        value = config[name]
    except RequiredValueError:
        return NOT_SET
    except (ArithmeticError, TypeError, ValueError) as error:
        return Mistyped(f"cannot be computed from other keys: {error}")
    return _plain(value)


def _plain(value: Any) -> Any:
    """Return a value with its ConfigDicts as dicts, and references computed, also in lists."""
    if isinstance(value, FieldReference):
        value = value.get()
    if isinstance(value, ConfigDict):
        return values_of(value)
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


def packaged_configs() -> dict[str, Path]:
    """Return the files of `configs/`, which are installed with the package, by name."""
    return {path.stem: path for path in sorted(_CONFIGS.glob("[!_]*.py"))}


def read_file(path_arg: str) -> ConfigDict:
    """Return what `get_config` of FILE.py[:ARG] or NAME[:ARG] returns, unlocked.

    Raises:
        UserError: no such file, a syntax error, an exception (with its line), no `get_config`,
            an argument it does not take or lacks, or a result that is not a ConfigDict.
    """
    stem, mark, argument = path_arg.partition(".py:")
    name = f"{stem}.py" if mark else path_arg
    if re.fullmatch(r"[\w-]+(:.*)?", path_arg) and not Path(path_arg).is_file():
        stem, mark, argument = path_arg.partition(":")
        known = packaged_configs()
        if stem not in known:
            hint = did_you_mean(nearest(stem, known)) or "."
            raise UserError(
                f"{path_arg}: is no FILE.py, and no config of llamajax{hint} `llamajax configs` "
                "lists them"
            )
        name = str(known[stem])
    folder = Path(name).absolute().parent
    set_config_folder(folder)
    with _imports_beside(folder):
        return _run_file(name, path_arg, [argument] if mark else [])


def _run_file(name: str, path_arg: str, arguments: list[str]) -> ConfigDict:
    """Return what `get_config(*arguments)` of the file returns, unlocked."""
    get_config = _get_config(name)
    try:
        signature = inspect.signature(get_config)
        signature.bind(*arguments)
    except ValueError:
        raise UserError(f"{name}: get_config must be a function of the file") from None
    except TypeError:
        wanted = f"{name}:{next(iter(signature.parameters), 'arg').upper()}"
        problem = f"needs an argument: --config={wanted}"
        problem = f"takes no argument; drop ':{arguments[0]}'" if arguments else problem
        raise UserError(f"{path_arg}: get_config{signature} {problem}") from None
    with errors_name_the_line(name, Path(name).absolute().parent):
        config = get_config(*arguments)
    if not isinstance(config, ConfigDict):
        hint = "; does it end in `return config`?" if config is None else ""
        raise UserError(
            f"{name}: get_config() must return a ConfigDict, got {type(config).__name__}{hint}"
        )
    if isinstance(config, FrozenConfigDict):
        config = ConfigDict(config)
    return config.unlock() or config


def _get_config(name: str) -> Callable[..., Any]:
    """Return the `get_config` that a file defines."""
    path = Path(name)
    if not path.is_file():
        there = {p.stem: str(p) for p in sorted(path.parent.glob("*.py"))}
        there = there or {stem: stem for stem in packaged_configs()}
        hint = did_you_mean(there.get(nearest(path.stem, there)))
        what = "is a directory" if path.is_dir() else "no such config file"
        raise UserError(f"{name}: {what}{hint}")
    try:
        source = path.read_text(encoding="utf-8")
        code = compile(source, str(path), "exec")
    except SyntaxError as error:
        line = quoted((error.text or "").strip())
        raise UserError(f"{name}, line {error.lineno}: not Python: {error.msg}{line}") from error
    except (OSError, ValueError) as error:  # no text, or null bytes
        raise UserError(f"{name}: cannot be read as a Python file: {error}") from error
    namespace = {"__name__": _PACKAGE, "__package__": _PACKAGE, "__file__": str(path)}
    with errors_name_the_line(name, Path(name).absolute().parent):
        exec(code, namespace)
    get_config = namespace.get("get_config")
    if not callable(get_config):
        found = nearest("get_config", [key for key, value in namespace.items() if callable(value)])
        hint = f"; rename {found}" if found else ""
        raise UserError(f"{name}: defines no function get_config(){hint}")
    return get_config


@contextlib.contextmanager
def _imports_beside(folder: Path) -> Iterator[None]:
    """Let what is run in the block import the modules of a folder, and forget them afterwards.

    Another config may have a module of the same name beside it.
    """
    package = types.ModuleType(_PACKAGE)
    package.__path__ = [str(folder)]
    before = set(sys.modules)
    sys.modules[_PACKAGE] = package
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if name.startswith(_PACKAGE) or (file and Path(file).parent == folder):
                del sys.modules[name]
