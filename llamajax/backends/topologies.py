"""Make JAX device objects of hardware that is not here, to compile for: `v5p:4x4x4`, `h200:64`.

`2*v5p:4x4x4` is two slices of TPUs joined by the data-center network, `2*b200:9x8` two NVLink
domains of 9 hosts; without a number before it each host of GPUs is a domain of its own.

TPUs through the libtpu wheel, NVIDIA GPUs through the compile-only path of JAX's CUDA plugin (no
driver, no NVIDIA library, no GPU), any number of virtual CPU devices, and whatever other PJRT
plugin implements topologies. Nothing here runs a program.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from llamajax.backends import devices, runtime
from llamajax.backends.compiler_options import COMPILER_VARIABLES
from llamajax.backends.plugin import named_to_jax
from llamajax.backends.repairs import apply_to_lowering, choose_repairs, read_verdict
from llamajax.config.schema import BackendConfig
from llamajax.errors import UserError, did_you_mean, nearest

GPUS_A_NODE = 8
TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
GPUS = ("a100", "h100", "h200", "b200")

# The chips that share a host, which a topology's shape must be a multiple of; smaller slices are
# one host.
_HOST = (2, 2, 1)


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to plan for, and the machine that a run would get there.

    entry: theirs in the device table, None where they are unknown. devices_a_node: how many in a
    row fast links join, where JAX's devices do not tell.
    """

    text: str
    machine: runtime.Machine
    devices: tuple[Any, ...]
    entry: devices.Device | None
    devices_a_node: int | None = None


def absent_devices(text: str, backend: BackendConfig) -> Target:
    """Return the devices that `text` (KIND:SHAPE) means, with JAX itself started on the CPU.

    backend: names a plugin's library, if any. Raises UserError for a kind or shape that nothing
    here can compile for, naming the nearest kind or what is to be installed.
    """
    count, kind, shape, sizes = _parse(text)
    devices.use_device_table(backend.device_table)
    is_plugin = kind not in (*TPUS, *GPUS, "cpu")
    if is_plugin and not (backend.plugin and backend.name == kind):
        backend = BackendConfig(repairs=backend.repairs)
    _start_host(backend, num_cpu_devices=sizes[0] if kind == "cpu" else 1)
    packages = ["jax", "jaxlib"]
    if kind == "cpu":
        found, packages = jax.devices()[: sizes[0]], ["jaxlib"]
    elif kind in TPUS:
        found = _tpus(text, kind, sizes, slices=count or 1)
        packages.append("libtpu")
    elif kind in GPUS:
        found = _gpus(text, kind, sizes, domains=count)
        packages.append("jax-cuda13-plugin")
    else:
        found = _of_plugin(text, kind, shape)
    first, num_processes = found[0], len({device.process_index for device in found})
    machine = runtime.Machine(
        platform=first.platform,
        device_kind=first.device_kind,
        num_devices=len(found),
        num_processes=num_processes,
        process_id=0,
        compute_capability=_GPU[kind].capability if kind in GPUS else None,
        # of what compiles for it, and the flags that change what it does
        versions={name: importlib.metadata.version(name) for name in packages}
        | {name: os.environ[name] for name in COMPILER_VARIABLES if os.environ.get(name)},
        platform_version=runtime.platform_version(first),
    )
    repairs = choose_repairs(backend.repairs, machine.platform, read_verdict(machine))
    apply_to_lowering(machine.platform, repairs)
    return Target(
        text=f"{count}*{kind}:{shape}" if count else f"{kind}:{shape}",
        machine=dataclasses.replace(machine, repairs=repairs),
        devices=tuple(found),
        entry=devices.find(machine.device_kind),
        # JAX gives all GPUs that are not here the same slice_index.
        devices_a_node=len(found) // (count or num_processes) if kind in GPUS else None,
    )


