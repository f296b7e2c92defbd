"""Read, check, and log the metrics of every step; log norms by layer group after some."""

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llamajax import data, optim
from llamajax.backends import memory_in_use
from llamajax.checkpoint import named_leaves
from llamajax.errors import listed
from llamajax.monitoring import MetricsWriter
from llamajax.optim.guard import REASONS
from llamajax.processes.host_collectives import broadcast_from_first
from llamajax.training.attempt import Attempt
from llamajax.training.hooks import Hook
from llamajax.training.messages import mfu
from llamajax.training.safety.guard_stops import stop_where_asked
from llamajax.training.state import TrainState

NORMS = "norms.jsonl"
_SHOWN_IDS = 8


class LogHook:
    """Reads the metrics of each step while the next one runs, so that no step waits for the host.

    Every step enters the black box, and its guard's decision is acted on. Rows of `metrics.jsonl`
    have times that are means over the steps since the last row.
    """

    def __init__(self, attempt: Attempt):
        self._attempt, self._run = attempt, attempt.run
        self.gradient_norms: Sequence[np.ndarray] = ()  # by weight, of the last step read
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._has_warned = False  # of a slower attention

    def __call__(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Read the metrics of the previous step; keep those of `step` for the next call."""
        if self._pending is not None:
            self.flush()
            self._run.checkpointer.warm_up()  # imports Orbax once, while a step runs
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Wait for the metrics that were kept, and write their row.

        Raises GuardStop or RollbackNeeded where the update was skipped and the config asks for it.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        train, values = self._run.config.train, jax.device_get(metrics)
        self.gradient_norms = values.get("weight_norms", ())
        self._attempt.timer.mark_fetched(step)
        row = self.inspect(step, values)
        # The last step of a stage, so that no row has times of two.
        is_last = step == train.steps or step in self._run.setup.borders
        if step % train.log_every == 0 or is_last or "update_skipped" in row:
            self._write(step, row)
        stop_where_asked(step, values, self._run.config.guard)

    def inspect(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Return the numbers of a row; enter them in the black box; warn of what is unusual."""
        a, position = self._attempt, self._attempt.start.position
        plain = {name: value.item() for name, value in metrics.items() if value.ndim == 0}
        box = {"step": step, "first_sample": position.first_sample(step - 1)}
        box["batch_size"] = position.segment(step - 1).batch_size
        box["seed"] = self._run.config.train.seed
        box |= {f"unlogged_{part}": value for part, value in a.timer.untaken.items()} | plain
        names = a.programs.at(step).weight_names
        for name, norm in zip(names, metrics.get("weight_norms", ()), strict=False):
            box[f"norm/{name}"] = norm.item()
        self._run.box.add(box)
        reason = plain.pop("update_skipped", 0)
        for internal in ("skipped_in_a_row", "loss_limit", "grad_norm_limit"):
            plain.pop(internal, None)
        if not plain.get("split_attention", 1):
            del plain["split_attention"]
        elif "split_attention" in plain and not self._has_warned:
            self._has_warned = True
            a.progress.note(
                f"warning: step {step} was slower: its documents are too many for cuDNN's kernel, "
                "so that attention was `split`. Rows of such steps have split_attention. Longer "
                "documents, or data.mask_documents=false, avoid it"
            )
        if not reason:
            return plain
        self._warn_of_skip(step, reason, metrics)
        return plain | {"update_skipped": REASONS[reason]}

    def _write(self, step: int, values: dict[str, Any]) -> None:
        a, events = self._attempt, self._run.events
        times = a.timer.take()
        row = {"step": step} | values | times
        row["tokens_seen"] = a.start.position.tokens_seen(step)
        row |= mfu(self._run.setup.at(step), times["tokens_per_s"]) | memory_in_use()
        row["time_s"] = events.time_s
        if a.failed_saves:
            row["failed_checkpoints"] = a.failed_saves
        events.check_directory()
        a.metrics.write(row)
        a.progress.show(row)
        if not math.isfinite(values["loss"]) and "update_skipped" not in values:
            a.progress.note(f"warning: the loss of step {step} is {values['loss']}")

    def _warn_of_skip(self, step: int, reason: int, metrics: Mapping[str, Any]) -> None:
        a, position = self._attempt, self._attempt.start.position
        mixture = self._run.setup.mixtures[position.segment(step - 1).mixture_hash]
        ids = data.sample_ids(mixture, position, step - 1).tolist()
        spiked = reason in (3, 4)
        file = a.write_box("spike" if spiked else "skip", step=step, sample_ids=ids)
        for event in ("spike", "skipped_update") if spiked else ("skipped_update",):
            self._run.events.write(event, step=step, reason=REASONS[reason])
        numbers = []
        for key, name in (("loss", "loss"), ("grad_norm", "gradient norm")):
            limit = float(metrics[f"{key}_limit"])
            allowed = f" (limit {limit:.4g})" if np.isfinite(limit) else ""
            numbers.append(f"{name} {float(metrics[key]):.4g}{allowed}")
        a.progress.note(
            f"warning: step {step}: update skipped, {REASONS[reason]}: {', '.join(numbers)}; "
            f"{int(metrics['skipped_in_a_row'])} in a row, {int(metrics['skipped_updates'])} in "
            f"all; samples {listed(ids, most=_SHOWN_IDS)}; black box {file}"
        )


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
    """Writes rows of `norms.jsonl` after the steps that are multiples of `monitoring.norms_every`.

    The step's program is the same with and without them, and so are its bits: the weights before an
    update are copied, and compared with those after it by a program of its own.

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
                self._before = jax.block_until_ready(optim.copied(state.trained))

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
