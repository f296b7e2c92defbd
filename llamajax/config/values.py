"""One value of a config key or a flag: its declared type in words, and conversion to it.

A value comes as text from the command line (`parse`) or as an object from a config file or
JSON (`coerce`). Both return exactly the declared type or raise `Mistyped`.
"""

import dataclasses
import math
import numbers
import os
import types
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, Union, get_args, get_origin

from llamajax.config.nearest import did_you_mean, nearest

_TRUE_FALSE = {"true": True, "false": False}


class Mistyped(ValueError):
    """A value that is not of the declared type; the message says what was expected and given."""


def split_optional(annotation: Any) -> tuple[Any, bool]:
    """The annotation without None, and whether None was among it."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return annotation, False
    members = [a for a in get_args(annotation) if a is not type(None)]
    if len(members) != 1:
        raise TypeError(f"a config key has one type, or one type and None; got {annotation}")
    return members[0], len(members) < len(get_args(annotation))


def describe(annotation: Any) -> str:
    """The type in words a user can act on, e.g. `int or none` or `bfloat16 | float32`."""
    inner, optional = split_optional(annotation)
    if get_origin(inner) is Literal:
        words = " | ".join(get_args(inner))
    elif get_origin(inner) is tuple:
        words = f"{get_args(inner)[0].__name__}s separated by commas"
    elif inner is bool:
        words = "true | false"
    elif dataclasses.is_dataclass(inner):
        words = "the keys below"
    else:
        words = inner.__name__
    return f"{words} or none" if optional else words


def parse(text: str, annotation: Any) -> Any:
    """The value that `text` spells for a key of this type.

    Raises:
        Mistyped: it spells no such value.
    """
    inner, optional = split_optional(annotation)
    if optional and text.casefold() == "none":
        return None
    if get_origin(inner) is tuple:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        item = get_args(inner)[0]
        return tuple(_parse_one(part, item, whole=annotation) for part in parts)
    return _parse_one(text, inner, whole=annotation)


def _parse_one(text: str, inner: Any, *, whole: Any) -> Any:
    mistyped = Mistyped(f"expected {describe(whole)}, got {text!r}")
    if dataclasses.is_dataclass(inner):
        names = ", ".join(f.name for f in dataclasses.fields(inner))
        raise Mistyped(f"expected none, got {text!r}; otherwise set its keys: {names}")
    if get_origin(inner) is Literal or inner is str:
        return coerce(text, inner)
    if inner is bool:
        if text.casefold() not in _TRUE_FALSE:
            raise mistyped
        return _TRUE_FALSE[text.casefold()]
    try:
        number = Decimal(text)
    except InvalidOperation:
        raise mistyped from None
    if not number.is_finite():
        raise mistyped
    if inner is float:
        if not math.isfinite(float(number)):
            raise mistyped
        return float(number)
    # 19 digits hold every 64-bit integer; int() of a huge exponent would fill the memory.
    if number.adjusted() > 18 or number != number.to_integral_value():
        raise mistyped
    return int(number)


def coerce(value: Any, annotation: Any) -> Any:
    """`value` as exactly the declared type: 3 for a float key becomes 3.0, 1e3 for an int key 1000.

    Raises:
        Mistyped: the value is of another type, or not one of the choices.
    """
    inner, optional = split_optional(annotation)
    if value is None and optional:
        return None
    mistyped = Mistyped(f"expected {describe(annotation)}, got {_show(value)}")
    if get_origin(inner) is Literal:
        choices = get_args(inner)
        if value in choices:
            return value
        hint = nearest(value, choices) if isinstance(value, str) else None
        raise Mistyped(f"{mistyped}{did_you_mean(hint)}")
    if get_origin(inner) is tuple:
        if not isinstance(value, list | tuple):
            raise mistyped
        try:
            return tuple(coerce(item, get_args(inner)[0]) for item in value)
        except Mistyped:
            raise mistyped from None
    converted = _convert_scalar(value, inner)
    if converted is None:
        raise mistyped
    return converted


def _convert_scalar(value: Any, kind: Any) -> Any:
    """The value as `kind`, or None when it is of another type."""
    if kind is bool or isinstance(value, bool):
        return value if kind is bool and isinstance(value, bool) else None
    if kind is int:
        if isinstance(value, numbers.Integral):
            return int(value)
        whole = isinstance(value, numbers.Real) and math.isfinite(value) and value == int(value)
        return int(value) if whole else None
    if kind is float:
        return float(value) if isinstance(value, numbers.Real) and math.isfinite(value) else None
    if kind is str:
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        return value if isinstance(value, str) else None
    return None


def _show(value: Any) -> str:
    text = repr(value)
    text = text if len(text) <= 120 else f"{text[:117]}..."
    return text if value is None else f"{text} ({type(value).__name__})"
