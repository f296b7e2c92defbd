"""A function of the user's in place of attention: it is found, called as documented, and proven."""

import re
import sys
from pathlib import Path

import pytest
from refusal import refused

from llamajax.config.user_code import import_function
from llamajax.ops.attention_own import prove

SIZES = {"dtype": "float32", "heads": (6, 3), "head_size": 16, "seq_len": 40, "packed": True}
PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["attend", "unnamed"])
def test_what_is_right_is_proven(name, dtype):
    words, is_named = prove(f"own_attention:{name}", **SIZES | {"dtype": dtype})
    assert re.fullmatch(rf"{dtype} error \S+ forward, \S+ backward, against float64", words)
    assert is_named == (name == "attend")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("looks_ahead", ["2 x 20 tokens, 4 heads of 16 on 2", "1 x 40 tokens", "output", "dv"]),
        ("leaks", ["1 x 40 tokens, packed documents", "output"]),
        ("unscaled", ["output", "dq", "dk"]),
        ("interleaved", ["4 heads of 16 on 2: error of output"]),
        ("frozen_keys", ["tokens, 4 heads of 16 on 2: error of dk 1.0e+00; 2e-05 is allowed"]),
        ("rounded", ["output", "2e-05 is allowed"]),
        ("not_a_number", ["output nan, dq nan"]),
        ("alone", ["with 2 x 20 tokens, packed documents", "NotImplementedError: this kernel"]),
        ("bfloat16_out", ["returned bfloat16 (2, 20, 4, 16), the queries are float32"]),
        ("of_arrays_alone", ["unexpected keyword argument 'segment_ids'"]),
        ("not_a_function", ["own_attention.py defines no function not_a_function"]),
        ("atend", ["did you mean attend?"]),
    ],
)
def test_what_is_wrong_is_named(name, words):
    with refused(f"train.attention = own_attention:{name}", *words):
        prove(f"own_attention:{name}", **SIZES)


def test_a_run_without_documents_needs_none():
    prove("own_attention:alone", **SIZES | {"packed": False})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "Python finds no module own_missing; put own_missing into"),
        ("import own_nowhere", "line 1: ModuleNotFoundError: No module named 'own_nowhere'"),
        ("\n1 / 0", "line 2: ZeroDivisionError"),
    ],
)
def test_a_module_that_cannot_be_imported(tmp_path, monkeypatch, text, words):
    monkeypatch.syspath_prepend(tmp_path)
    name = "own_missing" if text is None else f"own_{len(text)}"
    if text is not None:
        (tmp_path / f"{name}.py").write_text(text)
    with refused("train.attention = " if text is None else name, words):
        import_function(f"{name}:attend", key="train.attention")


@pytest.fixture
def of_the_page(tmp_path, monkeypatch):
    """The example of docs/kernels.md, as a module in the current directory."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "row_attention.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    return "row_attention:attend"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernel_of_the_page_is_right(of_the_page, dtype):
    _, is_named = prove(of_the_page, **SIZES | {"dtype": dtype})
    assert is_named
