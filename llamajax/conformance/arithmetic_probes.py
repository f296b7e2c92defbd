"""Probes of matrix products (error against float64, speed) and of random numbers."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llamajax import backends, sharding
from llamajax.config.schema import MeshConfig
from llamajax.conformance.bench import Bench, UnsupportedError, WrongError, best_time_s

_SHAPES = ((129, 515), (515, 67))  # odd on purpose: what is wrong at the edges of tiles shows
_SPEED_SIZES = (512, 1024, 2048, 4096, 8192)
_LONG_ENOUGH_S = 0.03

_SEED = 20
_DRAWN_SHAPES = ((1000,), (3, 5, 11))
# CRC-32 of the bits as little-endian uint32, from jax 0.10.2 and 0.12.0.1 on a CPU.
REFERENCE_CRC = {"(1000,)": 2513906265, "(3, 5, 11)": 3192968289, "split": 164918292}
_REFERENCE_NORMALS = (
    -0.4747429490, -0.4662926495, 0.2510315478, -1.2375510931, -0.5248302817, 2.4158642292,
)  # fmt: skip
_NORMAL_TOLERANCE = 5e-6  # the same bits go through a library's erf_inv


def matmul_float32(bench: Bench) -> str:
    """Multiply at "highest" precision, and at the default precision for the record."""
    text = _judged(bench, "float32", precision="highest")
    left, right, exact = operands("float32")
    error = _relative_error(_product(bench, left, right), exact)
    return f"{text}; at default precision error {error:.1e}"


def matmul_bfloat16(bench: Bench) -> str:
    """Multiply in bfloat16 with sums in float32."""
    return _judged(bench, "bfloat16")


def matmul_float16(bench: Bench) -> str:
    """Multiply in float16 with sums in float32."""
    return _judged(bench, "float16")


def matmul_float8(bench: Bench) -> str:
    """Multiply e4m3 and e5m2 by e4m3 to float32, as forward and backward products of training do.

    Only a gross error counts: units sum in few bits.
    """
    for dtype in ("float8_e5m2", "float8_e4m3fn"):
        left, right = operands(dtype)[0], operands("float8_e4m3fn")[1]
        exact = left.astype(np.float64) @ right.astype(np.float64)
        found = _product(bench, left, right, precision="highest", out=jnp.float32)
        error = _relative_error(found, exact)
        if not error < 0.1:
            raise WrongError(f"{dtype}: error {error:.1e} of the largest value")
    speed = _speed(bench, "float8_e4m3fn", precision="highest")
    return f"error {error:.1e} of the largest value, {speed}"


def _judged(bench: Bench, dtype: str, *, precision: str = "default") -> str:
    left, right, exact = operands(dtype)
    found = _product(bench, left, right, precision=precision)
    excess = np.max(np.abs(found - exact) / bound(left, right, exact, dtype=dtype))
    error = _relative_error(found, exact)
    if not excess <= 1:
        sizes = " x ".join(str(n) for n in (*left.shape, right.shape[1]))
        raise WrongError(
            f"error {error:.1e} of the largest value, {excess:.3g} times what products of {dtype} "
            f"summed in float32 may have ({sizes})"
        )
    return f"error {error:.1e} of the largest value, {_speed(bench, dtype, precision=precision)}"


def bound(left: np.ndarray, right: np.ndarray, exact: np.ndarray, *, dtype: str) -> np.ndarray:
    """Return the largest error that each element may have, however the sums are ordered.

    A product of n terms summed in precision u is wrong by at most n u / (1 - n u) times the product
    of the absolute values (Higham, Accuracy and Stability, section 3.1), here with float32's u;
    rounding the result to `dtype` adds half a unit in its last place.
    """
    terms = left.shape[1] * float(np.finfo(np.float32).eps) / 2
    sums = np.abs(left.astype(np.float64)) @ np.abs(right.astype(np.float64))
    return terms / (1 - terms) * sums + float(jnp.finfo(dtype).eps) / 2 * np.abs(exact)


def operands(dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return two matrices in `dtype`, and their product in float64."""
    rng = np.random.RandomState(2)
    left, right = (rng.standard_normal(shape).astype(jnp.dtype(dtype)) for shape in _SHAPES)
    return left, right, left.astype(np.float64) @ right.astype(np.float64)


