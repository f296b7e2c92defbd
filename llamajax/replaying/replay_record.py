"""The record that a run has of one step: config, position in the data, numbers, checkpoint."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llamajax import data
from llamajax.checkpoint import Checkpoint, complete_steps, open_checkpoint
from llamajax.checkpoint.directory_owner import recorded_directory
from llamajax.checkpoint.location import Location
from llamajax.config import RunConfig, from_json_dict
from llamajax.errors import UserError
from llamajax.monitoring import load_metrics
from llamajax.monitoring.blackbox import boxes, read_box
from llamajax.monitoring.run_facts import read_run_facts
from llamajax.optim.guard import REASONS
from llamajax.training.place_in_data import read_position
from llamajax.training.safety.rollback_log import RollbackLog
from llamajax.training.setup import Setup


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplayRecord:
    """All that is known of a step before anything is computed.

    base: the checkpoint to start from, None: the beginning. position: of the step, None: it follows
    from `base` and the audit. numbers: loss and grad_norm by step, as logged. machine: platform,
    device_kind and mesh of the run.
    """

    step: int
    config: RunConfig
    base: Checkpoint | None
    position: data.Position | None
    numbers: Mapping[int, Mapping[str, Any]]
    machine: Mapping[str, Any]

    @property
    def first_step(self) -> int:
        """Step of `base`."""
        return self.base.step if self.base else 0

    def read_position(self, setup: Setup, audit: RollbackLog) -> data.Position:
        """Return the position in the data of the steps from `base` to this one."""
        if self.position is not None:
            return self.position
        meta, origin = self.base and self.base.meta, self.machine.get("origin")
        is_fork = bool(origin) and origin["step"] == self.first_step
        step = max(self.first_step, audit.entries[-1].to_step if audit.entries else 0)
        return read_position(setup, meta, audit, step=step, is_fork=is_fork)

    def recorded_row(self, step: int, position: data.Position) -> Mapping[str, Any] | None:
        """Return the recorded loss and gradient norm of a step, and why its update was skipped.

        position: of the data that the step is to read. None where the record has no such step, or
        one that read other data.
        """
        row, first_sample = self.numbers.get(step), position.first_sample(step - 1)
        if row is None or row.get("first_sample", first_sample) != first_sample:
            return None
        reason = row.get("update_skipped", 0)  # a number in a box, words in metrics.jsonl
        return row | {"update_skipped": REASONS[reason] if isinstance(reason, int) else reason}


def read_record(workdir: Path, step: int, *, box: Path | None) -> ReplayRecord:
    """Read the record of `step`. box: a black box to take it from, as after a rollback.

    Raises UserError for a directory that is no run's, or a step that the run has not made.
    """
    config_file = workdir / "config.json"
    if not config_file.is_file():
        raise UserError(f"--workdir={workdir}: there is no run in it (no config.json)")
    checkpoints = recorded_directory(workdir)
    steps = complete_steps(checkpoints)
    numbers, position = _numbers(workdir, step, box)
    newest = max([*numbers, *steps], default=0)
    facts = read_run_facts(workdir)
    origin = facts.get("origin")
    first = origin["step"] + 1 if origin else 1
    if not first <= step <= newest:
        raise UserError(
            f"--step={step}: {workdir} has made steps {first} to {newest}"
            if newest
            else f"--step={step}: {workdir} has made no step yet"
        )
    later = min((n for n in steps if n >= step), default=None)
    after = open_checkpoint(checkpoints / str(later)).meta if later is not None else None
    config = from_json_dict(
        after["config"] if after and box is None else json.loads(config_file.read_text("utf-8")),
        source=str(config_file),
    )
    if position is None and after is not None:
        position = after["position"]
    return ReplayRecord(
        step=step,
        config=config,
        base=_base(checkpoints, [n for n in steps if n < step], origin),
        position=data.Position.from_json(position) if position else None,
        numbers=numbers,
        machine=facts,
    )


def _base(
    checkpoints: Location, steps: Sequence[int], origin: Mapping[str, Any] | None
) -> Checkpoint | None:
    """Open the newest checkpoint of `steps`, or that which a fork began with; None: neither."""
    if steps:
        return open_checkpoint(checkpoints / str(max(steps)))
    if not origin:
        return None
    found = open_checkpoint(recorded_directory(Path(origin["run"])) / str(origin["step"]))
    if found.manifest.fingerprint != origin["fingerprint"]:
        raise UserError(f"{found} is not the checkpoint that this run was forked from any more")
    return found


def _numbers(
    workdir: Path, step: int, box: Path | None
) -> tuple[dict[int, dict[str, float]], dict[str, Any] | None]:
    """Return loss and gradient norm of the steps on record, and the position if a box was named."""
    if box is not None:
        try:
            head, rows = read_box(box)
        except (OSError, ValueError) as error:
            raise UserError(f"--blackbox={box}: cannot be read: {error}") from None
        if step not in {row["step"] for row in rows} or "position" not in head:
            has = f"{rows[0]['step']} to {rows[-1]['step']}" if rows else "none"
            raise UserError(f"--blackbox={box}: it has no step {step}; its steps are {has}")
        return _by_step(rows), head["position"]
    found = _by_step(row for file in boxes(workdir)[::-1] for row in read_box(file)[1])
    return found | _by_step(load_metrics(workdir)), None


def _by_step(rows: Any) -> dict[int, dict[str, float]]:
    """Return the numbers of each step; later rows replace earlier ones."""
    wanted = ("loss", "grad_norm", "first_sample", "update_skipped")
    return {
        row["step"]: {name: row[name] for name in wanted if name in row}
        for row in rows
        if "grad_norm" in row
    }
