"""Running a config file: a Python file with `get_config()` or `get_config(arg)`.

Whatever goes wrong in it is the user's to fix and becomes one UserError with the file's line.
"""

import inspect
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from llamajax.config.nearest import did_you_mean, nearest
from llamajax.errors import UserError


def split_argument(path_arg: str) -> tuple[str, str | None]:
    """The file and the argument of `FILE.py:ARG`; None without an argument."""
    stem, mark, rest = path_arg.partition(".py:")
    return (f"{stem}.py", rest) if mark else (path_arg, None)


def read_file(path_arg: str) -> ConfigDict:
    """What `get_config` of FILE.py[:ARG] returns, unlocked.

    Raises:
        UserError: no such file, a syntax error, an exception (with its line), no `get_config`,
            an argument it does not take or lacks, or a result that is not a ConfigDict.
    """
    name, argument = split_argument(path_arg)
    get_config = _get_config(name)
    arguments = _arguments(get_config, argument, name=name)
    config = _guarded(lambda: get_config(*arguments), name=name)
    if not isinstance(config, ConfigDict):
        forgot = "; does it end in `return config`?" if config is None else ""
        raise UserError(
            f"{name}: get_config() must return a ConfigDict, got {type(config).__name__}{forgot}"
        )
    if isinstance(config, FrozenConfigDict):
        config = ConfigDict(config)
    return config.unlock() or config


def _get_config(name: str) -> Callable[..., Any]:
    """The `get_config` that a file defines."""
    path = Path(name)
    if not path.is_file():
        there = [str(p) for p in sorted(path.parent.glob("*.py"))] if path.parent.is_dir() else []
        hint = did_you_mean(nearest(str(path), there))
        what = "is a directory" if path.is_dir() else "no such config file"
        raise UserError(f"{name}: {what}{hint}")
    try:
        source = path.read_text(encoding="utf-8")
        code = compile(source, str(path), "exec")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: cannot be read as a Python file: {error}") from error
    except (SyntaxError, ValueError) as error:
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        text = (getattr(error, "text", None) or "").strip()
        message = getattr(error, "msg", None) or str(error)
        raise UserError(f"{name}{where}: not Python: {message}{_quoted(text)}") from error
    namespace = {"__name__": "llamajax_run_config", "__file__": str(path)}
    _guarded(lambda: exec(code, namespace), name=name)
    get_config = namespace.get("get_config")
    if not callable(get_config):
        named = [key for key, value in namespace.items() if callable(value)]
        found = nearest("get_config", named)
        hint = f"; rename {found}" if found else ""
        raise UserError(f"{name}: defines no function get_config(){hint}")
    return get_config


def _arguments(get_config: Callable[..., Any], argument: str | None, *, name: str) -> list[str]:
    """The positional arguments of the call, after checking that it takes them."""
    try:
        signature = inspect.signature(get_config)
    except (TypeError, ValueError):
        return [] if argument is None else [argument]
    given = [] if argument is None else [argument]
    try:
        signature.bind(*given)
    except TypeError:
        if given:
            raise UserError(
                f"{name}:{argument}: get_config{signature} takes no argument; drop ':{argument}'"
            ) from None
        wanted = next(iter(signature.parameters), "arg").upper()
        raise UserError(
            f"{name}: get_config{signature} needs an argument: --config={name}:{wanted}"
        ) from None
    return given


def _guarded(call: Callable[[], Any], *, name: str) -> Any:
    """The result of a call into the user's file; its exceptions as a UserError with the line."""
    try:
        return call()
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename == str(Path(name))]
        where = f", line {own[-1].lineno}" if own else ""
        line = _quoted((own[-1].line or "") if own else "")
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"{name}{where}: {kind}{_message(error)}{line}") from error


def _message(error: BaseException) -> str:
    """The text of an exception on one line; ml-collections nests KeyErrors in AttributeErrors."""
    while len(error.args) == 1 and isinstance(error.args[0], BaseException):
        error = error.args[0]
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or "(no message)"


def _quoted(line: str) -> str:
    return f"\n      {line}" if line else ""
