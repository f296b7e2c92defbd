"""Values by declared type: text from the command line, objects from files."""

import pathlib
from typing import Literal

import numpy as np
import pytest

from llamajax.config.schema import RopeScaling
from llamajax.config.values import Mistyped, coerce, describe, parse

Floats = tuple[float, ...] | None


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        ("12", int, 12),
        ("1_000", int, 1000),
        ("1e3", int, 1000),
        ("-1", int, -1),
        ("9223372036854775807", int, 2**63 - 1),
        ("3", float, 3.0),
        ("2.5e-5", float, 2.5e-5),
        ("true", bool, True),
        ("False", bool, False),
        ("none", int | None, None),
        ("None", str | None, None),
        ("none", str, "none"),
        ("none", Literal["none", "full"], "none"),
        ("none", RopeScaling | None, None),
        ("1,2.5", Floats, (1.0, 2.5)),
        ("0.25, 0.75,", Floats, (0.25, 0.75)),
        ("a=b:c/d", str, "a=b:c/d"),
    ],
)
def test_text_becomes_the_declared_type(text, annotation, value):
    parsed = parse(text, annotation)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "annotation", "fragment"),
    [
        ("abc", int, "expected int, got 'abc'"),
        ("1.5", int, "expected int"),
        ("1e99999999999", int, "expected int"),
        ("", int, "expected int"),
        ("none", int, "expected int"),
        ("nan", float, "expected float"),
        ("inf", float, "expected float"),
        ("1e999", float, "expected float"),
        ("1", bool, "expected true | false"),
        ("ful", Literal["none", "full"], "did you mean full?"),
        ("1,x", Floats, "expected floats separated by commas or none, got 'x'"),
        ("8", RopeScaling | None, "set its keys: factor, low_freq_factor"),
    ],
)
def test_text_of_another_type_is_refused_with_both_named(text, annotation, fragment):
    with pytest.raises(Mistyped) as caught:
        parse(text, annotation)
    assert fragment in str(caught.value)


@pytest.mark.parametrize(
    ("given", "annotation", "value"),
    [
        (3, float, 3.0),
        (1e3, int, 1000),
        (np.int64(7), int, 7),
        (np.float32(0.5), float, 0.5),
        ([1, 2], Floats, (1.0, 2.0)),
        (None, Floats, None),
        (pathlib.PurePosixPath("a/b"), str, "a/b"),
    ],
)
def test_objects_become_the_declared_type(given, annotation, value):
    converted = coerce(given, annotation)
    assert converted == value
    assert type(converted) is type(value)


@pytest.mark.parametrize(
    ("given", "annotation"),
    [
        (True, int),
        (True, float),
        (1, bool),
        ("3", int),
        (3, str),
        (1.5, int),
        (float("nan"), float),
        (float("inf"), int),
        (None, int),
        ([1, "x"], Floats),
        (1.0, Floats),
        (["a"], str),
        (b"x", str),
    ],
)
def test_objects_of_another_type_are_refused(given, annotation):
    with pytest.raises(Mistyped, match="expected"):
        coerce(given, annotation)


def test_types_are_described_in_words():
    assert describe(int | None) == "int or none"
    assert describe(Literal["a", "b"]) == "a | b"
    assert describe(Floats) == "floats separated by commas or none"