def _product(bench: Bench, left, right, *, precision: str = "default", out=None) -> np.ndarray:
    out = jnp.dtype(out or left.dtype)
    multiply = jax.jit(lambda a, b: jnp.dot(a, b, precision=precision, preferred_element_type=out))
    found = multiply(*bench.put((left, right)))
    if found.dtype != out:
        raise UnsupportedError(f"the product of {left.dtype} comes out as {found.dtype}")
    return np.asarray(found).astype(np.float64)


def _relative_error(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.max(np.abs(found - exact)) / np.max(np.abs(exact)))


def _speed(bench: Bench, dtype: str, *, precision: str = "default") -> str:
    """Return the TFLOP/s of square products, as large as it takes to be timed."""
    out = jnp.float32 if dtype.startswith("float8") else jnp.dtype(dtype)
    for size in _SPEED_SIZES:
        x = jnp.ones((size, size), dtype, device=bench.devices[0])
        multiply = jax.jit(lambda a: jnp.dot(a, a, precision=precision, preferred_element_type=out))
        best_s = best_time_s(multiply, x)
        if best_s > _LONG_ENOUGH_S:
            break
    rate = 2 * size**3 / best_s
    text = f"{rate / 1e12:.3g} TFLOP/s ({size} x {size})"
    kind, in_8_bits = bench.machine.device_kind, dtype.startswith("float8")
    known = dtype in ("bfloat16", "float32") or (in_8_bits and backends.multiplies_float8(kind))
    peak = backends.peak_flops(kind, "float8" if in_8_bits else dtype) if known else None
    return text if peak is None else f"{text}, {rate / peak[0]:.0%} of the peak"


def _key() -> jax.Array:
    return jax.random.key(_SEED, impl="threefry2x32")


def checksums(device: jax.Device) -> dict[str, int]:
    """Return the CRC-32 of bits drawn on a device, by shape."""

    def crc(bits: jax.Array) -> int:
        return zlib.crc32(np.asarray(bits).astype("<u4").tobytes())

    with jax.default_device(device):
        draw = jax.jit(jax.random.bits, static_argnums=1)
        found = {str(shape): crc(draw(_key(), shape)) for shape in _DRAWN_SHAPES}
        split = jax.jit(lambda key: jax.random.key_data(jax.random.split(key, 5)))
        return found | {"split": crc(split(jax.random.fold_in(_key(), 7)))}


def random_bits(bench: Bench) -> str:
    """Compare drawn bits with the reference, and normal values with those of a CPU."""
    found = checksums(bench.devices[0])
    if wrong := [name for name, crc in found.items() if REFERENCE_CRC[name] != crc]:
        raise WrongError(f"bits of {', '.join(wrong)} are not those of the reference")
    with jax.default_device(bench.devices[0]):
        draw = jax.jit(lambda key: jax.random.normal(key, (1013,), jnp.float32))
        normals = np.asarray(draw(_key()))
    error = np.max(np.abs(normals[: len(_REFERENCE_NORMALS)] - _REFERENCE_NORMALS))
    if not error <= _NORMAL_TOLERANCE:
        raise WrongError(f"normal values differ from the reference by {error:.1e}")
    return f"bits equal the reference, normal values to {error:.1e}"


def random_sharded(bench: Bench) -> str:
    """Compare bits drawn in shards with those drawn whole."""
    count = len(bench.devices)
    if count == 1:
        raise UnsupportedError("one device: there are no shards")
    mesh = sharding.build_mesh(MeshConfig(fsdp=count), bench.devices)
    shards = NamedSharding(mesh, PartitionSpec("fsdp"))

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.bits(key, (2 * count, 37))

    whole = np.asarray(jax.jit(draw)(_key()))
    found = np.asarray(jax.jit(draw, out_shardings=shards)(_key()))
    if not np.array_equal(whole, found):
        raise WrongError(f"{np.sum(whole != found)} of {whole.size} values depend on the mesh")
    return f"the same bits whole and in {count} shards"
