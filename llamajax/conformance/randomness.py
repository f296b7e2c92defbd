"""Probes of random numbers: threefry's bits are the same on every platform and mesh."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llamajax import sharding
from llamajax.config.schema import MeshConfig
from llamajax.conformance.outcome import Bench, UnsupportedError, WrongError

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
