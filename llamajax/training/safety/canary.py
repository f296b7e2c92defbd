"""The canary: compare what the replicas of a run compute and hold, bit by bit.

It finds silent data corruption: a chip that computes wrongly and reports nothing. All data-parallel
replicas run the same tokens through the same weights, forward and backward, and arrays that several
devices hold are compared. A single replica runs twice instead: that finds a fault that comes and
goes, not one that repeats. Its program is compiled with the platform's deterministic options. Where
the platform is not known to repeat its bits, the first check runs twice: if most devices differ
from themselves, what they compute is not compared.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llamajax.backends import CompilerOptions
from llamajax.backends.platforms import platform_facts
from llamajax.checkpoint import named_leaves
from llamajax.errors import say
from llamajax.models import replicas
from llamajax.models.llama import Compute, Llama
from llamajax.models.sharded_step import sharded_step
from llamajax.training.safety.guard_stops import BadDevice
from llamajax.training.state import TrainState

REPLICA_AXES = ("data", "fsdp", "sequence")  # along these devices compute the same of other tokens
_COPY_AXES = ("data", "sequence")  # along these they hold the same part of every array
_SEED = 20250703


class Canary:
    """Compiled once; `check` raises BadDevice naming the devices whose bits differ."""

    def __init__(
        self,
        state: TrainState,
        mesh: Mesh,
        compute: Compute,
        *,
        rows: int,
        seq_len: int,
        options: CompilerOptions,
    ):
        """rows: samples of a device's microbatch. options: deterministic ones of the compiler."""
        self._mesh = mesh
        self._names = list(named_leaves(state.whole))
        shape = (rows, seq_len)
        rng, vocab_size = np.random.default_rng(_SEED), state.model.config.vocab_size
        self._tokens = rng.integers(vocab_size, size=shape, dtype=np.int32)
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, _WHOLE))
        tables = jax.jit(_tables(state.whole, mesh, compute))
        self._tables: Callable = options.compile(tables.lower(state.whole, tokens))
        known = platform_facts(mesh.devices.flat[0].platform).is_deterministic
        self._repeats: bool | None = True if known else None  # its bits; None: not asked yet
        self._clean_at: int | None = None

    def check(self, step: int, state: TrainState) -> None:
        """Raise BadDevice where bits differ. Waits for the devices; all processes see the same."""
        computed, stored = self._run(state)
        if self._repeats is None:
            self._repeats = _most_repeat(computed, self._run(state)[0])
            if not self._repeats and jax.process_index() == 0:
                say(_NOT_REPEATED)
        if not self._repeats:
            problems = []
        elif all(self._mesh.shape[axis] == 1 for axis in REPLICA_AXES):
            again, _ = self._run(state)
            problems = [] if np.array_equal(computed, again) else [_TWICE]
        else:
            problems = self._odd_devices(computed, REPLICA_AXES, ("blocks", "loss"), _COMPUTED)
        problems += self._odd_devices(stored, _COPY_AXES, self._names, _STORED)
        if problems:
            raise BadDevice(self._report(step, problems))
        self._clean_at = step

    def _run(self, state: TrainState) -> list[np.ndarray]:
        sharding = NamedSharding(self._mesh, _WHOLE)
        tokens = jax.make_array_from_process_local_data(sharding, self._tokens)
        return [np.asarray(table) for table in jax.device_get(self._tables(state.whole, tokens))]

    def _odd_devices(
        self, table: np.ndarray, axes: tuple[str, ...], names: Any, words: str
    ) -> list[str]:
        """Return a sentence for each device whose digests are not those of most of its copies."""
        order = self._mesh.axis_names
        along = [order.index(axis) for axis in axes]
        rest = [i for i in range(len(order)) if i not in along]
        copies = int(np.prod([table.shape[i] for i in along]))
        digests = table.transpose(*along, *rest, -1).reshape(copies, -1, table.shape[-1])
        devices = self._mesh.devices.transpose(*along, *rest).reshape(copies, -1)
        problems = []
        for group in range(digests.shape[1]):
            values, counts = np.unique(digests[:, group], axis=0, return_counts=True)
            usual = values[counts.argmax()]
            decided = len(values) == 1 or np.sort(counts)[-1] > np.sort(counts)[-2]
            for copy in range(copies):
                differ = np.flatnonzero(digests[copy, group] != usual)
                if differ.size:
                    what = words.format(", ".join(names[i] for i in differ[:3]))
                    sure = "" if decided else " (or the others are wrong: as many say each)"
                    device = devices[copy, group]
                    where = f"{device.device_kind}, process {device.process_index}"
                    problems.append(f"device {device.id} ({where}) {what}{sure}")
        return problems

    def _report(self, step: int, problems: list[str]) -> str:
        since = "this start" if self._clean_at is None else f"step {self._clean_at}"
        shown = "; ".join(problems[:8]) + ("; and more" if len(problems) > 8 else "")
        return (
            f"step {step}: silent data corruption: {shown}. Take that device's node out and start "
            f"again; all was well at {since}, checkpoints after it may be wrong: move them away"
        )


_WHOLE = PartitionSpec()
_COMPUTED = "computes other bits than its replicas from the same tokens ({})"
_STORED = "holds other bits than its copies ({})"
_NOT_REPEATED = (
    "warning: the canary cannot compare what devices compute, as they give other bits each time; "
    "it goes on comparing what they hold. `llamajax.doctor --only=reproducible` shows the same"
)
_TWICE = "the one replica computed other bits the second time from the same tokens"


def _most_repeat(first: np.ndarray, second: np.ndarray) -> bool:
    """Return whether half of the devices or more gave the same digests twice.

    If the backend repeats bits, those that did not are broken. One device alone tells nothing.
    """
    return bool((first == second).all(axis=-1).mean() >= 0.5)


def _tables(model: Llama, mesh: Mesh, compute: Compute) -> Callable:
    """Return a function of (model, tokens): digests by device of what it computes and holds."""
    whole, ones = NamedSharding(mesh, _WHOLE), (1,) * len(mesh.axis_names)

    def on_each(model: Llama, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        computed = replicas.compute_digests(model, tokens_BT, compute)
        return computed.reshape(*ones, -1), replicas.weight_digests(model).reshape(*ones, -1)

    def tables(model: Llama, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        each = PartitionSpec(*mesh.axis_names)
        run = sharded_step(on_each, mesh, model, (_WHOLE,), each, compute)
        return jax.sharding.reshard(run(model, tokens_BT), whole)

    return tables
