"""Values by declared type: text from the command line, objects from files."""

import pathlib
from typing import Literal

import numpy as np
import pytest

from llamajax.config.model_schema import RopeScaling
from llamajax.config.values import Mistyped, coerce, parse, show

Floats = tuple[float, ...] | None
Choice = Literal["none", "full"]
Texts = tuple[str, ...]
Sets = dict[str, str] | None


@pytest.mark.parametrize(
    ("convert", "given", "annotation", "value"),
    [
        (parse, "12", int, 12),
        (parse, "1_000", int, 1000),
        (parse, "1e3", int, 1000),
        (parse, "-1", int, -1),
        (parse, "9223372036854775807", int, 2**63 - 1),
        (parse, "3", float, 3.0),
        (parse, "2.5e-5", float, 2.5e-5),
        (parse, "true", bool, True),
        (parse, "False", bool, False),
        (parse, "none", int | None, None),
        (parse, "None", str | None, None),
        (parse, "none", str, "none"),
        (parse, "none", Choice, "none"),
        (parse, "none", RopeScaling | None, None),
        (parse, "1,2.5", Floats, (1.0, 2.5)),
        (parse, "0.25, 0.75,", Floats, (0.25, 0.75)),
        (parse, "a=b:c/d", str, "a=b:c/d"),
        (parse, '["Well, ", " so", ""]', Texts, ("Well, ", " so", "")),
        (parse, "book:a/b, code-2:c:d", Sets, {"book": "a/b", "code-2": "c:d"}),
        (parse, "a: x, b :y", Sets, {"a": "x", "b": "y"}),
        (parse, "far:gs://bucket/x", Sets, {"far": "gs://bucket/x"}),
        (parse, "none", Sets, None),
        (parse, show({}), Sets, None),
        (coerce, {"book": pathlib.PurePosixPath("a/b")}, Sets, {"book": "a/b"}),
        (coerce, 3, float, 3.0),
        (coerce, 1e3, int, 1000),
        (coerce, np.int64(7), int, 7),
        (coerce, np.float32(0.5), float, 0.5),
        (coerce, [1, 2], Floats, (1.0, 2.0)),
        (coerce, None, Floats, None),
        (coerce, pathlib.PurePosixPath("a/b"), str, "a/b"),
    ],
)
def test_values_become_the_declared_type(convert, given, annotation, value):
    converted = convert(given, annotation)
    assert converted == value
    assert type(converted) is type(value)


@pytest.mark.parametrize(
    ("convert", "given", "annotation", "fragment"),
    [
        (parse, "abc", int, "expected int, got 'abc'"),
        (parse, "1.5", int, "expected int"),
        (parse, "1e99999999999", int, "expected int"),
        (parse, "", int, "expected int"),
        (parse, "none", int, "expected int"),
        (parse, "nan", float, "expected float"),
        (parse, "inf", float, "expected float"),
        (parse, "1e999", float, "expected float"),
        (parse, "1", bool, "expected true | false"),
        (parse, "ful", Choice, "did you mean full?"),
        (parse, "1,x", Floats, "expected floats separated by commas or none, got 'x'"),
        (parse, "8", RopeScaling | None, "set its keys: type, factor"),
        (parse, "[1", Texts, "begins with [ and is no JSON list: "),
        (parse, "book", Sets, "expected NAME:VALUE pairs separated by commas or none, got 'book'"),
        (parse, "", Sets, "expected NAME:VALUE pairs"),
        (parse, "gs://bucket/x", Sets, "write NAME:gs://bucket/x"),
        (parse, "a: ,b:c", Sets, "expected NAME:VALUE pairs"),
        (parse, "a:b,a:c", Sets, "names 'a' twice"),
        (parse, "a.b:c", Sets, "the name 'a.b' may have letters, digits, _ and - only"),
        (coerce, {"a/b": "c"}, Sets, "the name 'a/b'"),
        (coerce, ["a"], Sets, "expected NAME:VALUE pairs"),
        (coerce, True, int, "expected int, got True (bool)"),
        (coerce, True, float, "expected"),
        (coerce, 1, bool, "expected"),
        (coerce, "3", int, "expected int, got '3' (str)"),
        (coerce, 3, str, "expected"),
        (coerce, 1.5, int, "expected"),
        (coerce, float("nan"), float, "expected"),
        (coerce, float("inf"), int, "expected"),
        (coerce, None, int, "expected int, got None"),
        (coerce, [1, "x"], Floats, "expected"),
        (coerce, 1.0, Floats, "expected"),
        (coerce, ["a"], str, "expected"),
        (coerce, b"x", str, "expected"),
    ],
)
def test_values_of_another_type_are_refused_with_both_named(convert, given, annotation, fragment):
    with pytest.raises(Mistyped) as caught:
        convert(given, annotation)
    assert fragment in str(caught.value)
