"""Parts of weights on the host: read from a checkpoint of ours, and handed to their devices.

Orbax and TensorStore read whole blocks, and a block of a training run is a device's part of all
layers of one weight; they then hold it up to three times. What is stored is not compressed, so
that any run of rows within a block is a range of bytes: read here a few at a time, the host holds
one part of one array and little more, whatever wrote it.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from jax.sharding import SingleDeviceSharding

from llamajax.backends import lends_host_memory
from llamajax.checkpoint.manifest import DamagedError
from llamajax.checkpoint.storage import Place, kvstore

Index = tuple[slice, ...]

# Most bytes that are read at once, and how many such reads are under way.
SLAB_BYTES = 1 << 22
_IN_FLIGHT = 8
# Below this a read costs more than the bytes around it.
_WORTH_A_READ_BYTES = 1 << 20


def array_spec(state: Place, name: str) -> dict[str, Any]:
    """Return TensorStore's spec of one array under the directory that Orbax wrote."""
    store = {"driver": "ocdbt", "base": kvstore(state), "path": f"{name}/"}
    return {"driver": "zarr", "kvstore": store}


def prove_readable(state: Place, arrays: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Read the smallest array back; ValueError or DamagedError if that is not possible.

    arrays: dtype and shape by name. Orbax may commit without an error what nobody can read.
    """
    name, (dtype, shape) = min(arrays.items(), key=lambda entry: math.prod(entry[1][1]))
    array = StoredArray(state, name)
    if (str(array.dtype), array.shape) != (dtype, shape):
        raise DamagedError(state, f"holds {name} as {array.dtype}{list(array.shape)}")
    array.read(tuple(slice(0, n) for n in shape), array.dtype)


class _Slab(NamedTuple):
    """Bytes `start` to `stop` of the block under `key`; what of them goes where in the part."""

    key: str
    start: int
    stop: int
    shape: tuple[int, ...]
    wanted: Index
    target: tuple[int | slice, ...]


class StoredArray:
    """One array of a checkpoint, of which any part can be read."""

    def __init__(self, state: Place, name: str):
        self._array = ts.open(array_spec(state, name), open=True, read=True).result()
        self._name = name
        self.shape: tuple[int, ...] = self._array.shape
        self.dtype = np.dtype(self._array.dtype.numpy_dtype)
        layout = self._array.spec().to_json()
        metadata = layout.get("metadata", {})
        plain = metadata.get("compressor") is None and not metadata.get("filters")
        in_rows = metadata.get("order", "C") == "C"
        self._by_bytes = bool(self.shape) and plain and in_rows
        self._separator = metadata.get("dimension_separator", ".")

    def read(self, index: Index, dtype: Any) -> np.ndarray:
        """The part `index` (slices with bounds) as `dtype`, aligned as JAX's CPU backend likes it.

        Raises DamagedError where a block is missing, ValueError where the disk refuses.
        """
        part = aligned_zeros(tuple(s.stop - s.start for s in index), dtype)
        if not self._by_bytes:
            part[...] = self._array[index].read().result().astype(dtype, copy=False)
            return part
        under_way: deque[tuple[_Slab, ts.Future]] = deque()
        for slab in self._slabs(index):
            if len(under_way) == _IN_FLIGHT:
                self._take(*under_way.popleft(), part)
            read = self._array.kvstore.read(slab.key, byte_range=slice(slab.start, slab.stop))
            under_way.append((slab, read))
        while under_way:
            self._take(*under_way.popleft(), part)
        return part

    def _take(self, slab: _Slab, read: ts.Future, part: np.ndarray) -> None:
        found = read.result()
        if found.state != "value":
            raise DamagedError(self._name, f"block {slab.key} is missing")
        rows = np.frombuffer(found.value, self.dtype).reshape(slab.shape)
        part[slab.target] = rows[slab.wanted].astype(part.dtype, copy=False)

    def _slabs(self, index: Index) -> Iterator[_Slab]:
        """What to read for the part `index`, block after block."""
        block: tuple[int, ...] = self._array.chunk_layout.read_chunk.shape
        touched = (range(s.start // n, -(-s.stop // n)) for s, n in zip(index, block, strict=True))
        for number in itertools.product(*touched):
            corner = [i * n for i, n in zip(number, block, strict=True)]
            inside = tuple(
                slice(max(s.start - c, 0), min(s.stop - c, n))
                for s, c, n in zip(index, corner, block, strict=True)
            )
            shift = [c - s.start for s, c in zip(index, corner, strict=True)]
            yield from self._slabs_of(self._separator.join(map(str, number)), block, inside, shift)

    def _slabs_of(
        self, key: str, block: tuple[int, ...], inside: Index, shift: list[int]
    ) -> Iterator[_Slab]:
        """Of one block, the part `inside`: runs of rows along the first axis that is short enough.

        shift: from positions in the block to those in the part.
        """

        def row_bytes(axis: int) -> int:
            return math.prod(block[axis + 1 :]) * self.dtype.itemsize

        axis = 0
        while axis + 1 < len(block):
            length = inside[axis + 1].stop - inside[axis + 1].start
            run_bytes = length * row_bytes(axis + 1)
            cut = length < block[axis + 1] and run_bytes >= _WORTH_A_READ_BYTES
            if row_bytes(axis) <= SLAB_BYTES and not cut:
                break
            axis += 1
        rows = max(1, SLAB_BYTES // row_bytes(axis))
        outer = itertools.product(*(range(s.start, s.stop) for s in inside[:axis]))
        starts = range(inside[axis].start, inside[axis].stop, rows)
        rest = tuple(
            slice(s.start + d, s.stop + d)
            for s, d in zip(inside[axis + 1 :], shift[axis + 1 :], strict=True)
        )
        for position, start in itertools.product(outer, starts):
            stop = min(start + rows, inside[axis].stop)
            first = int(np.ravel_multi_index((*position, start), block[: axis + 1]))
            offset = first * row_bytes(axis)
            placed = tuple(p + d for p, d in zip(position, shift[:axis], strict=True))
            yield _Slab(
                key=key,
                start=offset,
                stop=offset + (stop - start) * row_bytes(axis),
                shape=(stop - start, *block[axis + 1 :]),
                wanted=(slice(None), *inside[axis + 1 :]),
                target=(*placed, slice(start + shift[axis], stop + shift[axis]), *rest),
            )


def placed(
    wanted: jax.ShapeDtypeStruct, read: Callable[[Index], np.ndarray], *, donated: bool = False
) -> jax.Array:
    """An array like `wanted`, which has a sharding: each part read once, for all its devices.

    read: the part of an index (slices with bounds) on the host. One is held at a time. donated:
    the array will be donated to a jitted function, so that its memory must be JAX's own.
    """
    devices_of: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    held = wanted.sharding.addressable_devices_indices_map(wanted.shape)
    for device, index in held.items():
        bounds = [s.indices(n)[:2] for s, n in zip(index, wanted.shape, strict=True)]
        devices_of.setdefault(tuple(bounds), []).append(device)
    parts: list[jax.Array] = []
    kind = wanted.sharding.memory_kind  # moments may rest in the host's memory
    for bounds, devices in devices_of.items():
        part = read(tuple(slice(*b) for b in bounds))
        parts += [_put(part, device, kind, owned=donated) for device in devices]
        jax.block_until_ready(parts)
    return jax.make_array_from_single_device_arrays(wanted.shape, wanted.sharding, parts)


def _put(part: Any, device: jax.Device, kind: str | None, *, owned: bool) -> jax.Array:
    if owned and lends_host_memory(device.platform):
        # The CPU backend takes over aligned memory of NumPy's, and can't reuse that when donated.
        part = jnp.copy(jax.device_put(part, device))
    return jax.device_put(part, SingleDeviceSharding(device, memory_kind=kind))


def aligned_zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros that JAX's CPU backend takes over without a copy: aligned to 64 bytes."""
    count = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(count + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count].view(dtype).reshape(shape)
