"""Code of the user's: functions that a key names as `module:function`, and the errors of all of it.

Whatever goes wrong in it is the user's to fix, and becomes one UserError with the line.
"""

import contextlib
import importlib
import importlib.util
import itertools
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llamajax.errors import UserError, did_you_mean, nearest

_beside_config: list[str] = []  # the folder of the config file that this process has read last


def set_config_folder(folder: Path) -> None:
    """Let `import_function` find modules in this folder as well."""
    _beside_config[:] = [str(folder)]


def import_function(name: str, *, key: str) -> Callable[..., Any]:
    """Return the function that `key = module:function` names.

    The module is looked for where Python looks, then in the current directory, then beside the
    config file. A run that was restored from its record knows no config file.

    Raises:
        UserError: no such module or function, or an exception while the module is imported.
    """
    module, _, function = name.partition(":")
    label = f"{key} = {name}"
    if not (module and function):
        raise UserError(f"{label}: is not module:function, e.g. my_code:{key.rpartition('.')[2]}")
    sys.path += [p for p in (os.getcwd(), *_beside_config) if p not in sys.path]
    for each in itertools.accumulate(module.split("."), "{}.{}".format):
        try:
            spec = importlib.util.find_spec(each)
        except (ModuleNotFoundError, ValueError):  # within no package; __main__ has no spec
            spec = None
        if spec is None:
            places = " or ".join(dict.fromkeys([os.getcwd(), *_beside_config]))
            raise UserError(
                f"{label}: Python finds no module {module}; put {module.partition('.')[0]} into "
                f"{places}, or install its package"
            )
        # One by one: to find a module, Python runs the packages that it is in.
        with errors_name_the_line(label, Path(spec.origin or ".").parent):
            imported = importlib.import_module(each)
            found = each == module and getattr(imported, function, None)
    if not callable(found):
        there = [key for key, value in vars(imported).items() if callable(value)]
        hint = did_you_mean(nearest(function, there))
        raise UserError(f"{label}: {spec.origin or module} defines no function {function}{hint}")
    return found


@contextlib.contextmanager
def errors_of_function(name: str, *, key: str, case: str = "") -> Iterator[None]:
    """Turn what the imported function of `key = name` raises into one UserError.

    case: what it is called with, in words.
    """
    module = name.partition(":")[0]
    file = getattr(sys.modules.get(module), "__file__", None) or module  # Python's own have none
    try:
        with errors_name_the_line(file, Path(file).parent):
            yield
    except UserError as error:
        raise UserError(f"{key} = {name} fails{case}: {error}") from error


@contextlib.contextmanager
def errors_name_the_line(name: str, folder: Path) -> Iterator[None]:
    """Turn any exception of the user's code into a UserError with the line it comes from.

    name: of the code, where no line of a file in `folder` was running.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if Path(frame.filename).absolute().parent == folder]
        where, line = name, ""
        if own:
            file = name if own[-1].filename == str(Path(name)) else own[-1].filename
            where, line = f"{file}, line {own[-1].lineno}", quoted(own[-1].line or "")
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"{where}: {kind}{_message(error)}{line}") from error


def quoted(line: str) -> str:
    """Return a line of the user's, on a line of its own at the end of a message."""
    return f"\n      {line}" if line else ""


def _message(error: BaseException) -> str:
    """Return the text of an exception on one line."""
    while len(error.args) == 1 and isinstance(error.args[0], BaseException):
        error = error.args[0]  # ml-collections nests KeyErrors in AttributeErrors
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or "(no message)"
