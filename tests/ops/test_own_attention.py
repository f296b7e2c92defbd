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
@pytest.mark.parametrize("name", ["attend", "unnamed", "attend_in_a_call", "unnamed_in_a_call"])
def test_what_is_right_is_proven(name, dtype):
    words, is_named = prove(f"own_attention:{name}", **SIZES | {"dtype": dtype})
    assert re.fullmatch(rf"{dtype} error \S+ forward, \S+ backward, against float64", words)
    assert is_named == name.startswith("attend")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("looks_ahead", ["2 x 20 tokens, 4 heads of 16 on 2", "1 x 40 tokens", "output", "dv"]),
        ("leaks", ["1 x 40 tokens, packed documents", "output"]),
        ("unscaled", ["output", "dq", "dk"]),
        ("interleaved", ["4 heads of 16 on 2: error of output"]),
        ("frozen_keys", ["tokens, 4 heads of 16 on 2: error of dk 1.0e+00; 2e-05 is allowed"]),
        ("rounded", ["output", "2e-05 is allowed"]),
        ("overflows", ["2 x 20 tokens, scores of about 100", "output nan"]),
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


def test_a_long_run_tries_its_remainder():
    with refused("  - 1 x 976 tokens, 1 heads of 8 on 1: error of output"):
        sizes = {"heads": (1, 1), "head_size": 8, "seq_len": 2000, "packed": False}
        prove("own_attention:whole_blocks", **SIZES | sizes)


@pytest.mark.parametrize("name", ["sys:exit", "builtins:len", "itertools:count"])
def test_a_function_of_no_file(name):
    with refused(f"train.attention = {name} fails with 2 x 20 tokens", "TypeError"):
        prove(name, **SIZES)


def test_a_run_without_documents_needs_none():
    prove("own_attention:alone", **SIZES | {"packed": False})


@pytest.mark.parametrize("key", ["train.attention", "optim.chain"])
@pytest.mark.parametrize(
    ("files", "module", "words"),
    [
        ({}, "missing", "KEY = MODULE:attend: Python finds no module MODULE; put MODULE into"),
        ({}, ".missing", "KEY = MODULE:attend: Python finds no module"),
        ({".py": ""}, "plain.attn", "Python finds no module MODULE;"),
        ({".py": "import own_nowhere"}, "dep", "line 1: ModuleNotFoundError: No module named"),
        ({".py": "\n1 / 0"}, "error", "error.py, line 2: ZeroDivisionError"),
        ({".py": "raise SystemExit(0)"}, "exit", "exit.py, line 1: SystemExit: 0"),
        (
            {"/__init__.py": "nothing", "/attn.py": ""},
            "pkg_error.attn",
            "__init__.py, line 1: NameError: name 'nothing'",
        ),
        (
            {".py": "def __getattr__(name):\n    raise ImportError(name)"},
            "lazy",
            "lazy.py, line 2: ImportError: attend",
        ),
    ],
)
def test_a_module_that_cannot_be_imported(tmp_path, monkeypatch, key, files, module, words):
    monkeypatch.syspath_prepend(tmp_path)
    module = module if module.startswith(".") else f"own_{key[:5]}_{module}"
    for end, text in files.items():
        path = tmp_path / f"{module.partition('.')[0]}{end}"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    with refused(words.replace("KEY", key).replace("MODULE", module)):
        import_function(f"{module}:attend", key=key)


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
