"""Builds the test NPU, a PJRT plugin of our own in front of a real CPU one, with gcc.

`build_npu(directory)` gives the path of its library. npu.c says what it is; its options (all of
them typed) are listed in npu.h. `python tests/npu/build.py DIRECTORY` does the same by hand.
"""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_SOURCES = ("npu.c", "memory.c", "faults.c")
_HERE = Path(__file__).parent


def missing() -> str | None:
    """What the test NPU lacks here, in words; None where it can be built."""
    if shutil.which("gcc") is None:
        return "the test NPU needs gcc"
    for package in ("xla_plugins", "lammps_jax_pjrt_cpu"):
        if importlib.util.find_spec(package) is None:
            return "the test NPU needs the packages xla-cpu-pjrt and lammps-jax-pjrt-cpu"
    return None


def build_npu(directory: Path) -> Path:
    """Path of the plugin's library, compiled into `directory` (0.3 s).

    Skips the calling test where gcc or the CPU plugins behind it are missing.
    """
    if problem := missing():
        pytest.skip(problem)
    include = _package("xla_plugins") / "xla_cpu_pjrt" / "include"
    backing = _package("lammps_jax_pjrt_cpu") / "pjrt_c_api_cpu_plugin.so"
    library = Path(directory) / "libpjrt_npu.so"
    flags = "-shared -fPIC -O2 -std=gnu11 -D_GNU_SOURCE -Wall -Wextra -Werror -fvisibility=default"
    command = ["gcc", *flags.split(), f"-I{include}", f'-DBACKING="{backing}"', "-o", library]
    command += [*(_HERE / name for name in _SOURCES), "-ldl", "-lpthread"]
    subprocess.run(command, check=True)
    return library


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


if __name__ == "__main__":
    print(build_npu(Path(sys.argv[1])))
