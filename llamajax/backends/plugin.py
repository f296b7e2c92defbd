"""PJRT plugins: check a bare library and name it to JAX, and say which JAX a plugin was built for.

JAX itself finds the plugins that are installed as Python packages.
"""

import contextlib
import ctypes
import importlib.metadata
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llamajax.backends.jax_private import STABLEHLO
from llamajax.backends.platforms import platform_facts
from llamajax.config.schema import BackendConfig
from llamajax.errors import UserError, combine

Option = int | float | bool | str
_GROUP = "jax_plugins"  # of entry points
_JAX_VARIABLE = "PJRT_NAMES_AND_LIBRARY_PATHS"  # JAX's one public route for a bare library
# What jaxlib 0.10.2 and 0.12.0.1 take, seen with libraries that claim other versions. A newer
# minor version is taken as well: functions are only ever added.
_MAJOR, _OLDEST_MINOR = 0, 29


class _Version(ctypes.Structure):
    """PJRT_Api_Version of pjrt_c_api.h."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extensions", ctypes.c_void_p),
        ("major", ctypes.c_int),
        ("minor", ctypes.c_int),
    )


class _Head(ctypes.Structure):
    """The beginning of PJRT_Api, the same in every version."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extensions", ctypes.c_void_p),
        ("version", _Version),
    )


def typed_options(text: str | None, *, key: str = "backend.options") -> dict[str, Option]:
    """Return the options that `k=v,k=v` means, typed as PJRT wants them.

    `true` and `false` are bools, 8 is an int, 0.5 and 1e9 are floats, anything else a string; in
    quotes ("8") everything is one. UserError with every part that is no k=v or comes twice.
    """
    found: dict[str, Option] = {}
    problems = []
    for part in text.split(",") if text else ():
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (name and equals):
            problems.append(f"{key}: {part!r} is not k=v; write k=v,k=v")
        elif name in found:
            problems.append(f"{key}: {name} is there twice; name it once")
        found[name] = _typed(value)
    if problems:
        raise combine(problems, title=f"{key} cannot be read:")
    return found


def _typed(text: str) -> Option:
    if text in ("true", "false"):
        return text == "true"
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if re.fullmatch(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?", text):
        return float(text)
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1] if quoted else text


def check_library(library: Path) -> tuple[int, int]:
    """Load a library and return the version of the PJRT C API that it offers.

    UserError for a file that cannot be loaded, is no plugin, or is of a version that this JAX does
    not take.
    """
    title = f"backend.plugin = {library}:"
    try:
        loaded = ctypes.CDLL(str(library))
    except OSError as error:
        reason = str(error).removeprefix(f"{library}: ")
        raise UserError(
            f"{title} cannot be loaded: {reason}; give the path of the vendor's PJRT library "
            "(often libpjrt_NAME.so), built for this system, and put what it needs itself into "
            "LD_LIBRARY_PATH"
        ) from None
    function = getattr(loaded, "GetPjrtApi", None)
    if function is not None:
        function.restype = ctypes.POINTER(_Head)
    if function is None or not (table := function()):
        raise UserError(
            f"{title} is a shared library without a function GetPjrtApi that gives a table: it is "
            "no PJRT plugin; ask the vendor which of its libraries is"
        )
    major, minor = table.contents.version.major, table.contents.version.minor
    if major != _MAJOR or minor < _OLDEST_MINOR:
        raise UserError(
            f"{title} offers version {major}.{minor} of the PJRT C API, but this JAX takes "
            f"{_MAJOR}.{_OLDEST_MINOR} or later of major version {_MAJOR}; install a plugin that "
            "was built for a JAX of about the same age, or a JAX that fits it "
            f"({_package(library, ()) or _installed()})"
        )
    return major, minor


