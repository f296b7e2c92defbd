"""One config key or flag: its declaration, its type in words, and conversion of values to it.

A value comes as text from the command line (`parse`) or as an object from a config file or
JSON (`coerce`). Both return exactly the declared type or raise `Mistyped`.
"""

import dataclasses
import enum
import json
import math
import numbers
import os
import re
import types
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, Union, get_args, get_origin

from llamajax.errors import did_you_mean, nearest


class NotSet(enum.Enum):
    """The only marker of a value that is absent."""

    NOT_SET = "<not set>"

    def __repr__(self) -> str:
        return self.value

    def __bool__(self) -> bool:
        return False


NOT_SET = NotSet.NOT_SET

# Among the choices of a key: a function of the user's, which `user_code.import_function` imports.
FUNCTION = "module:function"
_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_NAME = re.compile(r"[A-Za-z0-9_-]+")  # of a mapping's entry: it becomes part of keys and tags


class Mistyped(ValueError):
    """A value that is not of the declared type; the message says what was expected and given."""


def key(doc: str, *, default: Any = dataclasses.MISSING, **facts: Any) -> Any:
    """Declare a config key or a flag as a dataclass field; required if it has no default.

    `doc` is what `--help` prints; `facts` are further fields of `Key`.
    """
    return dataclasses.field(default=default, metadata={"doc": doc, **facts})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """A config key or a flag as its dataclass declares it. path: `train.steps`, or a flag's name.

    default: NOT_SET if required. is_path: `~` on the command line is the home directory, also after
    a comma or a colon. check: raises Mistyped for a value of the type that cannot be taken
    (`forms`).
    """

    path: str
    annotation: Any
    default: Any
    doc: str
    metavar: str = "VALUE"
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    is_path: bool = False
    check: Callable[[Any], object] | None = None

    @property
    def type_words(self) -> str:
        """The type as a user reads it."""
        return describe(self.annotation)

    def parse(self, text: str) -> Any:
        """Return the value that `text` on the command line stands for; raise Mistyped."""
        return parse(self.expand_home(text), self.annotation)

    def expand_home(self, text: str) -> str:
        """Replace `~` by the home directory where a path begins; no-op for what is no path."""
        if not self.is_path:
            return text
        return re.sub(r"(?:^|(?<=[,=:]))~(?=/|$)", lambda _: os.path.expanduser("~"), text)

    def problem_with(self, value: Any) -> str:
        """Say what is wrong with a value of the type, as `must be at least 1`; empty if nothing."""
        if value is None:
            return ""
        if self.check is not None:
            try:
                self.check(value)
            except Mistyped as error:
                return str(error)
        low = self.at_least is not None and value < self.at_least
        high = self.below is not None and value >= self.below
        if low or high:
            limit = f" and below {self.below}" if self.below is not None else ""
            return f"must be at least {self.at_least}{limit}"
        if self.above is not None and value <= self.above:
            return f"must be above {self.above}"
        return ""


def split_optional(annotation: Any) -> tuple[Any, bool]:
    """Return the annotation without None, and whether None was part of it."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return annotation, False
    members = [a for a in get_args(annotation) if a is not type(None)]
    if len(members) != 1:
        raise TypeError(f"a config key has one type, or one type and None; got {annotation}")
    return members[0], len(members) < len(get_args(annotation))


def describe(annotation: Any) -> str:
    """Return the type in words a user can act on, e.g. `int or none` or `bfloat16 | float32`."""
    inner, optional = split_optional(annotation)
    if get_origin(inner) is Literal:
        words = " | ".join(get_args(inner))
    elif get_origin(inner) is tuple and dataclasses.is_dataclass(get_args(inner)[0]):
        words = "list of objects in JSON"
    elif get_origin(inner) is tuple:
        words = f"{get_args(inner)[0].__name__}s separated by commas"
    elif get_origin(inner) is dict:
        words = "NAME:VALUE pairs separated by commas"
    elif inner is bool:
        words = "true | false"
    elif dataclasses.is_dataclass(inner):
        words = "the keys below"
    else:
        words = inner.__name__
    return f"{words} or none" if optional else words


def show(value: Any) -> str:
    """Return a value as it is written on the command line."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        return json.dumps([dataclasses.asdict(item, dict_factory=_without_none) for item in value])
    if isinstance(value, tuple):
        texts = [item for item in value if isinstance(item, str)]
        if any(_parts(text) != [text] or text.startswith("[") for text in texts):
            return json.dumps(value, ensure_ascii=False)
        return ",".join(show(item) for item in value)
    if isinstance(value, dict):
        return ",".join(f"{name}:{item}" for name, item in value.items()) or "none"
    return '""' if value == "" else str(value)


def _without_none(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in pairs if value is not None}


