"""Architecture, read from the source: imports point down, and sizes stay readable.

Each rule is a function from a module's syntax tree to complaints, and is itself shown to complain.
"""

import ast
import collections
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamajax.backends.platforms import PLATFORMS

PACKAGE = Path(__file__).resolve().parents[2] / "llamajax"
FLOORS = {
    "errors": 0,
    "verbs": 1,
    "files": 1,
    "config": 2,
    "processes": 2,
    "backends": 3,
    "sharding": 4,
    "monitoring": 4,
    "tokenizers": 4,
    "ops": 5,
    "optim": 5,
    "models": 6,
    "data": 6,
    "checkpoint": 6,
    "corpus": 7,
    "formats": 7,
    "decoding": 8,
    "evaluation": 9,
    "training": 10,
    "planning": 11,
    "conformance": 11,
    "launching": 11,
    "replaying": 11,
    "proving": 12,
}
VERBS = (
    "prepare", "train", "evaluate", "generate", "convert", "plan", "doctor", "report", "launch",
    "verify_resume", "replay",
)  # fmt: skip
FLOORS |= dict.fromkeys(VERBS, 13) | {"cli": 14, "__main__": 15}

FILE_LINES = 400
FOLDER_FILES = 20
FUNCTION_LINES = 60
CLASS_FIELDS = 10
PARAMETERS = 6
# Where a list of things is the point, and no object is missing.
LONG_LISTS = {
    "config/data_schema.py:DataConfig": "keys of a config",
    "config/model_schema.py:ModelConfig": "keys of a config",
    "config/optim_schema.py:OptimConfig": "keys of a config",
    "config/schema.py:TrainConfig": "keys of a config",
    "config/schema.py:BackendConfig": "keys of a config",
    "corpus/prepare_options.py:PrepareOptions": "flags of a verb",
    "decoding/generate_options.py:GenerateOptions": "flags of a verb",
    "evaluation/evaluate_options.py:EvaluateOptions": "flags of a verb",
    "backends/platforms.py:Platform": "a row of the table of platforms",
    "backends/device_data.py:Device": "a row of the table of devices",
    "backends/devices.py:_Entry": "keys of a user's table of devices",
    "backends/runtime.py:Machine": "facts of run.json",
    "ops/cross_entropy.py:cross_entropy": "four arrays, and what they are computed with",
    "backends/jax_private/cudnn.py:backward": "arrays, in the order that JAX passes them",
    "ops/attention.py:check_supported": "facts of a machine and a model, each with a rule",
    "evaluation/scoring.py:score": "what is scored, on what, and how it is shown",
}
OTHER_LIMITS = {"training/step.py": 40, "training/loop.py": 100}
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}
# A module mutated inside these and not returned is lost without an error.
FORBIDDEN_NNX = {"jit", "scan", "split", "merge", "Optimizer", "remat", "grad", "value_and_grad"}

PLATFORM_NAMES = {name for entry in PLATFORMS for name in entry.names}
MAKERS = ("NVIDIA", "AMD", "TPU", "Intel", "Ascend")

# These begin with an underscore and are public nevertheless.
OPEN_NAMES = {"_asdict", "_exit", "_fields", "_make", "_replace"}

FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """`training/step.py`, as the rules and the messages name a file."""
    return path.relative_to(PACKAGE).as_posix()


def part_of(name: str) -> str:
    """The package or verb that a file belongs to."""
    return name.partition("/")[0].removesuffix(".py")


