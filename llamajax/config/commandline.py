"""The command line of a verb: flags, `--config=FILE.py[:ARG]` and `--config.SECTION.KEY=VALUE`.

absl's and argparse's parsers stop at the first mistake; this one names all of them together with
those of the config file.
"""

import dataclasses
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from llamajax.config.flags import (
    CHECKPOINT,
    DTYPE,
    MACHINE_FLAGS,
    REQUIRED,
    Flag,
    backend_config,
)
from llamajax.config.help import help_text
from llamajax.config.keys import all_keys
from llamajax.config.load import resolve
from llamajax.config.nearest import did_you_mean, nearest
from llamajax.config.values import Mistyped, parse
from llamajax.errors import combine

_PREFIX = "--config."


@dataclasses.dataclass
class _Scan:
    """The command line taken apart: values by flag name and by config path, and problems."""

    values: dict[str, str] = dataclasses.field(default_factory=dict)
    overrides: dict[str, str] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)


def parse_command_line(
    argv: Sequence[str],
    *,
    verb: str,
    flags: Sequence[Flag] = (),
    takes_config: bool = True,
    summary: str = "",
    example: str = "",
) -> SimpleNamespace:
    """The values of a verb's command line: `.config` (RunConfig), and each flag by its name.

    `.config_file` is FILE.py[:ARG] as given. Without `takes_config` there is neither.
    `--help` prints the help and exits 0.

    Raises:
        UserError: every problem of the command line and of the config file.
    """
    if any(token in ("--help", "-h", "-help") for token in argv):
        print(
            help_text(
                verb, flags=flags, takes_config=takes_config, summary=summary, example=example
            )
        )
        sys.exit(0)
    scan = _scan(argv, flags=flags, takes_config=takes_config)
    found = _flag_values(scan, flags=flags)
    if takes_config:
        found["config"], found["config_file"] = None, scan.values.get("config")
        if found["config_file"]:
            found["config"], problems = resolve(found["config_file"], scan.overrides, flag=_PREFIX)
            scan.problems += problems
        else:
            scan.problems.insert(0, "--config=FILE.py[:ARG] is required: the run's config file")
    if scan.problems:
        count = len(scan.problems)
        title = f"{count} problem{'s' * (count > 1)} with this command"
        raise combine(scan.problems, title=f"{title} (python -m llamajax.{verb} --help shows all):")
    return SimpleNamespace(**found)


def parse_weights_command(
    argv: Sequence[str], *, verb: str, flags: Sequence[Flag], summary: str, example: str
) -> dict[str, Any]:
    """What a verb that computes with weights is asked for: its own flags, and those of all such.

    By name: the verb's `flags`, `checkpoint`, `dtype`, `mesh`, and `backend` as a BackendConfig.
    Raises UserError as `parse_command_line` and `backend_config` do.
    """
    found = parse_command_line(
        argv,
        verb=verb,
        takes_config=False,
        flags=(CHECKPOINT, *flags, DTYPE, *MACHINE_FLAGS),
        summary=summary,
        example=example,
    )
    names = ["checkpoint", *(flag.name for flag in flags), "dtype", "mesh"]
    return {name: getattr(found, name) for name in names} | {"backend": backend_config(found)}


def _flag_values(scan: _Scan, *, flags: Sequence[Flag]) -> dict[str, Any]:
    """Each flag's value by name; problems are added to the scan."""
    found: dict[str, Any] = {}
    for flag in flags:
        text = scan.values.get(flag.name)
        found[flag.name] = None if flag.default is REQUIRED else flag.default
        if text is None and flag.default is REQUIRED:
            scan.problems.append(f"{flag.usage} is required: {flag.doc}")
        elif text is not None and flag.verbatim:
            found[flag.name] = text
        elif text == "" and flag.annotation is str:
            scan.problems.append(f"--{flag.name}= is empty: {flag.doc}")
        elif text is not None:
            try:
                found[flag.name] = parse(text, flag.annotation)
            except Mistyped as error:
                scan.problems.append(f"--{flag.name}={text}: {error}")
    return found


def _scan(argv: Sequence[str], *, flags: Sequence[Flag], takes_config: bool) -> _Scan:
    """Take the tokens apart; the last of several values of one flag counts."""
    scan = _Scan()
    switches = _switches(flags, takes_config=takes_config)
    known = {f"--{flag.name}" for flag in flags} | ({"--config"} if takes_config else set())
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("-") or token == "-":
            scan.problems.append(f"stray argument {token!r}: every value has a flag, --NAME=VALUE")
            continue
        name, equals, value = token.partition("=")
        if not equals:
            value = _following(tokens, switch=name in switches)
        if takes_config and name.startswith(_PREFIX):
            _add(scan.overrides, name.removeprefix(_PREFIX), value, name=name, scan=scan)
        elif name in known:
            _add(scan.values, name.removeprefix("--"), value, name=name, scan=scan)
        else:
            scan.problems.append(_unknown_flag(name, known=known, takes_config=takes_config))
    return scan


def _switches(flags: Sequence[Flag], *, takes_config: bool) -> set[str]:
    """The flags that mean true when they stand alone."""
    own = {f"--{flag.name}" for flag in flags if flag.annotation is bool}
    if not takes_config:
        return own
    return own | {_PREFIX + key.path for key in all_keys().values() if key.annotation is bool}


def _following(tokens: list[str], *, switch: bool) -> str | None:
    """The value of a flag without `=`: the next token, `true` for a lone switch, else None."""
    if switch:
        given = tokens and tokens[0].casefold() in ("true", "false")
        return tokens.pop(0) if given else "true"
    if tokens and not tokens[0].startswith("--"):
        return tokens.pop(0)
    return None


def _add(table: dict[str, str], key: str, value: str | None, *, name: str, scan: _Scan) -> None:
    if value is None:
        scan.problems.append(f"{name}: has no value; write {name}=VALUE")
    else:
        table[key] = value


def _unknown_flag(name: str, *, known: set[str], takes_config: bool) -> str:
    choices = [*known, "--help"]
    bare = name.lstrip("-")
    if takes_config:
        choices += [_PREFIX + path for path in all_keys()]
        if bare in all_keys():
            return f"{name}: unknown flag{did_you_mean(_PREFIX + bare)}"
        same = [path for path in all_keys() if path.rpartition(".")[2] == bare]
        if same:
            return f"{name}: unknown flag{did_you_mean(_PREFIX + same[0])}"
    return f"{name}: unknown flag{did_you_mean(nearest('--' + bare, choices))}"