def parse(text: str, annotation: Any) -> Any:
    """Return the value that `text` spells for a key of this type.

    Raises:
        Mistyped: it spells no such value.
    """
    return coerce(_read(text, annotation), annotation)


def _read(text: str, annotation: Any) -> Any:
    """Return the object that `text` spells, of the declared type if it spells one."""
    inner, optional = split_optional(annotation)
    if optional and text.casefold() == "none":
        return None
    if dataclasses.is_dataclass(inner):
        names = ", ".join(f.name for f in dataclasses.fields(inner))
        raise Mistyped(f"expected none, got {text!r}; otherwise set its keys: {names}")
    if get_origin(inner) is tuple:
        kind = get_args(inner)[0]
        if dataclasses.is_dataclass(kind) and text.casefold() in ("", "none"):
            return ()
        if dataclasses.is_dataclass(kind) or (kind is str and text.startswith("[")):
            return _read_json(text)
        return [_read(part, kind) for part in _parts(text)]
    if get_origin(inner) is dict:
        return _read_pairs(text, annotation)
    if inner is bool:
        return {"true": True, "false": False}.get(text.casefold(), text)
    return _read_number(text, inner) if inner in (int, float) else text


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _read_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        begins = "begins with [ and " if text.startswith("[") else ""
        raise Mistyped(f"{begins}is no JSON list: {error}") from None


def _read_pairs(text: str, annotation: Any) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for part in _parts(text) or [text]:
        name, _, value = (piece.strip() for piece in part.partition(":"))
        if value.startswith("//"):
            raise Mistyped(f"{part} has no name; write NAME:{part}")
        if not name or not value:
            raise Mistyped(f"expected {describe(annotation)}, got {part!r}")
        if name in pairs:
            raise Mistyped(f"names {name!r} twice")
        pairs[name] = value
    return pairs


def _read_number(text: str, kind: type) -> int | float | str:
    """Return the finite number that `text` spells, or the text."""
    try:
        number = Decimal(text)
    except InvalidOperation:
        return text
    if not number.is_finite() or not math.isfinite(float(number)):
        return text
    if kind is float:
        return float(number)
    # 19 digits hold every 64-bit integer; int() of a huge exponent would fill the memory.
    is_int = number.adjusted() <= 18 and number == number.to_integral_value()
    return int(number) if is_int else text


def coerce(value: Any, annotation: Any) -> Any:
    """Return `value` as exactly the declared type: 3 for a float key is 3.0, 1e3 for an int 1000.

    Raises:
        Mistyped: the value is of another type, or not one of the choices.
    """
    inner, optional = split_optional(annotation)
    if value is None and optional:
        return None
    if get_origin(inner) is Literal:
        choices, is_text = get_args(inner), isinstance(value, str)
        is_function = FUNCTION in choices and is_text and _FUNCTION.fullmatch(value)
        if value in choices or is_function:
            return value
        hint = nearest(value, choices) if is_text else None
        raise Mistyped(f"{_expected(annotation, value)}{did_you_mean(hint)}")
    if get_origin(inner) is tuple and isinstance(value, list | tuple):
        kind = get_args(inner)[0]
        if dataclasses.is_dataclass(kind):
            return tuple(value)  # `load` reads their keys
        found = [_convert_scalar(item, kind) for item in value]
        if None in found:
            raise Mistyped(_expected(annotation, value[found.index(None)]))
        return tuple(found)
    if get_origin(inner) is dict and isinstance(value, Mapping):
        if wrong := [name for name in value if not _NAME.fullmatch(str(name))]:
            raise Mistyped(f"the name {wrong[0]!r} may have letters, digits, _ and - only")
        return {str(name): coerce(item, get_args(inner)[1]) for name, item in value.items()}
    converted = _convert_scalar(value, inner)
    if converted is None:
        raise Mistyped(_expected(annotation, value))
    return converted


def _expected(annotation: Any, value: Any) -> str:
    shown = repr(value) if len(repr(value)) <= 120 else f"{repr(value)[:117]}..."
    kind = "" if value is None else f" ({type(value).__name__})"
    return f"expected {describe(annotation)}, got {shown}{kind}"


def _convert_scalar(value: Any, kind: Any) -> Any:
    """Return the value as `kind`, or None when it is of another type."""
    if kind is bool or isinstance(value, bool):
        return value if kind is bool and isinstance(value, bool) else None
    if kind is str and isinstance(value, str | os.PathLike):
        value = os.fspath(value)
        return value if isinstance(value, str) else None
    if kind is int and isinstance(value, numbers.Integral):
        return int(value)
    if kind in (int, float) and isinstance(value, numbers.Real) and math.isfinite(value):
        if kind is float:
            return float(value)
        return int(value) if value == int(value) else None
    return None
