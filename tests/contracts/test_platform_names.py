"""Nothing outside backends/ asks which platform or device it runs on: it asks for a property.

Read from the source: a comparison with the name of a platform, or with a device kind, is refused.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamajax.backends.platforms import PLATFORMS

PACKAGE = Path(__file__).resolve().parents[2] / "llamajax"
NAMES = {name for entry in PLATFORMS for name in entry.names}
MAKERS = ("NVIDIA", "AMD", "TPU", "Intel", "Ascend")
FILES = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if "backends" not in path.relative_to(PACKAGE).parts
]


def complaints(tree: ast.AST, name: str) -> Iterator[str]:
    """Lines that decide something by the name of a platform or of a device."""
    for node in ast.walk(tree):
        asked: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            asked = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            asked = [node.value]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in ("startswith", "endswith"):
                asked = list(node.args)
            elif node.func.attr == "get" and "platform" in ast.unparse(node):
                asked = [node.func.value]
        elif isinstance(node, ast.Subscript) and "platform" in ast.unparse(node.slice):
            asked = [node.value]
        for part in asked:
            for leaf in ast.walk(part):
                if not (isinstance(leaf, ast.Constant) and isinstance(leaf.value, str)):
                    continue
                if leaf.value in NAMES or leaf.value.startswith(MAKERS):
                    yield f"{name}:{node.lineno} decides by {leaf.value!r}: ask backends/ instead"


def test_no_part_decides_by_the_name_of_a_platform():
    found = [
        complaint
        for path in FILES
        for complaint in complaints(
            ast.parse(path.read_text(encoding="utf-8")), path.relative_to(PACKAGE).as_posix()
        )
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        'x = machine.platform == "cpu"',
        'x = platform in ("cuda", "gpu")',
        'x = {"tpu": 1}[platform]',
        'x = {"tpu": 1}.get(platform, 2)',
        'x = device.device_kind.startswith("NVIDIA")',
        'match platform:\n    case "rocm":\n        pass',
    ],
)
def test_a_decision_is_found(source):
    assert len(list(complaints(ast.parse(source), "x.py"))) >= 1


@pytest.mark.parametrize(
    "source",
    [
        'backends.start(BackendConfig(name="cpu"))',
        "x = is_host(platform)",
        'doc = "cpu, cuda, tpu"',
    ],
)
def test_a_choice_is_no_decision(source):
    assert list(complaints(ast.parse(source), "x.py")) == []