def _parse(text: str) -> tuple[int | None, str, str, list[int]]:
    """Return the number before `*`, the kind, the shape, and its sizes (none of a plugin's)."""
    example = "write KIND:SHAPE, for example v5p:4x4x4, 2*v5p:4x4x4, h200:64, h100:8x8 or cpu:8"
    parts = re.fullmatch(r" *(?:([1-9]\d*) *\* *)?([^:*]*[^:* ]) *: *(.*[^ ]) *", text)
    if not parts:
        raise UserError(f"--devices={text}: {example}")
    count, kind, shape = parts[1] and int(parts[1]), parts[2], parts[3]
    known = kind.lower()
    if count and known not in (*TPUS, *GPUS):
        raise UserError(
            f"--devices={text}: N* counts slices of TPUs or NVLink domains of GPUs "
            f"({', '.join((*TPUS, *GPUS))}); write {kind}:{shape}"
        )
    if known not in (*TPUS, *GPUS, "cpu"):
        return count, kind, shape, []
    shape = shape.lower()
    sizes = [int(n) for n in shape.split("x")] if re.fullmatch(r"\d+(x\d+)*", shape) else []
    if not sizes or 0 in sizes:
        raise UserError(f"--devices={text}: {shape!r} is not a shape; {example}")
    if known == "cpu" and len(sizes) != 1:
        raise UserError(f"--devices={text}: cpu takes one number, for example cpu:8")
    return count, known, shape, sizes


def _start_host(backend: BackendConfig, *, num_cpu_devices: int) -> None:
    """Start JAX on the CPU, which lowers for every target, with that many devices at least."""
    # libtpu asks the cloud's metadata server who it is, waits, and complains; no need here. Nor
    # does one that only compiles need to be the only one on the machine.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    jax.config.update("jax_platforms", "cpu")
    if jax.config.jax_num_cpu_devices < num_cpu_devices:
        jax.config.update("jax_num_cpu_devices", num_cpu_devices)
    with named_to_jax(backend):
        jax.devices()  # JAX looks for plugins now