@contextlib.contextmanager
def named_to_jax(config: BackendConfig) -> Iterator[None]:
    """Let JAX find the config's library and options when it first looks for its backends.

    Does nothing without `backend.plugin`. The variable for JAX is restored afterwards, so that
    processes started later do not get the name of a file that is gone.
    """
    if not config.plugin:
        yield
        return
    library = Path(config.plugin).absolute()
    options = typed_options(config.options)
    check_library(library)
    before = os.environ.get(_JAX_VARIABLE)
    with tempfile.TemporaryDirectory(prefix="llamajax_plugin_") as folder:
        file = Path(folder) / "plugin.json"
        file.write_text(json.dumps({"library_path": str(library), "create_options": options}))
        os.environ[_JAX_VARIABLE] = f"{config.name}:{file}"
        try:
            yield
        finally:
            del os.environ[_JAX_VARIABLE]
            if before is not None:
                os.environ[_JAX_VARIABLE] = before


def built_for(config: BackendConfig, client: Any) -> str | None:
    """Return the JAX that a backend's plugin was built for, as far as it says; None if built in.

    client: what JAX made of the plugin. A plugin's StableHLO is that of the JAX it was built with.
    """
    major, minor, *_ = getattr(client, "stablehlo_current_version", None) or (None, None)
    if major is None:
        return None
    releases = STABLEHLO.get((major, minor))
    if releases is None:
        oldest, newest = min(STABLEHLO), max(STABLEHLO)
        releases = (
            f"older than {STABLEHLO[oldest]}" if (major, minor) < oldest
            else f"newer than {STABLEHLO[newest]}" if (major, minor) > newest
            else f"between {STABLEHLO[oldest]} and {STABLEHLO[newest]}"
        )  # fmt: skip
    api = f"{client.pjrt_c_api_major_version}.{client.pjrt_c_api_minor_version}"
    library = Path(config.plugin) if config.plugin else None
    names = (config.name or client.platform, *platform_facts(client.platform).names)
    said = _package(library, names) or _installed()
    return f"built for jax {releases} (StableHLO {major}.{minor}, PJRT C API {api}); {said}"


def _installed() -> str:
    return f"installed: jax {importlib.metadata.version('jax')}"


def _package(library: Path | None, names: Sequence[str]) -> str | None:
    """Return the package that a plugin comes from, what it wants of JAX, and what there is.

    It holds `library`, or has an entry point for JAX that mentions one of `names`. None: unknown.
    """
    for package in importlib.metadata.distributions():
        if library is None:
            points = [f"{e.name} {e.value}" for e in package.entry_points.select(group=_GROUP)]
            is_it = any(name in point for point in points for name in names)
        else:
            files = [file for file in package.files or () if file.name == library.name]
            is_it = any(Path(file.locate()).resolve() == library.resolve() for file in files)
        if is_it:
            wants = [r for r in package.requires or () if re.match(r"jax(lib)?(?![\w-])", r)]
            wants = [r for r in wants if "extra ==" not in r] or ["no particular jax"]
            return f"{package.name} {package.version} wants {', '.join(wants)}; {_installed()}"
    return None


def why_not(name: str, reason: str, config: BackendConfig) -> str:
    """Return the message for a backend that did not come up. reason: JAX's own words."""
    reason = reason.splitlines()[0].removeprefix(f"Unable to initialize backend '{name}': ")
    reason = re.sub(r"\s*\(set JAX_PLATFORMS=.*\)$", "", reason)
    title = f"backend {name!r} did not come up:"
    if "list of known backends" in reason:
        found = re.search(r"\[(.*)\]", reason)
        names = [name.strip(" '") for name in found[1].split(",")] if found else []
        usable = ", ".join(n for n in names if n not in ("interpreter", "fake", "METAL"))
        return (
            f"{title} no plugin of that name is installed (JAX knows {usable or 'none'}). Install "
            "its JAX plugin, give a bare library with backend.plugin, or choose another backend "
            "(cpu always works)"
        )
    if package := _package(Path(config.plugin) if config.plugin else None, (name,)):
        reason += f" [{package}]"
    if "INVALID_ARGUMENT" in reason and config.options:
        return (
            f"{title} {reason}. Correct backend.options = {config.options} (8 is an int, 8.0 a "
            'float, true a bool, "8" in quotes a string)'
        )
    return (
        f"{title} {reason}. Is a device there, its driver loaded (the vendor's own tool should "
        "list it), and is it visible to this process? Choose another backend otherwise (cpu always "
        "works)"
    )
