"""Norms of weights, gradients and updates by layer group, in rows of `norms.jsonl`.

The step's program is the same with and without them, and so are its bits: the weights before an
update are copied, and compared with those after it by a program of its own.
"""

import collections
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llamajax.checkpoint import named_leaves
from llamajax.monitoring import MetricsWriter
from llamajax.processes.host_collectives import broadcast_from_first
from llamajax.training.attempt import Attempt
from llamajax.training.hooks import Hook, LogHook
from llamajax.training.state import TrainState

NORMS = "norms.jsonl"


@jax.jit
def _copied(trained: Any) -> Any:
    return jax.tree.map(jnp.copy, trained)


@jax.jit
def _norms(trained: Any, before: Any) -> tuple[list[jax.Array], list[jax.Array]]:
    """Return the norm of each weight, and of its update."""
    weights = [optax.tree.norm(w) for w in named_leaves(trained).values()]
    if before is None:
        return weights, []
    change = jax.tree.map(jnp.subtract, trained, before)
    return weights, [optax.tree.norm(c) for c in named_leaves(change).values()]


def _group(name: str) -> str:
    """Return the layer group of a weight: `attention` of `blocks/attention/key`."""
    parent, _, leaf = name.removeprefix("blocks/").rpartition("/")
    return parent.replace("/", ".") or leaf


class NormsHook(Hook):
    """Writes norms after the steps that are multiples of `monitoring.norms_every`.

    Between the step before and such a step, devices hold one more copy of what is trained. Where
    there is no room for it, norms of updates are left out with a warning. Norms of gradients are
    the guard's: without one there are none.
    """

    def __init__(self, attempt: Attempt, log: LogHook):
        super().__init__(attempt)
        self._log, self._every = log, self.config.monitoring.norms_every
        self._before: Any = None
        self._has_room: bool | None = None
        primary = self.run.is_primary and self._every is not None
        self._rows = MetricsWriter(
            self.run.workdir, file=NORMS, resume_step=attempt.start.step, primary=primary
        )

    def is_due(self, step: int, stop: bool) -> bool:
        every = self._every
        return every is not None and (step % every == 0 or (step + 1) % every == 0)

    def __call__(self, step: int, state: TrainState, stop: bool) -> None:
        with self.attempt.timer.pause():  # no event: there may be one after each step
            if step % self._every == 0:
                self._write(step, jax.device_get(_norms(state.trained, self._before)))
            self._before = None
            if (step + 1) % self._every == 0 and self._fits(state):
                self._before = jax.block_until_ready(_copied(state.trained))

    def _write(self, step: int, norms: tuple[list[np.ndarray], list[np.ndarray]]) -> None:
        kinds = {"weight": norms[0], "update": norms[1], "gradient": self._log.gradient_norms}
        sums: collections.Counter[str] = collections.Counter()
        for kind, values in kinds.items():
            for name, norm in zip(
                self.attempt.programs.at(step).weight_names, values, strict=False
            ):
                sums[f"norm_{kind}/{_group(name)}"] += float(norm) ** 2
        row = {"step": step} | {name: math.sqrt(square) for name, square in sums.items()}
        row["time_s"] = self.run.events.time_s
        self._rows.write(row)
        self.attempt.metrics.pass_on(row)

    def _fits(self, state: TrainState) -> bool:
        """Return whether devices have room for a copy; the same on all processes."""
        if self._has_room is None:
            self._has_room = broadcast_from_first(self._measure_room, state)
            if not self._has_room:
                self.attempt.progress.note(
                    "warning: monitoring.norms_every: devices have no room for a second copy of "
                    "the weights: norms.jsonl has no norms of updates"
                )
        return self._has_room

    def _measure_room(self, state: TrainState) -> bool:
        device = jax.local_devices()[0]
        stats = device.memory_stats() or {}
        shards = [s for x in jax.tree.leaves(state.trained) for s in x.addressable_shards]
        size = sum(shard.data.nbytes for shard in shards if shard.device == device)
        limit = stats.get("bytes_limit", math.inf)
        return stats.get("peak_bytes_in_use", 0) + size <= limit
