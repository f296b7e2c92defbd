"""Probes of matrix products: their error against float64 on the host, and their speed."""

import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llamajax import backends, sharding
from llamajax.config.schema import MeshConfig
from llamajax.conformance.bench import Bench, UnsupportedError, WrongError

# Odd on purpose: what is wrong at the edges of tiles shows.
_ROWS, _INNER, _COLUMNS = 129, 515, 67
_SPEED_SIZES = (512, 1024, 2048, 4096, 8192)
_LONG_ENOUGH_S = 0.03
_REPEATS = 3


def matmul_float32(bench: Bench) -> str:
    """Asked for exactly ("highest"), and at the default precision for the record."""
    text = _measured(bench, "float32", precision="highest")
    left, right = _operands("float32")
    found = _product(left, right, precision="default", device=bench.devices[0])
    exact = left.astype(np.float64) @ right.astype(np.float64)
    return f"{text}; at default precision error {_largest(found, exact):.1e}"


def matmul_bfloat16(bench: Bench) -> str:
    """Inputs and output rounded to bfloat16, sums in float32."""
    return _measured(bench, "bfloat16")


def matmul_float16(bench: Bench) -> str:
    """The same in float16."""
    return _measured(bench, "float16")


def matmul_float8(bench: Bench) -> str:
    """Inputs in e4m3, output float32; the error is told and not judged: units sum in few bits."""
    left, right = _operands("float8_e4m3fn")
    exact = left.astype(np.float64) @ right.astype(np.float64)
    multiply = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
    found = np.asarray(multiply(*jax.device_put((left, right), bench.devices[0])))
    error = _largest(found, exact)
    if not error < 0.1:
        raise WrongError(f"error {error:.1e} of the largest value")
    return f"error {error:.1e} of the largest value, {_speed(bench, 'float8_e4m3fn')}"


def _measured(bench: Bench, dtype: str, *, precision: str = "default") -> str:
    left, right = _operands(dtype)
    found = _product(left, right, precision=precision, device=bench.devices[0])
    exact = left.astype(np.float64) @ right.astype(np.float64)
    excess = np.max(np.abs(found - exact) / bound(left, right, exact, dtype=dtype))
    error = _largest(found, exact)
    if not excess <= 1:
        raise WrongError(
            f"error {error:.1e} of the largest value, {excess:.3g} times what products of {dtype} "
            f"summed in float32 may have ({_ROWS} x {_INNER} x {_COLUMNS})"
        )
    return f"error {error:.1e} of the largest value, {_speed(bench, dtype, precision=precision)}"


def bound(left: np.ndarray, right: np.ndarray, exact: np.ndarray, *, dtype: str) -> np.ndarray:
    """Largest error that each element may have, however the sums are ordered.

    A product of n terms summed in precision u is wrong by at most n u / (1 - n u) times the product
    of the absolute values (Higham, Accuracy and Stability, section 3.1), here with float32's u;
    rounding the result to `dtype` adds half a unit in its last place.
    """
    unit = float(np.finfo(np.float32).eps) / 2
    terms = left.shape[1] * unit
    sums = np.abs(left.astype(np.float64)) @ np.abs(right.astype(np.float64))
    return terms / (1 - terms) * sums + float(jnp.finfo(dtype).eps) / 2 * np.abs(exact)


