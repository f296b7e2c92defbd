"""From prepared data to batches on the devices, of the rows that each process holds.

Types of `data` are quoted: to name them would import grain, which `abstract_batch` does not need.
"""

import functools
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from llamajax import data, sharding
from llamajax.config.schema import DataConfig, RunConfig

DeviceBatch = dict[str, jax.Array]


def train_batches(
    config: DataConfig,
    mesh: Mesh,
    mixtures: "Mapping[str, data.Mixture]",
    position: "data.Position",
    *,
    step: int,
) -> Iterator[DeviceBatch]:
    """Yield batches of updates step + 1, step + 2, ... without end; copies don't block.

    mixtures: by hash, all that the position has from `step` on.
    """
    batches = data.train_batches(
        mixtures,
        position,
        first_step=step,
        rows=functools.partial(sharding.local_rows, mesh),
        num_threads=config.num_threads,
        prefetch=config.prefetch_batches,
    )
    return (put_batch(config, mesh, batch) for batch in batches)


def eval_batches(
    config: RunConfig, mesh: Mesh, held_out: "data.Mixture", *, packing: str
) -> Iterator[DeviceBatch]:
    """Yield batches of the validation split, in order. packing: of instruction data."""
    batch_size = eval_batch_size(config)
    batches = data.eval_batches(
        held_out,
        batch_size=batch_size,
        seq_len=config.data.seq_len,
        packing=packing,
        rows=sharding.local_rows(mesh, batch_size),
        max_batches=config.train.eval_batches,
    )
    return (put_batch(config.data, mesh, batch) for batch in batches)


def eval_batch_size(config: RunConfig) -> int:
    """Return the rows of an evaluation batch: those of one microbatch, which its memory fits."""
    return config.data.global_batch_size // config.train.accumulation_steps


def put_batch(config: DataConfig, mesh: Mesh, batch: Mapping[str, np.ndarray]) -> DeviceBatch:
    """Put what the step reads of a batch on the devices; copies don't block."""
    return sharding.put_batch(_used(config, batch), mesh)


def abstract_batch(
    config: DataConfig, mesh: Mesh, *, batch_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shapes, dtypes and shardings of a batch, for compiling ahead."""
    shape = (batch_size, config.seq_len)
    sharding_BT = sharding.batch_sharding(mesh)
    dtypes = dict.fromkeys(data.BATCH_KEYS, np.int32) | {"loss_mask": np.bool_}
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding_BT)
        for name, dtype in _used(config, dtypes).items()
    }


def _used(config: DataConfig, batch: Mapping) -> dict:
    """Drop the segment ids without document masks: attention masks by them where they are there."""
    drop = () if config.mask_documents else ("segment_ids",)
    return {name: value for name, value in batch.items() if name not in drop}
