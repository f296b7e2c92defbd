"""The command line of every verb: flags, `--config=FILE.py[:ARG]`, `--config.SECTION.KEY=VALUE`.

absl's and argparse's parsers stop at the first mistake. This one names all of them together with
those of the config file.
"""

import importlib.metadata
import inspect
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from llamajax.config.flags import Flags, RunFlags
from llamajax.config.keys import all_keys, key_hint, own_keys, sections
from llamajax.config.load import resolve
from llamajax.config.schema import RunConfig
from llamajax.config.values import NOT_SET, Key, Mistyped, show
from llamajax.errors import combine, did_you_mean, nearest

F = TypeVar("F", bound=Flags)

_PREFIX = "--config."
_WIDTHS = (40, 100)  # least and most, on a narrow and a wide terminal
_KEYS = (
    "Config keys: set in the config file, overridden by --config.SECTION.KEY=VALUE. "
    "`none` clears an optional key; `required` ones have no default."
)


def parse_command_line(argv: Sequence[str], flags: type[F], *, verb: str, doc: str | None) -> F:
    """Return a verb's command line as an instance of its `flags`.

    `doc` is what `--help` begins with: the docstring of the verb's file. `--help` and `--version`
    print and exit 0.

    Raises:
        UserError: every problem of the command line and of the config file.
    """
    values: dict[str, Any] = {}
    if _takes_command(flags):
        end = argv.index("--") if "--" in argv else len(argv)
        argv, values["command"] = argv[:end], tuple(argv[end + 1 :])
    answer_help(argv, lambda word: help_text(flags, verb=verb, doc=doc or "", word=word))
    given, overrides, problems = _scan(argv, flags)
    keys = _keys(flags)
    for name, flag in keys.items():
        try:
            values[name] = _value(flag, given.get(flag.path))
        except Mistyped as error:
            problems.append(str(error))
        else:
            if problem := flag.problem_with(values[name]):
                problems.append(f"--{flag.path}={show(values[name])}: {problem}")
    complete = all(name in values for name in keys)
    if issubclass(flags, RunFlags) and "config" in values:
        values["config_file"], values["overrides"] = values["config"], overrides
        values["config"], found = resolve(values["config_file"], overrides, flag=_PREFIX)
        problems += found
    if complete:
        parsed = flags(**values)
        problems += parsed.problems()
    if problems:
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)} with this command"
        raise combine(problems, title=f"{count} ({_program(verb)} --help shows all):")
    return parsed


def _program(verb: str) -> str:
    """Return the command of a verb, or of a script that ends in `.py`."""
    return f"python {verb}" if verb.endswith(".py") else f"python -m llamajax.{verb}"


def answer_help(argv: Sequence[str], text: Callable[[str], str]) -> None:
    """Print the help or the version and exit 0 if the command line asks for it.

    text: returns the help, of `--help=WORD` what is about the word.
    """
    for token in argv:
        name, _, word = token.partition("=")
        if name in ("--help", "-h", "-help"):
            print(text(word))
            sys.exit(0)
    if "--version" in argv:
        try:
            print(f"llamajax {importlib.metadata.version('llamajax')}")
        except importlib.metadata.PackageNotFoundError:
            print("llamajax, not installed")
        sys.exit(0)


def _takes_command(flags: type[Flags]) -> bool:
    """Return whether a field `command` takes what stands after `--`."""
    return "command" in flags.__dataclass_fields__


def _keys(flags: type[Flags]) -> dict[str, Key]:
    """Return the flags by field name: required ones, then optional ones, inherited ones last."""
    keys = own_keys(flags)
    required = [name for name, key in keys.items() if key.default is NOT_SET]
    names = [name for cls in flags.__mro__ for name in inspect.get_annotations(cls)]
    return {name: keys[name] for name in dict.fromkeys([*required, *names]) if name in keys}


def _value(flag: Key, text: str | None) -> Any:
    """Return the value of a flag whose text is None where it was not given; raise Mistyped."""
    if text is None and flag.default is NOT_SET:
        raise Mistyped(f"{_usage(flag)} is required: {flag.doc}")
    if text is None:
        return flag.default
    if not text and flag.default is NOT_SET:
        raise Mistyped(f"--{flag.path}= is empty: {flag.doc}")
    if flag.annotation is RunConfig:
        return flag.expand_home(text)
    try:
        return flag.parse(text)
    except Mistyped as error:
        raise Mistyped(f"--{flag.path}={text}: {error}") from None