def _operands(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.RandomState(2)
    shapes = ((_ROWS, _INNER), (_INNER, _COLUMNS))
    return tuple(rng.standard_normal(shape).astype(jnp.dtype(dtype)) for shape in shapes)


def _product(left: np.ndarray, right: np.ndarray, *, precision: str, device: jax.Device):
    multiply = jax.jit(lambda a, b: jnp.dot(a, b, precision=precision))
    found = multiply(*jax.device_put((left, right), device))
    if found.dtype != left.dtype:
        raise UnsupportedError(f"the product of {left.dtype} comes out as {found.dtype}")
    return np.asarray(found).astype(np.float64)


def _largest(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.max(np.abs(found - exact)) / np.max(np.abs(exact)))


def _speed(bench: Bench, dtype: str, *, precision: str = "default") -> str:
    """TFLOP/s of square products, as large as it takes to be timed."""
    for size in _SPEED_SIZES:
        x = jnp.ones((size, size), dtype, device=bench.devices[0])
        out = jnp.float32 if dtype.startswith("float8") else jnp.dtype(dtype)
        multiply = jax.jit(
            lambda a, out=out: jnp.dot(a, a, precision=precision, preferred_element_type=out)
        )
        jax.block_until_ready(multiply(x))
        best = min(_timed(multiply, x) for _ in range(_REPEATS))
        if best > _LONG_ENOUGH_S:
            break
    rate = 2 * size**3 / best
    text = f"{rate / 1e12:.3g} TFLOP/s ({size} x {size})"
    known = dtype in ("bfloat16", "float32")
    peak = backends.peak_flops(bench.machine.device_kind, dtype) if known else None
    return text if peak is None else f"{text}, {rate / peak[0]:.0%} of the peak"


def _timed(function, x: jax.Array) -> float:
    begun = time.monotonic()
    jax.block_until_ready(function(x))
    return time.monotonic() - begun


_SEED = 20
_SHAPES = ((1000,), (3, 5, 11))
# CRC-32 of the bits as little-endian uint32, from jax 0.10.2 and 0.12.0.1 on a CPU.
REFERENCE_CRC = {
    "(1000,)": 2513906265,
    "(3, 5, 11)": 3192968289,
    "split": 164918292,
}
REFERENCE_NORMALS = (
    -0.4747429490,
    -0.4662926495,
    0.2510315478,
    -1.2375510931,
    -0.5248302817,
    2.4158642292,
)
# What the same bits become: erf_inv is a library's.
_NORMAL_TOLERANCE = 5e-6


def checksums(device: jax.Device) -> dict[str, int]:
    """CRC-32 of bits drawn on a device, by shape."""
    with jax.default_device(device):
        key = jax.random.key(_SEED, impl="threefry2x32")
        found = {
            str(shape): _crc(jax.jit(jax.random.bits, static_argnums=1)(key, shape))
            for shape in _SHAPES
        }
        split = jax.jit(lambda key: jax.random.key_data(jax.random.split(key, 5)))
        return found | {"split": _crc(split(jax.random.fold_in(key, 7)))}


def random_bits(bench: Bench) -> str:
    """Bits against the reference; normal values against those of the host."""
    found = checksums(bench.devices[0])
    if wrong := [name for name, crc in found.items() if REFERENCE_CRC[name] != crc]:
        raise WrongError(f"bits of {', '.join(wrong)} are not those of the reference")
    normals = _normals(bench.devices[0])
    error = np.max(np.abs(normals[: len(REFERENCE_NORMALS)] - REFERENCE_NORMALS))
    if not error <= _NORMAL_TOLERANCE:
        raise WrongError(f"normal values differ from the reference by {error:.1e}")
    return f"bits equal the reference, normal values to {error:.1e}"


def random_sharded(bench: Bench) -> str:
    """Weights drawn in shards are those drawn whole."""
    count = len(bench.devices)
    if count == 1:
        raise UnsupportedError("one device: there are no shards")
    mesh = sharding.build_mesh(MeshConfig(fsdp=count), bench.devices)
    shape, key = (2 * count, 37), jax.random.key(_SEED, impl="threefry2x32")
    parts = NamedSharding(mesh, PartitionSpec("fsdp"))
    draw = lambda key: jax.random.bits(key, shape)  # noqa: E731
    whole = np.asarray(jax.jit(draw)(key))
    found = np.asarray(jax.jit(draw, out_shardings=parts)(key))
    if not np.array_equal(whole, found):
        raise WrongError(f"{np.sum(whole != found)} of {whole.size} values depend on the mesh")
    return f"the same bits whole and in {count} shards"


def _normals(device: jax.Device) -> np.ndarray:
    with jax.default_device(device):
        key = jax.random.key(_SEED, impl="threefry2x32")
        draw = jax.jit(lambda key: jax.random.normal(key, (1013,), jnp.float32))
        return np.asarray(draw(key))


def _crc(bits: jax.Array) -> int:
    return zlib.crc32(np.asarray(bits).astype("<u4").tobytes())
