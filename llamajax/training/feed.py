"""From prepared data to batches on the devices, one step ahead."""

from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from llamajax import data, sharding
from llamajax.config.schema import DataConfig, RunConfig


class Feed:
    """Batches of a run, placed on the mesh; each process reads the rows that its devices hold."""

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        *,
        mixture: data.Mixture,
        held_out: data.Mixture | None,
        position: data.Position,
    ):
        self._data = config.data
        self._mesh = mesh
        self._mixture = mixture
        self._held_out = held_out
        self._position = position
        # An evaluation has the memory of one microbatch.
        self._eval_batch = config.data.global_batch_size // config.train.accumulation_steps
        self._eval_batches = config.train.eval_batches

    def train(self, step: int) -> Iterator[dict[str, jax.Array]]:
        """Batches of updates step + 1, step + 2, ... without end; copies to devices don't block."""
        rows = sharding.local_rows(self._mesh, self._data.global_batch_size)
        batches = data.train_batches(
            self._mixture,
            self._position,
            first_step=step,
            rows=rows,
            num_threads=self._data.num_threads,
            prefetch=self._data.prefetch_batches,
        )
        return map(self._place, batches)

    def evaluation(self) -> Iterator[dict[str, jax.Array]]:
        """Batches of the validation split, in order; none where there is no such split."""
        if self._held_out is None:
            return iter(())
        batches = data.eval_batches(
            self._held_out,
            batch_size=self._eval_batch,
            seq_len=self._data.seq_len,
            rows=sharding.local_rows(self._mesh, self._eval_batch),
            max_batches=self._eval_batches,
        )
        return map(self._place, batches)

    def abstract(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a batch, for compiling ahead."""
        return abstract_batch(self._data, self._mesh, batch_size=batch_size)

    @property
    def eval_batch_size(self) -> int:
        """Rows of an evaluation batch, over all processes."""
        return self._eval_batch

    def _place(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        return sharding.put_batch(_wanted(self._data, batch), self._mesh)


def abstract_batch(
    config: DataConfig, mesh: Mesh, *, batch_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a batch, for compiling ahead."""
    shape = (batch_size, config.seq_len)
    placed = sharding.batch_sharding(mesh)
    names = _wanted(config, dict.fromkeys(data.BATCH_KEYS))
    dtypes = {name: np.bool_ if name == "loss_mask" else np.int32 for name in names}
    return {n: jax.ShapeDtypeStruct(shape, t, sharding=placed) for n, t in dtypes.items()}


def _wanted(config: DataConfig, batch: Mapping) -> dict:
    """Without document masks the attention is told so by the absence of segment ids."""
    drop = () if config.mask_documents else ("segment_ids",)
    return {name: value for name, value in batch.items() if name not in drop}
