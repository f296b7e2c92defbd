"""The text of `--help`: what a verb does, its flags, every config key with its doc."""

import textwrap
from collections.abc import Iterator, Sequence

from llamajax.config.flags import REQUIRED, Flag, show
from llamajax.config.keys import NOT_SET, Key, all_keys, sections

_WIDTH = 100
_EXAMPLE = (
    "python -m llamajax.{verb} --config=configs/quickstart.py --workdir=runs/quickstart "
    "--config.train.steps=50"
)


def help_text(
    verb: str,
    *,
    flags: Sequence[Flag] = (),
    takes_config: bool = True,
    summary: str = "",
    example: str = "",
) -> str:
    """The whole help of a verb, ending without a newline."""
    lines = [f"llamajax {verb}" + (f": {summary}" if summary else ""), ""]
    usage = [f"python -m llamajax.{verb}"]
    usage += ["--config=FILE.py[:ARG]"] * takes_config
    usage += [_bracketed(flag) for flag in flags]
    usage += ["[--config.SECTION.KEY=VALUE ...]"] * takes_config
    lines += ["Usage:", *_wrap(" ".join(usage), indent=2, hanging=6), ""]
    example = example or (_EXAMPLE.format(verb=verb) if takes_config else "")
    if example:
        lines += ["Example:", *_indented(example), ""]
    lines += ["Flags:"]
    if takes_config:
        doc = "Python file whose get_config() or get_config(ARG) returns the config; required"
        lines += _entry("--config=FILE.py[:ARG]", "", doc)
    for flag in flags:
        lines += _entry(flag.usage, flag.type_words, flag.doc)
    lines += _entry("--help", "", "print this and exit")
    if takes_config:
        lines += ["", *_wrap(_KEYS, indent=0, hanging=0)]
        lines += [line for name, cls in sections().items() for line in _section(name, cls)]
    return "\n".join(lines)


_KEYS = (
    "Config keys: set in the config file, overridden by --config.SECTION.KEY=VALUE. "
    "`none` clears an optional key; `required` ones have no default."
)


def _bracketed(flag: Flag) -> str:
    return flag.usage if flag.default is REQUIRED else f"[{flag.usage}]"


def _section(name: str, cls: type) -> Iterator[str]:
    first_line = (cls.__doc__ or "").strip().splitlines()[0]
    yield ""
    yield f"{name}: {first_line}"
    for key in all_keys().values():
        if key.path.startswith(f"{name}."):
            yield from _entry(key.path, _type_and_default(key), key.doc)


def _type_and_default(key: Key) -> str:
    nested = key.path.count(".") > 1
    if key.default is NOT_SET:
        parent = key.path.rpartition(".")[0]
        return f"{key.type_words}; required" + (f" unless {parent} is none" if nested else "")
    return f"{key.type_words}; default {show(key.default)}"


def _entry(name: str, kind: str, doc: str) -> list[str]:
    head = f"  {name}" + (f"  ({kind})" if kind else "")
    return [head, *_wrap(doc, indent=6, hanging=6)]


def _wrap(text: str, *, indent: int, hanging: int) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=" " * indent,
        subsequent_indent=" " * hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.splitlines()]