def imported_modules(tree: ast.AST, name: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of what is imported of llamajax, lazily and for types as well."""
    for node in ast.walk(tree):
        found = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            folders = ["llamajax", *name.split("/")][: -node.level] if node.level else []
            module = ".".join(filter(None, [*folders, node.module]))
            found = [f"{module}.{alias.name}" for alias in node.names]
        yield from ((node.lineno, each) for each in found if each.startswith("llamajax."))


def check_floor(tree: ast.AST, name: str) -> Iterator[str]:
    """Imports of the same floor, of a higher one, or of a part that has no floor."""
    own = part_of(name)
    if own == "__init__":
        return
    for line, module in imported_modules(tree, name):
        part = module.split(".")[1]
        if part == own:
            continue
        if part not in FLOORS:
            yield f"{name}:{line} imports llamajax.{part}, which has no floor"
        elif FLOORS[part] >= FLOORS[own]:
            yield (
                f"{name}:{line} (floor {FLOORS[own]}) imports llamajax.{part} "
                f"(floor {FLOORS[part]}): imports point down"
            )


def check_environment(tree: ast.AST, name: str) -> Iterator[str]:
    """Process-wide settings outside backends/: os.environ, os.getenv, jax.config.update."""
    if part_of(name) == "backends":
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if text in ("os.environ", "os.environb", "os.getenv", "os.putenv", "jax.config"):
                yield f"{name}:{node.lineno} uses {text}; only backends/ may"
        if isinstance(node, ast.ImportFrom):
            taken = {alias.name for alias in node.names}
            if node.module == "os" and taken & {"environ", "getenv", "putenv"}:
                yield f"{name}:{node.lineno} imports the environment; only backends/ may"
            if node.module == "jax" and "config" in taken:
                yield f"{name}:{node.lineno} imports jax.config; only backends/ may"


def check_private(tree: ast.AST, name: str) -> Iterator[str]:
    """Private names of other packages outside backends/jax_private/, as text as well."""
    if name.startswith("backends/jax_private/"):
        return
    for node in ast.walk(tree):
        named = []
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names if "._" in alias.name]
        elif isinstance(node, ast.ImportFrom):
            named = [f"{node.module}.{alias.name}" for alias in node.names]
            named = [module for module in named if "._" in module]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            named = re.findall(r"^\w[\w.]*\._src\b\S*", node.value)
        elif isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            named = [ast.unparse(node)] if not own and node.attr not in OPEN_NAMES else []
        for text in named:
            yield f"{name}:{node.lineno} uses {text}; only backends/jax_private/ may"


def check_functions(tree: ast.AST, name: str) -> Iterator[str]:
    """Functions that don't fit on a screen."""
    limit = OTHER_LIMITS.get(name, FUNCTION_LINES)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > limit:
                yield f"{name}:{node.lineno} {node.name} has {lines} lines, limit {limit}"


def fields_of(node: ast.ClassDef) -> set[str]:
    """Names that a class declares, or that its __init__ sets."""
    declared = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
    inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    stored = {
        n.attr
        for init in inits
        for n in ast.walk(init)
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)
    }
    return declared | stored


def check_lists(tree: ast.AST, name: str) -> Iterator[str]:
    """Classes and functions in which an object is missing: too many fields or parameters."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            found, limit, what = fields_of(node), CLASS_FIELDS, "fields"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            a = node.args
            found = {arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs)} - {"self", "cls"}
            limit, what = PARAMETERS, "parameters"
        else:
            continue
        if len(found) > limit and f"{name}:{node.name}" not in LONG_LISTS:
            yield f"{name}:{node.lineno} {node.name} has {len(found)} {what}, limit {limit}"


def check_transforms(tree: ast.AST, name: str) -> Iterator[str]:
    """NNX's own transforms: only jax.* ones are used."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "nnx" and node.attr in FORBIDDEN_NNX:
                yield f"{name}:{node.lineno} uses nnx.{node.attr}; use the jax transform"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flax.nnx"):
            yield f"{name}:{node.lineno} imports from flax.nnx; write nnx.NAME"


def check_platforms(tree: ast.AST, name: str) -> Iterator[str]:
    """Decisions by the name of a platform or of a device outside backends/: ask for a property."""
    if part_of(name) == "backends":
        return
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
                if leaf.value in PLATFORM_NAMES or leaf.value.startswith(MAKERS):
                    yield f"{name}:{node.lineno} decides by {leaf.value!r}: ask backends/ instead"


LONG = [f"self.x{i}" for i in range(11)] + ["1"]
CHECKS = [
    check_floor, check_environment, check_private, check_functions, check_lists, check_transforms,
    check_platforms,
]  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_package_keeps_the_rule(check):
    complaints = [
        complaint
        for path in FILES
        for complaint in check(ast.parse(path.read_text(encoding="utf-8")), name_of(path))
    ]
    assert complaints == []


