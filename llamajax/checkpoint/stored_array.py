"""Read parts of stored arrays on the host, and put them on their devices.

Orbax and TensorStore read whole blocks, and hold them up to three times. A block of a training run
is one device's part of all layers of a weight. Since nothing stored is compressed, a run of rows
within a block is a range of bytes. They are read here a few at a time, so that the host holds one
part of one array and little more, whatever mesh wrote it.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from llamajax.backends import platform_facts
from llamajax.checkpoint.location import (
    Location,
    is_remote,
    store_errors_explained,
    tensorstore_spec,
)
from llamajax.checkpoint.manifest import DamagedError
from llamajax.checkpoint.object_store import result

Index = tuple[slice, ...]

# Most bytes that are read at once, and how many such reads are in flight.
SLAB_BYTES = 1 << 22
_IN_FLIGHT = 8
# Below this a read costs more than the bytes around it.
_WORTH_A_READ_BYTES = 1 << 20


def array_spec(state: Location, name: str) -> dict[str, Any]:
    """Return TensorStore's spec of one array under the directory that Orbax wrote."""
    store = {"driver": "ocdbt", "base": tensorstore_spec(state), "path": f"{name}/"}
    return {"driver": "zarr", "kvstore": store}


def prove_readable(state: Location, arrays: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Read the smallest array back; ValueError or DamagedError if that is not possible.

    arrays: dtype and shape by name. Orbax may commit, without an error, what nobody can read.
    """
    name, (dtype, shape) = min(arrays.items(), key=lambda entry: math.prod(entry[1][1]))
    array = StoredArray(state, name)
    if (str(array.dtype), array.shape) != (dtype, shape):
        raise DamagedError(state, f"holds {name} as {array.dtype}{list(array.shape)}")
    array.read(tuple(slice(0, n) for n in shape), array.dtype)


class _Slab(NamedTuple):
    """One read: bytes `start` to `stop` of the block `key`, which have `shape`.

    wanted: the part of them to use. target: the part of the result that it fills.
    """

    key: str
    start: int
    stop: int
    shape: tuple[int, ...]
    wanted: Index
    target: np.ndarray


class StoredArray:
    """One array of a checkpoint, of which any part can be read.

    Raises UserError where an object store refuses, ValueError where a disk does.
    """

    def __init__(self, state: Location, name: str):
        import tensorstore as ts  # not needed where nothing is restored

        self._state, self._name = state, name
        self._array = self._result(ts.open(array_spec(state, name), open=True, read=True))
        self.shape: tuple[int, ...] = self._array.shape
        self.dtype = np.dtype(self._array.dtype.numpy_dtype)
        metadata = self._array.spec().to_json().get("metadata", {})
        plain = metadata.get("compressor") is None and not metadata.get("filters")
        in_rows = metadata.get("order", "C") == "C"
        self._by_bytes = bool(self.shape) and plain and in_rows
        self._separator = metadata.get("dimension_separator", ".")

    def read(self, index: Index, dtype: Any) -> np.ndarray:
        """Read the part `index` (slices with bounds) as `dtype`, aligned for JAX's CPU backend.

        Raises DamagedError where a block is missing.
        """
        part = aligned_zeros(tuple(s.stop - s.start for s in index), dtype)
        if not self._by_bytes:
            part[...] = self._result(self._array[index].read()).astype(dtype, copy=False)
            return part
        in_flight: deque[tuple[_Slab, Any]] = deque()
        for slab in self._slabs(index, part):
            if len(in_flight) == _IN_FLIGHT:
                self._take(*in_flight.popleft())
            read = self._array.kvstore.read(slab.key, byte_range=slice(slab.start, slab.stop))
            in_flight.append((slab, read))
        while in_flight:
            self._take(*in_flight.popleft())
        return part

    def _take(self, slab: _Slab, read: Any) -> None:
        found = self._result(read)
        if found.state != "value":
            raise DamagedError(self._name, f"block {slab.key} is missing")
        rows = np.frombuffer(found.value, self.dtype).reshape(slab.shape)
        slab.target[...] = rows[slab.wanted].astype(slab.target.dtype, copy=False)

    def _result(self, future: Any) -> Any:
        if not is_remote(self._state):
            return future.result()
        with store_errors_explained(self._state):
            return result(future)

    def _slabs(self, index: Index, part: np.ndarray) -> Iterator[_Slab]:
        """Yield the reads that fill `part` with the part `index`, block after block."""
        block: tuple[int, ...] = self._array.chunk_layout.read_chunk.shape
        touched = (range(s.start // n, -(-s.stop // n)) for s, n in zip(index, block, strict=True))
        for number in itertools.product(*touched):
            corner = [i * n for i, n in zip(number, block, strict=True)]
            inside = tuple(
                slice(max(s.start - c, 0), min(s.stop - c, n))
                for s, c, n in zip(index, corner, block, strict=True)
            )
            target = part[
                tuple(
                    slice(i.start + c - s.start, i.stop + c - s.start)
                    for i, c, s in zip(inside, corner, index, strict=True)
                )
            ]
            yield from self._slabs_of(self._separator.join(map(str, number)), block, inside, target)

    def _slabs_of(
        self, key: str, block: tuple[int, ...], inside: Index, target: np.ndarray
    ) -> Iterator[_Slab]:
        """Yield the reads that fill `target` with the part `inside` of one block.

        Each is a run of rows along the first axis whose rows are short enough.
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
        for position, start in itertools.product(outer, starts):
            count = min(rows, inside[axis].stop - start)
            first = int(np.ravel_multi_index((*position, start), block[: axis + 1]))
            at = [n - s.start for n, s in zip((*position, start), inside, strict=False)]
            yield _Slab(
                key=key,
                start=first * row_bytes(axis),
                stop=(first + count) * row_bytes(axis),
                shape=(count, *block[axis + 1 :]),
                wanted=(slice(None), *inside[axis + 1 :]),
                target=target[(*at[:-1], slice(at[-1], at[-1] + count))],
            )


def array_from_parts(
    wanted: jax.ShapeDtypeStruct, read: Callable[[Index], np.ndarray], *, donated: bool = False
) -> jax.Array:
    """Build an array like `wanted`, which has a sharding; read each part once for all its devices.

    read: returns the part of an index (slices with bounds) on the host. One is held at a time.
    donated: the array will be donated to a jitted function, so its memory must be JAX's own. Else
    the CPU backend takes over the memory that was read into, and copies it when it is donated.
    """
    devices_of: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    held = wanted.sharding.addressable_devices_indices_map(wanted.shape)
    for device, index in held.items():
        bounds = [s.indices(n)[:2] for s, n in zip(index, wanted.shape, strict=True)]
        devices_of.setdefault(tuple(bounds), []).append(device)
    shards: list[jax.Array] = []
    kind = wanted.sharding.memory_kind  # host memory for offloaded moments
    for bounds, devices in devices_of.items():
        part = read(tuple(slice(*b) for b in bounds))
        for device in devices:
            copied = part
            if donated and platform_facts(device.platform).may_alias_host_memory:
                copied = jnp.copy(jax.device_put(part, device))
            shards.append(jax.device_put(copied, SingleDeviceSharding(device, memory_kind=kind)))
        jax.block_until_ready(shards)
    return jax.make_array_from_single_device_arrays(wanted.shape, wanted.sharding, shards)


def aligned_zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return zeros that JAX's CPU backend takes over without a copy: aligned to 64 bytes."""
    count = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(count + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count].view(dtype).reshape(shape)