def _scan(
    argv: Sequence[str], flags: type[Flags]
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Return texts by flag, texts by config path, and problems.

    Of several values of one flag the last counts. A value may follow its flag as the next token; a
    flag that is a switch means true when it stands alone.
    """
    given: dict[str, str] = {}
    overrides: dict[str, str] = {}
    problems = []
    known = {f"--{flag.path}": flag for flag in _keys(flags).values()}
    takes_config = issubclass(flags, RunFlags)
    if takes_config:
        known |= {_PREFIX + path: key for path, key in all_keys().items()}
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("-") and _takes_command(flags):
            command = shlex.join([token, *tokens[:2]])
            problems.append(f"there is no -- before the command: write `-- {command} ...`")
            break
        if not token.startswith("-") or token == "-":
            problems.append(f"stray argument {token!r}: every value has a flag, --NAME=VALUE")
            continue
        name, equals, value = token.partition("=")
        if not equals and name in known and known[name].annotation is bool:
            follows = tokens and tokens[0].casefold() in ("true", "false")
            value = tokens.pop(0) if follows else "true"
        elif not equals:
            value = tokens.pop(0) if tokens and not tokens[0].startswith("--") else None
        is_key = takes_config and name.startswith(_PREFIX)
        if not is_key and name not in known:
            problems.append(_unknown_flag(name, known))
        elif value is None:
            problems.append(f"{name}: has no value; write {name}=VALUE")
        elif is_key:
            overrides[name.removeprefix(_PREFIX)] = value
        else:
            given[name.removeprefix("--")] = value
    return given, overrides, problems


def _unknown_flag(name: str, known: dict[str, Key]) -> str:
    bare = name.lstrip("-")
    same = [flag for flag in known if flag == _PREFIX + bare or flag.endswith(f".{bare}")]
    flags = {flag.removeprefix("--"): flag for flag in [*known, "--help", "--version"]}
    found = same[0] if same else flags.get(nearest(bare, flags))
    if found is None and any(flag.startswith(_PREFIX) for flag in known):
        return f"{name}: unknown flag{key_hint(bare, _PREFIX)}"
    return f"{name}: unknown flag{did_you_mean(found)}"


def help_text(flags: type[Flags], *, verb: str, doc: str, word: str = "") -> str:
    """Return the whole help of a verb, or what is about `word`, ending without a newline."""
    keys = list(_keys(flags).values())
    takes_config = issubclass(flags, RunFlags)
    if word:
        entries = [_entry(_usage(key), key) for key in keys]
        if takes_config:
            entries += [_entry(_PREFIX + key.path, key) for key in all_keys().values()]
        found = [each for each in entries if word.casefold() in " ".join(each.split()).casefold()]
        return "\n".join(found) or f"nothing here is about {word!r}; --help without it shows all"
    usage = [_program(verb)]
    usage += [_usage(k) if k.default is NOT_SET else f"[{_usage(k)}]" for k in keys]
    usage += ["[--config.SECTION.KEY=VALUE ...]"] * takes_config
    usage += ["-- COMMAND..."] * _takes_command(flags)
    lines = [f"llamajax {verb}: {doc.strip()}", "", "Usage:"]
    lines += [*_wrap(" ".join(usage), indent=2, hanging=6), "", "Flags:"]
    lines += [_entry(_usage(flag), flag) for flag in keys]
    lines += ["  --help[=WORD], --version"]
    lines += _wrap(
        "print this, or what is about WORD, or the version, and exit", indent=6, hanging=6
    )
    if takes_config:
        lines += ["", *_wrap(_KEYS, indent=0, hanging=0)]
        for name, cls in sections().items():
            lines += ["", f"{name}: {(cls.__doc__ or '').strip().splitlines()[0]}"]
            for key in all_keys().values():
                if key.path.startswith(f"{name}."):
                    lines.append(_entry(key.path, key))
    return "\n".join(lines)


def _usage(flag: Key) -> str:
    return f"--{flag.path}" if flag.annotation is bool else f"--{flag.path}={flag.metavar}"


def _type_and_default(key: Key) -> str:
    if key.annotation is RunConfig:
        return "required"
    if key.default is not NOT_SET:
        return f"{key.type_words}; default {show(key.default)}"
    parent, _, _ = key.path.rpartition(".")
    return f"{key.type_words}; required" + f" unless {parent} is none" * (parent.count(".") > 0)


def _entry(name: str, key: Key) -> str:
    """Return what `--help` says of a key or flag."""
    head = _wrap(f"{name}  ({_type_and_default(key)})", indent=2, hanging=6)
    return "\n".join([*head, *_wrap(key.doc, indent=6, hanging=6)])


def _wrap(text: str, *, indent: int, hanging: int) -> list[str]:
    least, most = _WIDTHS
    width = shutil.get_terminal_size((most, 24)).columns
    return textwrap.wrap(
        text,
        max(least, min(most, width)),
        initial_indent=" " * indent,
        subsequent_indent=" " * hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )
