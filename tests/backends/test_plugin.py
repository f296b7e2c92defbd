"""Bare PJRT libraries: typed options, what is wrong with a file, and what JAX is told."""

import json
import os
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from refusal import refused

from llamajax.backends.plugin import built_for, check_library, named_to_jax, typed_options, why_not
from llamajax.config.schema import BackendConfig

_TABLE = """
#include <stddef.h>
struct { size_t size; void* more; struct { size_t size; void* more; int v[2]; } version; }
  table = {40, NULL, {24, NULL, {%d, %d}}};
void* GetPjrtApi(void) { return &table; }
"""


@pytest.fixture
def compiled(tmp_path):
    """A function from C source to the path of a library made of it."""
    if shutil.which("gcc") is None:
        pytest.skip("these libraries are made by gcc, which is not here")

    def build(source: str, name: str = "libpjrt_x.so", *flags: str) -> Path:
        library = tmp_path / name
        command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library), *flags]
        subprocess.run(command, input=source, text=True, check=True)
        return library

    return build


def test_options_have_the_types_that_pjrt_wants():
    found = typed_options('a=8,b=-1,c=2.0,d=1e9,e=true,f=false,g=fast,h="8",i=True,j=1.5.2,k=')
    assert found == {
        "a": 8, "b": -1, "c": 2.0, "d": 1e9, "e": True, "f": False, "g": "fast", "h": "8",
        "i": "True", "j": "1.5.2", "k": "",
    }  # fmt: skip
    types = [type(found[name]) for name in "acdeg"]
    assert types == [int, float, float, bool, str]
    assert typed_options(None) == {}


def test_options_that_cannot_be_read_are_all_named():
    with refused("'b' is not k=v", "'=3' is not k=v", "a is there twice"):
        typed_options("a=1,b,=3,a=2")


def test_the_version_is_read_before_jax_sees_the_library(compiled):
    assert check_library(compiled(_TABLE % (0, 81))) == (0, 81)


@pytest.mark.parametrize("version", [(0, 28), (1, 0)])
def test_a_version_that_jax_refuses_is_named(compiled, version):
    library = compiled(_TABLE % version)
    with refused(f"offers version {version[0]}.{version[1]} of the PJRT"):
        check_library(library)


def test_what_is_no_plugin_is_named(tmp_path):
    (tmp_path / "text.so").write_text("hello" * 100)
    for library, words in {
        tmp_path / "absent.so": "cannot be loaded: cannot open shared object file: No such file",
        tmp_path / "text.so": "cannot be loaded: invalid ELF header; give the path",
        next((Path(np.__file__).parent / "_core").glob("*.so")): "without a function GetPjrtApi",
    }.items():
        with refused(f"backend.plugin = {library}: ", words):
            check_library(library)


def test_a_library_that_lacks_another_is_told_where_to_look(compiled, tmp_path):
    compiled("int runtime(void) { return 1; }", "libvendor_runtime.so")
    source = "int runtime(void); int call(void) { return runtime(); }"
    library = compiled(source, "libpjrt_y.so", f"-L{tmp_path}", "-lvendor_runtime")
    (tmp_path / "libvendor_runtime.so").unlink()
    with refused("cannot be loaded: libvendor_runtime.so: ", "LD_LIBRARY_PATH"):
        check_library(library)


def test_jax_is_told_only_while_it_looks(compiled, monkeypatch):
    monkeypatch.setenv("PJRT_NAMES_AND_LIBRARY_PATHS", "other:/x.so")
    library = compiled(_TABLE % (0, 90))
    config = BackendConfig(name="npu", plugin=str(library), options="n=2,level=0.5,fast=true,k=v")
    with named_to_jax(config):
        name, _, file = os.environ["PJRT_NAMES_AND_LIBRARY_PATHS"].partition(":")
        told = json.loads(Path(file).read_text())
    assert name == "npu"
    options = {"n": 2, "level": 0.5, "fast": True, "k": "v"}
    assert told == {"library_path": str(library), "create_options": options}
    assert os.environ["PJRT_NAMES_AND_LIBRARY_PATHS"] == "other:/x.so"
    assert not Path(file).exists()


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("Backend 'npu' is not in the list of known backends: ['cpu', 'tpu'].", "knows cpu, tpu"),
        ("INVALID_ARGUMENT: no option level (set JAX_PLATFORMS='' to ...)", "Correct backend.opt"),
        ("INTERNAL: driver 12", "is it visible to this process"),
    ],
)
def test_what_to_do_follows_from_the_reason(reason, words):
    config = BackendConfig(name="npu", plugin="/x.so", options="level=1")
    said = why_not("npu", f"Unable to initialize backend 'npu': {reason}", config)
    assert words in said
    assert said.startswith("backend 'npu' did not come up: ")
    assert "JAX_PLATFORMS" not in said


INSTALLED = f"installed: jax {version('jax')}"


def client(stablehlo, platform="npu"):
    """What JAX makes of a plugin with this StableHLO."""
    return SimpleNamespace(
        stablehlo_current_version=stablehlo,
        pjrt_c_api_major_version=0,
        pjrt_c_api_minor_version=90,
        platform=platform,
    )


@pytest.mark.parametrize(
    ("stablehlo", "words"),
    [
        ([1, 20, 5], "0.11.2 (StableHLO 1.20,"),
        ([1, 9, 0], "older than 0.10.0 (StableHLO 1.9,"),
        ([1, 18, 0], "between 0.10.0 and 0.12.0 (StableHLO 1.18,"),
        ([2, 0, 0], "newer than 0.12.0 (StableHLO 2.0,"),
    ],
)
def test_the_jax_that_a_plugin_was_built_for_is_told_by_its_stablehlo(stablehlo, words):
    config = BackendConfig(name="npu", plugin="/x/libpjrt_npu.so")
    assert built_for(config, client(stablehlo)) == (
        f"built for jax {words} PJRT C API 0.90); {INSTALLED}"
    )
    assert built_for(BackendConfig(name="cpu"), SimpleNamespace()) is None


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A plugin's package on the path: its library, and its wishes."""
    metadata = tmp_path / "npu_jax-1.2.dist-info"
    metadata.mkdir()
    wishes = ("jax==0.7.1", "jaxlib<=0.7.1", "jax-cuda13-plugin", 'jax; extra == "all"')
    lines = ["Metadata-Version: 2.1", "Name: npu-jax", "Version: 1.2"]
    lines += [f"Requires-Dist: {wish}" for wish in wishes]
    (metadata / "METADATA").write_text("\n".join(lines))
    (metadata / "RECORD").write_text("npu/libpjrt_npu.so,,\n")
    (metadata / "entry_points.txt").write_text("[jax_plugins]\nvendor = npu.jax_plugin\n")
    (tmp_path / "npu").mkdir()
    (tmp_path / "npu/libpjrt_npu.so").touch()
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "npu/libpjrt_npu.so"


def test_a_package_tells_which_jax_it_wants(package):
    wants = f"npu-jax 1.2 wants jax==0.7.1, jaxlib<=0.7.1; {INSTALLED}"
    for config in (
        BackendConfig(name="npu"),
        BackendConfig(name="other", plugin=str(package)),
        BackendConfig(),
    ):
        assert built_for(config, client([1, 20, 0])).endswith(f"; {wants}")
    assert f"did not come up: no device [{wants}]." in why_not(
        "npu", "no device", BackendConfig(name="npu")
    )
    other = BackendConfig(name="npu", plugin="/elsewhere/libpjrt_npu.so")
    assert built_for(other, client([1, 20, 0])).endswith(f"; {INSTALLED}")
    assert "wants" not in built_for(other, client([1, 20, 0]))


def test_a_refused_version_names_the_package(package, compiled):
    compiled(_TABLE % (0, 28)).replace(package)
    with refused("npu-jax 1.2 wants jax==0.7.1, jaxlib<=0.7.1; inst"):
        check_library(package)
