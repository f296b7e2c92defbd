"""From prepared data to batches on the devices, one step ahead.

Types of `data` are quoted: to name them would import grain, which `abstract_batch` does not need.
"""

from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from llamajax import data, sharding
from llamajax.config.schema import DataConfig, RunConfig


class Feed:
    """Batches of a run on its mesh; each process reads the rows that its devices hold."""

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        *,
        mixture: "data.Mixture",
        held_out: "data.Mixture | None",
        position: "data.Position",
    ):
        self._config = config
        self._mesh = mesh
        self._mixture = mixture
        self._held_out = held_out
        self._position = position

    def train(self, step: int) -> Iterator[dict[str, jax.Array]]:
        """Yield batches of updates step + 1, step + 2, ... without end; copies don't block."""
        c = self._config.data
        batches = data.train_batches(
            self._mixture,
            self._position,
            first_step=step,
            rows=sharding.local_rows(self._mesh, c.global_batch_size),
            num_threads=c.num_threads,
            prefetch=c.prefetch_batches,
        )
        return map(self._put, batches)

    def evaluation(self) -> Iterator[dict[str, jax.Array]]:
        """Yield batches of the validation split, in order; none where there is no such split."""
        if self._held_out is None:
            return iter(())
        batch_size = eval_batch_size(self._config)
        batches = data.eval_batches(
            self._held_out,
            batch_size=batch_size,
            seq_len=self._config.data.seq_len,
            rows=sharding.local_rows(self._mesh, batch_size),
            max_batches=self._config.train.eval_batches,
        )
        return map(self._put, batches)

    def _put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        return sharding.put_batch(_used(self._config.data, batch), self._mesh)


def eval_batch_size(config: RunConfig) -> int:
    """Return the rows of an evaluation batch: those of one microbatch, which its memory fits."""
    return config.data.global_batch_size // config.train.accumulation_steps


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
