"""What every test runs under: 8 CPU devices, no implicit promotion, warnings as errors."""

import atexit
import importlib
import importlib.util
import os
import random
import shutil
import signal
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path

# Compiled programs are shared by the processes of this session: the workers of xdist, which find
# the variable set, and all that tests start. Programs of an earlier session, or in the home of
# whoever tests, must decide nothing here.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "true"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="llamajax-programs-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
    # What tests draw at random, such as the step at which they kill; set it to draw that again.
    os.environ.setdefault("LLAMAJAX_TEST_SEED", str(random.SystemRandom().randrange(10**6)))

import jax
import pytest
import warm  # noqa: F401 (now, for the environment of what it starts)

from llamajax.backends.compile_cache import enable

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
enable("auto", force=False)

SEED = os.environ["LLAMAJAX_TEST_SEED"]
REPOSITORY = Path(__file__).resolve().parents[1]
# Warnings by other people's packages about themselves and each other; ours are errors.
_NOT_OURS = (
    "ignore:builtin type .* has no __module__ attribute:DeprecationWarning",  # SWIG, sentencepiece
    r"ignore::FutureWarning:(transformers|peft|torch)\.",  # what each drops and the other calls
    r"ignore::DeprecationWarning:(transformers|peft|torch)\.",
)


def pytest_configure(config: pytest.Config) -> None:
    """Make every warning an error, where later lines take precedence; ignore no signal."""
    # What nohup or a shell's & has this process ignore, all that it starts would ignore as well.
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    for line in ("error", *_NOT_OURS):
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers of this test; its report names the seed when it fails."""
    print(f"drawn with LLAMAJAX_TEST_SEED={SEED}")
    return random.Random(f"{SEED} {request.node.name}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs transformers and torch, unless `-m` speaks of it."""
    if "live" in config.option.markexpr:
        return
    live = [item for item in items if item.get_closest_marker("live")]
    items[:] = [item for item in items if item not in live]
    config.hook.pytest_deselected(items=live)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    """Let a skipped module fail in CI."""
    return fail_in_ci((yield))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Let a skipped test fail in CI; only a `skipif` may speak of an optional extra."""
    report = yield
    return report if item.get_closest_marker("skipif") else fail_in_ci(report)


def fail_in_ci(report: pytest.TestReport | pytest.CollectReport) -> object:
    """Turn a skip into a failure under LLAMAJAX_CI=1: everything that tests need is there."""
    if report.skipped and os.environ.get("LLAMAJAX_CI") == "1" and not hasattr(report, "wasxfail"):
        *_, reason = report.longrepr
        report.outcome, report.longrepr = "failed", f"{reason}; LLAMAJAX_CI=1 allows no skip"
    return report


@pytest.fixture(scope="session")
def live() -> types.ModuleType:
    """The module that computes what transformers and torch say; an error without the two."""
    return importlib.import_module("write_references")


@pytest.fixture(scope="session")
def npu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of the test NPU (tests/npu), built once; skips without gcc."""
    spec = importlib.util.spec_from_file_location(
        "build_npu", REPOSITORY / "tests" / "npu" / "build.py"
    )
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    return builder.build_npu(tmp_path_factory.mktemp("npu"))


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real tokenizers and texts, which are never committed.

    From LLAMAJAX_ASSETS, or `../shared/assets` beside the checkout; the test is skipped without it.
    """
    named = os.environ.get("LLAMAJAX_ASSETS")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "assets"
    if not folder.is_dir():
        pytest.skip(f"no test assets in {folder}; set LLAMAJAX_ASSETS to their folder")
    return folder