@pytest.mark.parametrize(
    ("check", "name", "source"),
    [
        (check_floor, "ops/rope.py", "from llamajax.models import llama"),
        (check_floor, "models/llama.py", "import llamajax.data.shards"),
        (check_floor, "config/load.py", "def f():\n    from llamajax import backends"),
        (check_floor, "data/x.py", "from ..models import llama"),
        (check_floor, "train.py", "from llamajax.prepare import main"),
        (check_floor, "ops/x.py", "from llamajax.newcomer import y"),
        (check_environment, "data/x.py", "import os\nos.environ['A'] = 'b'"),
        (check_environment, "train.py", "from os import getenv"),
        (check_environment, "training/x.py", "import jax\njax.config.update('a', 1)"),
        (check_environment, "training/x.py", "from jax import config"),
        (check_private, "data/x.py", "from grain._src.core import transforms"),
        (check_private, "ops/x.py", "def f():\n    from jax import _src"),
        (check_private, "ops/x.py", "import jax._src.config"),
        (check_private, "backends/x.py", "logging.getLogger('jax._src.xla_bridge')"),
        (check_private, "checkpoint/x.py", "self._orbax._handler"),
        (check_functions, "ops/x.py", "def f():\n" + "    pass\n" * 60),
        (check_functions, "training/step.py", "def f():\n" + "    pass\n" * 40),
        (check_lists, "ops/x.py", "def f(a, b, c, *, d, e, f, g): pass"),
        (check_lists, "ops/x.py", "class A:\n" + "".join(f"    x{i}: int\n" for i in range(11))),
        (check_lists, "ops/x.py", "class A:\n def __init__(self):\n  " + "=".join(LONG)),
        (check_transforms, "training/x.py", "nnx.jit(f)"),
        (check_transforms, "training/x.py", "from flax.nnx import jit"),
        (check_platforms, "x.py", 'x = machine.platform == "cpu"'),
        (check_platforms, "x.py", 'x = {"tpu": 1}[platform]'),
        (check_platforms, "x.py", 'x = {"tpu": 1}.get(platform, 2)'),
        (check_platforms, "x.py", 'x = device.device_kind.startswith("NVIDIA")'),
        (check_platforms, "x.py", 'match platform:\n    case "rocm":\n        pass'),
        (check_platforms, "x.py", 'x = platform in ("cuda", "npu")'),
    ],
)
def test_the_rule_complains(check, name, source):
    assert len(list(check(ast.parse(source), name))) == 1


@pytest.mark.parametrize(
    ("check", "name", "source"),
    [
        (check_floor, "models/llama.py", "from llamajax.ops import rope\nimport llamajax.config"),
        (check_floor, "data/x.py", "from .shards import y\nfrom llamajax.data import z"),
        (check_floor, "train.py", "from llamajax.training import loop"),
        (check_environment, "backends/x.py", "import jax, os\nos.environ\njax.config.update(1)"),
        (check_private, "backends/jax_private/x.py", "from jax._src import config\nconfig._x"),
        (
            check_private,
            "data/x.py",
            "self._x\ncls._y\nrow._replace(a=1)\nimport jax.numpy\n'a._srcs'",
        ),
        (check_functions, "ops/x.py", "def f():\n" + "    pass\n" * 59),
        (check_lists, "ops/x.py", "class A:\n def f(self, a, b, c, d, e, f): self.x = 1"),
        (check_transforms, "models/x.py", "nnx.Module, nnx.Param, jax.jit"),
        (check_platforms, "x.py", 'backends.start(BackendConfig(name="cpu"))'),
        (check_platforms, "x.py", 'x = is_host(platform)\ndoc = "cpu, cuda, tpu"'),
        (check_platforms, "backends/x.py", 'x = machine.platform == "cpu"'),
    ],
)
def test_the_rule_is_silent(check, name, source):
    assert list(check(ast.parse(source), name)) == []


def test_every_exception_is_still_needed(monkeypatch):
    allowed = set(LONG_LISTS)
    monkeypatch.setitem(globals(), "LONG_LISTS", {})
    found = set()
    for path in FILES:
        for complaint in check_lists(ast.parse(path.read_text(encoding="utf-8")), name_of(path)):
            where, name, *_ = complaint.split()
            found.add(f"{where.partition(':')[0]}:{name}")
    assert found == allowed


def test_every_part_has_a_floor():
    parts = {part_of(name_of(path)) for path in FILES} - {"__init__"}
    assert parts <= set(FLOORS)


def test_files_can_be_read_at_one_go():
    long = {
        name_of(path): lines
        for path in FILES
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > FILE_LINES
    }
    assert long == {}


def test_no_package_has_too_many_files():
    counts = collections.Counter(path.parent for path in FILES if path.name != "__init__.py")
    assert {name_of(p): n for p, n in counts.items() if n > FOLDER_FILES} == {}


def test_no_file_imports_itself_through_others():
    """A package's `__init__.py` is no file of its own here: its modules are."""
    files = {path: name_of(path) for path in FILES if path.name != "__init__.py"}
    modules = {"llamajax." + name[:-3].replace("/", "."): name for name in files.values()}
    imports = {
        name: {
            modules.get(found) or modules.get(found.rpartition(".")[0])
            for _, found in imported_modules(ast.parse(path.read_text("utf-8")), name)
        }
        for path, name in files.items()
    }
    graphlib.TopologicalSorter({n: others - {n, None} for n, others in imports.items()}).prepare()


def test_no_file_has_a_name_that_says_nothing():
    assert [name_of(path) for path in FILES if path.stem in VAGUE_NAMES] == []
