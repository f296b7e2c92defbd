"""What a run does without when a private part has changed, and the table of tested releases."""

import tomllib
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import tensorstore as ts
from jax._src import compilation_cache, xla_bridge
from jax._src.cudnn import fused_attention_stablehlo
from jax._src.interpreters import mlir
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils
from packaging.requirements import Requirement
from packaging.version import Version

from llamajax.backends import jax_private, machine_warnings
from llamajax.backends.jax_private import cache_hook, donation, orbax_tensorstore
from llamajax.backends.jax_private.experimental_warning import no_experimental_warning

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
PLATFORMS = ("cpu", "gpu", "tpu", "npu")


def test_every_private_part_is_there_in_the_installed_releases():
    assert jax_private.untested_versions() == []
    for platform in PLATFORMS:
        assert jax_private.lost_features(platform) == {}


@pytest.mark.parametrize(
    ("module", "name", "feature", "platforms"),
    [
        (compilation_cache, "get_file_cache", "atomic_compile_cache", PLATFORMS),
        (fused_attention_stablehlo, "MaskType", "cudnn_attention", ("gpu",)),
        (fused_attention_stablehlo, "_dot_product_attention_bwd_p", "cudnn_attention", ("gpu",)),
        (mlir, "_platforms_with_donation", "donation", ("npu",)),
        (tensorstore_utils, "_BASE_TS_CONTEXT", "tensorstore_options", PLATFORMS),
        (tensorstore_utils, "_use_gcs_driver", "tensorstore_options", PLATFORMS),
        (gcs_utils, "get_kvstore_for_gcs", "tensorstore_options", PLATFORMS),
    ],
)
def test_what_is_lost_is_named_on_the_platforms_that_lose_it(
    monkeypatch, module, name, feature, platforms
):
    monkeypatch.delattr(module, name)
    for platform in PLATFORMS:
        lost = jax_private.lost_features(platform)
        assert list(lost) == [feature] * (platform in platforms)
        assert all(version("jax") in why or "orbax" in why for why in lost.values())
    if feature == "tensorstore_options":
        assert not orbax_tensorstore.set_options(OPTIONS)


def test_a_run_says_in_one_warning_what_it_does_without(monkeypatch):
    monkeypatch.delattr(mlir, "_platforms_with_donation")
    monkeypatch.delattr(compilation_cache, "reset_cache")
    lost = jax_private.lost_features("npu")
    assert list(lost) == ["atomic_compile_cache", "donation"]
    machine = SimpleNamespace(platform="npu", note=None)
    (line,) = machine_warnings(machine)
    assert line.startswith("warning: this run does without atomic_compile_cache: jax ")
    assert "; donation: jax " in line
    machine = SimpleNamespace(platform="cpu", note="a variable was ignored")
    assert machine_warnings(machine)[0] == "warning: a variable was ignored"


def test_a_cache_that_opens_in_another_way_is_left_alone(monkeypatch):
    monkeypatch.setattr(compilation_cache, "get_file_cache", lambda path, backend: None)
    assert "JAX's own files" in cache_hook.problem()


def test_the_warning_of_an_experimental_platform_is_dropped(monkeypatch, caplog):
    fake = SimpleNamespace(factory=lambda: None, experimental=True)
    monkeypatch.setattr(xla_bridge, "_backend_factories", {"fake": fake})

    def records():
        with pytest.raises(RuntimeError, match="Could not initialize"):
            xla_bridge._init_backend("fake")
        return len(caplog.records)

    assert records() == 1
    with no_experimental_warning():
        assert records() == 1
    assert records() == 2


def test_an_untested_release_is_named(monkeypatch):
    monkeypatch.setattr(jax_private, "version", lambda name: "0.12.01")
    assert jax_private.untested_versions() == [
        "jax 0.12.01", "orbax-checkpoint 0.12.01", "grain 0.12.01",
    ]  # fmt: skip


def test_the_bounds_of_the_requirements_are_the_tested_releases():
    requirements = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    specifiers = {r.name: r.specifier for r in map(Requirement, requirements)}
    for name, tested in jax_private.TESTED.items():
        newest = max(map(Version, tested))
        assert all(specifiers[name].contains(v) for v in tested)
        assert not specifiers[name].contains(f"{newest.major}.{newest.minor + 1}")
    assert specifiers["jax"].contains("0.12.0.1")
    assert not specifiers["jax"].contains("0.9.2")


def is_donated(platform):
    traced = jax.jit(lambda x: 2 * x, donate_argnums=0).trace(jnp.ones(8))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    return "tf.aliasing_output" in text or "jax.buffer_donor" in text


def test_donated_memory_is_reused_on_a_platform_that_jax_does_not_know(monkeypatch):
    monkeypatch.setattr(mlir, "_platforms_with_donation", list(mlir._platforms_with_donation))
    with pytest.warns(UserWarning, match="donated buffers were not usable"):
        assert not is_donated("npu")
    donation.enable("npu")
    assert is_donated("npu")


OPTIONS = {
    "file_io_concurrency": {"limit": 7},
    "gcs_request_retries": {"max_retries": 3, "initial_delay": "2s", "max_delay": "3s"},
}


@pytest.fixture
def orbax_tables(monkeypatch):
    """Orbax's tables, of which changes are undone."""
    for name in ("_BASE_TS_CONTEXT", "_DEFAULT_OCDBT_TS_CONTEXT"):
        table = dict(getattr(tensorstore_utils, name))
        table.pop("gcs_request_retries", None)
        monkeypatch.setattr(tensorstore_utils, name, table)


@pytest.mark.parametrize("use_ocdbt", [False, True])
def test_the_installed_orbax_opens_tensorstore_with_our_options(orbax_tables, use_ocdbt):
    assert orbax_tensorstore.set_options(OPTIONS)
    context = tensorstore_utils.get_ts_context(use_ocdbt=use_ocdbt)
    assert isinstance(context, ts.Context)
    assert {name: context[name].to_json() for name in OPTIONS} == OPTIONS
