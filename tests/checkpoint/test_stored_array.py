"""Parts of stored arrays: any index of any block layout, a few small reads at a time."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from jax.sharding import SingleDeviceSharding
from tiny_state import checkpointer, restore

from llamajax.checkpoint import stored_array
from llamajax.checkpoint.manifest import DamagedError
from llamajax.checkpoint.stored_array import (
    StoredArray,
    aligned_zeros,
    array_from_parts,
    array_spec,
)

SHAPE = (3, 5, 4, 6)


def stored(directory: Path, value: np.ndarray, blocks: tuple[int, ...], **metadata) -> StoredArray:
    """`value` as a zarr array in blocks of that shape, opened."""
    metadata = {"shape": value.shape, "chunks": blocks, "dtype": value.dtype.str} | metadata
    spec = array_spec(directory, "x") | {"metadata": {"compressor": None} | metadata}
    ts.open(spec, create=True).result().write(value).result()
    return StoredArray(directory, "x")


@pytest.mark.parametrize("blocks", [SHAPE, (1, 5, 4, 6), (2, 2, 3, 4), (3, 1, 4, 5)])
@pytest.mark.parametrize(("slab", "worth"), [(1 << 24, 1 << 20), (100, 16), (8, 1)])
def test_any_part_of_any_blocks(tmp_path: Path, monkeypatch, blocks, slab: int, worth: int):
    monkeypatch.setattr(stored_array, "SLAB_BYTES", slab)
    monkeypatch.setattr(stored_array, "_WORTH_A_READ_BYTES", worth)
    value = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    array, draw = stored(tmp_path, value, blocks), np.random.default_rng(0)
    ends = [[sorted(draw.choice(n + 1, 2, replace=False)) for n in SHAPE] for _ in range(20)]
    for one in ([(0, n) for n in SHAPE], *ends):
        index = tuple(slice(*pair) for pair in one)
        read = array.read(index, np.float32)
        np.testing.assert_array_equal(read, value[index])
        assert all(s.stop - s.start <= slab for s in array._slabs(index, read))
    read = array.read(index, jnp.bfloat16)
    np.testing.assert_array_equal(read, value[index].astype(jnp.bfloat16))


@pytest.mark.parametrize("metadata", [{"compressor": {"id": "zlib", "level": 1}}, {"order": "F"}])
def test_blocks_that_are_not_rows_are_read_whole(tmp_path: Path, metadata: dict):
    value = np.arange(24, dtype=np.int32).reshape(4, 6)
    index = (slice(1, 3), slice(2, 6))
    read = stored(tmp_path, value, (4, 3), **metadata).read(index, np.int32)
    np.testing.assert_array_equal(read, value[index])


def test_a_missing_block_is_not_zeros(tmp_path: Path):
    array = stored(tmp_path, np.ones((4, 6), np.float32), (2, 6))
    array._array.kvstore.delete_range(ts.KvStore.KeyRange("1", "2")).result()
    with pytest.raises(DamagedError, match=r"block 1\.0 is missing"):
        array.read((slice(0, 4), slice(0, 6)), np.float32)


def test_restoring_reads_a_few_slabs_of_a_weight_at_a_time(tmp_path: Path, monkeypatch):
    """All layers are in one block; what bounds the host's memory is that it is never read whole."""
    value = jnp.arange(4 * 6 * 8, dtype=jnp.float32).reshape(4, 6, 8)
    with checkpointer(tmp_path) as saver:
        saver.save(1, {"w": value}, meta={})
    monkeypatch.setattr(stored_array, "SLAB_BYTES", 64)
    changes: list[int] = []  # of the bytes in flight
    slabs, take = StoredArray._slabs, StoredArray._take

    def counted(self, *args):
        for slab in slabs(self, *args):
            changes.append(slab.stop - slab.start)
            yield slab

    monkeypatch.setattr(StoredArray, "_slabs", counted)
    monkeypatch.setattr(
        StoredArray,
        "_take",
        lambda *args: take(*args) or changes.append(args[1].start - args[1].stop),
    )
    wanted = {"w": jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=value.sharding)}
    np.testing.assert_array_equal(restore(tmp_path, wanted)["w"], value)
    assert sorted(changes) == [-64] * (value.nbytes // 64) + [64] * (value.nbytes // 64)
    assert max(itertools.accumulate(changes)) <= 9 * 64  # eight in flight, one about to be


@pytest.mark.parametrize("donated", [False, True])
def test_the_cpu_takes_over_what_was_read_unless_it_is_donated(donated: bool):
    sharding = SingleDeviceSharding(jax.devices()[0])
    part = aligned_zeros((64, 3), np.float32)
    wanted = jax.ShapeDtypeStruct((64, 3), jnp.float32, sharding=sharding)
    array = array_from_parts(wanted, lambda index: part, donated=donated)
    memory = array.unsafe_buffer_pointer()
    after = jax.jit(lambda x: x + 1, donate_argnums=0)(array)
    assert (memory == part.ctypes.data) == (not donated)
    assert (memory == after.unsafe_buffer_pointer()) == donated
    np.testing.assert_array_equal(after, np.ones((64, 3)))


def test_a_part_is_read_once_for_all_its_devices():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    whole, reads = np.arange(8.0, dtype=np.float32), []
    wanted = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)
    array = array_from_parts(wanted, lambda index: reads.append(index) or whole[index])
    np.testing.assert_array_equal(array, whole)
    assert sorted(s.start for (s,) in reads) == [0, 2, 4, 6]
    assert len(array.addressable_shards) == 8


@pytest.mark.parametrize("donated", [False, True])
@pytest.mark.parametrize("kind", ["device", "pinned_host"])
def test_a_part_lands_in_the_memory_that_is_wanted(kind: str, donated: bool):
    sharding = SingleDeviceSharding(jax.devices()[0], memory_kind=kind)
    wanted = jax.ShapeDtypeStruct((4, 3), jnp.float32, sharding=sharding)
    whole = np.arange(12, dtype=np.float32).reshape(4, 3)
    found = array_from_parts(wanted, lambda index: whole[index], donated=donated)
    assert found.sharding.memory_kind == kind
    np.testing.assert_array_equal(np.asarray(found), whole)