def _tpus(text: str, kind: str, sizes: list[int], *, slices: int) -> list[Any]:
    words, example = ("two", "2x4") if kind in ("v5e", "v6e") else ("three", "4x4x4")
    if len(sizes) != len(example.split("x")):
        raise UserError(
            f"--devices={text}: a slice of {kind} has {words} sides, counted in chips, for example "
            f"{kind}:{example}"
        )
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    host = _HOST[: len(sizes)]
    if any(size % side for size, side in zip(sizes, host, strict=True)):
        if max(sizes) > 2:  # not a part of one host
            raise UserError(
                f"--devices={text}: chips come in hosts of {'x'.join(map(str, host))}; each side "
                "must be a multiple of the host's"
            )
        options["chips_per_host_bounds"] = [*sizes, *([1] * (3 - len(sizes)))]
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--devices={text}: compiling for TPUs needs the libtpu wheel of this jax release; no "
            "TPU is needed. Install it with: pip install -e '.[plan-tpu]'"
        )
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # one device a chip, as on the hardware
    name = f"{kind}:{'x'.join(map(str, sizes))}"
    try:
        return list(topologies.get_topology_desc(name, "tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        line = str(error).splitlines()[0]
        raise UserError(f"--devices={text}: libtpu has no such slice: {line}") from None


@dataclasses.dataclass(frozen=True)
class _Gpu:
    """What XLA's GPU compiler must know of a chip, besides the device table."""

    description: str
    capability: str
    cores: int
    fpus_per_core: int
    clock_ghz: float
    l2_bytes: int
    shared_bytes_per_core: int
    shared_bytes_per_block: int


# Figures: NVIDIA's architecture white papers and CUDA's tables of compute capabilities.
_HOPPER = {"capability": "9.0", "cores": 132, "fpus_per_core": 128, "clock_ghz": 1.98,
           "l2_bytes": 52_428_800, "shared_bytes_per_core": 233_472,
           "shared_bytes_per_block": 232_448}  # fmt: skip
_GPU = {
    "a100": _Gpu("NVIDIA A100-SXM4-80GB", "8.0", 108, 64, 1.41, 41_943_040, 167_936, 166_912),
    "h100": _Gpu("NVIDIA H100 80GB HBM3", **_HOPPER),
    "h200": _Gpu("NVIDIA H200", **_HOPPER),
    "b200": _Gpu("NVIDIA B200", "10.0", 148, 128, 1.965, 132_644_864, 233_472, 232_448),
}


# The CUDA version of the plugin `xla_cuda13`. Without a version XLA assumes one before 12.0, which
# has no products in 8 bits: products by cuBLASLt would then be compiled in bfloat16.
_CUDA = "13.0.0"


def _gpus(text: str, kind: str, sizes: list[int], *, domains: int | None) -> list[Any]:
    if len(sizes) > 2:
        raise UserError(
            f"--devices={text}: write {kind}:N, or {kind}:HxD for hosts x devices a host"
        )
    if len(sizes) == 1:
        count = sizes[0]
        if count > GPUS_A_NODE and count % GPUS_A_NODE:
            below = count // GPUS_A_NODE * GPUS_A_NODE
            raise UserError(
                f"--devices={text}: {kind}:N means nodes of {GPUS_A_NODE}; choose N = {below} or "
                f"{below + GPUS_A_NODE}, or write {kind}:HOSTSxDEVICES"
            )
        sizes = [-(-count // GPUS_A_NODE), min(count, GPUS_A_NODE)]
    parent = importlib.util.find_spec("jax_plugins")
    if parent is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        raise UserError(
            f"--devices={text}: compiling for NVIDIA GPUs needs JAX's CUDA plugin, but neither a "
            "GPU nor NVIDIA's libraries. Install it with: pip install -e '.[plan-gpu]'"
        )
    # domains of fast links, hosts in one of them, devices a host
    shape = f"{domains}x{sizes[0]}x{sizes[1]}" if domains else f"{sizes[0]}x1x{sizes[1]}"
    config = _gpu_target(kind)
    desc = topologies.get_topology_desc("", "cuda", topology=shape, target_config=config)
    return list(desc.devices)


def _gpu_target(kind: str) -> str:
    """Return a `GpuTargetConfigProto` of XLA in text form.

    XLA's scheduler overlaps collectives only while the program stays below a memory limit. A run
    derives it from the memory of its allocator; without a device, XLA takes 80 % of the size given
    here.
    """
    gpu, entry = _GPU[kind], next(d for d in devices.DEVICES if d.name == kind)
    major, minor = gpu.capability.split(".")
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared_bytes_per_core}
  shared_memory_per_block_optin: {gpu.shared_bytes_per_block}
  threads_per_core_limit: 2048
  core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus_per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(entry.hbm_bytes_per_s)}
  l2_cache_size: {gpu.l2_bytes}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {entry.limit_bytes * 5 // 4}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  driver_version: "{_CUDA}"
  runtime_version: "{_CUDA}"
  compile_time_toolkit_version: "{_CUDA}"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{gpu.description}"
"""


def _of_plugin(text: str, kind: str, shape: str) -> list[Any]:
    known = (*TPUS, *GPUS, "cpu")
    try:
        return list(topologies.get_topology_desc(shape, kind).devices)
    except NotImplementedError:
        raise UserError(
            f"--devices={text}: no compiler here knows {kind!r}"
            f"{did_you_mean(nearest(kind, known)) or '.'} Kinds: {', '.join(known)}, and any "
            "installed PJRT plugin that implements topologies"
        ) from None
    except jax.errors.JaxRuntimeError as error:
        line = str(error).splitlines()[0]
        raise UserError(
            f"--devices={text}: plugin {kind!r} has no topology {shape!r}: {line}"
        ) from None
