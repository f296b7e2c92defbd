"""Where a run starts: checkpoint, place in the data, weights to import, and what has changed."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llamajax import data, optim
from llamajax.checkpoint import Checkpoint
from llamajax.config import diff, from_json_dict, to_json_dict
from llamajax.errors import UserError
from llamajax.formats.weights import TOKENIZER, Weights
from llamajax.monitoring.run_history import History
from llamajax.monitoring.sinks import check_installed
from llamajax.processes.host_collectives import broadcast_from_first
from llamajax.tokenizers.tokenizer_identity import (
    describe,
    how_to_prepare,
    matches_record,
    tokenizer_record,
)
from llamajax.training.export import exports_after, is_exported
from llamajax.training.initial_state import new_moment_dtypes, open_initial_weights
from llamajax.training.place_in_data import place_in_data
from llamajax.training.resume import (
    Request,
    check_fork,
    choose_checkpoint,
    open_fork,
    requested_start,
)
from llamajax.training.setup import Setup
from llamajax.training.workdir import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run starts, resumes, or continues after a rollback.

    weights: to import. recorded: the JSON object that its checkpoints hold besides the arrays and
    the ledger. evaluates, exports: whether its step is to be evaluated or exported first, as the
    process before ended in between. time_after: seconds of the rows after its step, which are
    removed.
    """

    request: Request
    checkpoint: Checkpoint | None  # to restore
    position: data.Position
    ledger: data.Ledger
    weights: Weights | None
    recorded: dict[str, Any]
    evaluates: bool
    exports: bool
    time_after: dict[str, float]

    @property
    def step(self) -> int:
        """Updates already applied."""
        return 0 if self.checkpoint is None else self.checkpoint.step

    @property
    def fork(self) -> dict[str, Any] | None:
        """What is recorded of `checkpoint` where it is another run's (`open_fork`)."""
        origin = self.recorded["origin"]
        return origin if origin and origin["step"] == self.step else None

    @property
    def first_compiled(self) -> int:
        """The first step whose programs are needed."""
        return self.step if self.evaluates else self.step + 1


def first_start(run: Run) -> tuple[Start, History]:
    """Choose where a process starts, as its config asks; return also what counts of the record.

    As `find_start`.
    """
    broadcast_from_first(check_installed, run.config.monitoring.sinks)
    history = History.read(run.workdir)
    request = requested_start(run, history)
    if request == "restart":
        history = History(run.workdir, [], [])  # as if nothing were there
        run.rollbacks.entries.clear()
    return find_start(run, request, history), history


def find_start(run: Run, request: Request, history: History) -> Start:
    """Choose where to start, and say what has changed since the checkpoint there was saved.

    To be called by all processes. Raises UserError where something does not fit.
    """
    setup, config = run.setup, run.config
    check_fork(run)
    checkpoint = choose_checkpoint(run, request, history)
    origin = None
    if checkpoint is None:
        checkpoint, origin = open_fork(run, history)
    meta, step = (None, 0) if checkpoint is None else (checkpoint.meta, checkpoint.step)
    of = run.workdir if origin is None else Path(origin["run"])  # the run that saved it
    weights = open_initial_weights(config, meta, of=of)
    tokenizer = run_tokenizer(setup, meta, of)
    if step > config.train.steps:
        raise UserError(
            f"the newest checkpoint is of step {step}, beyond train.steps = {config.train.steps}: "
            "raise train.steps, or choose another --workdir"
        )
    for line in changes(setup, checkpoint, forked=origin is not None) if meta else ():
        run.say(line)
    position, ledger = place_in_data(run, meta, step, origin=origin)
    recorded = {
        "config": to_json_dict(config),
        "position": position.to_json(),
        "tokenizer": tokenizer,
        "data": setup.data_record,
        "rollbacks": len(run.rollbacks.entries),
        "origin": origin or (meta or {}).get("origin"),
        "rope_scaling_changed": _rope_scaling_changed(run, meta, weights),
    }
    if config.lora.rank:
        recorded["base"] = {"path": str(weights.path), "fingerprint": weights.fingerprint()}

    def missed() -> list[bool]:
        if not step or origin:
            return [False, False]
        evaluates = setup.evaluates_after(step) and not history.is_evaluated(step)
        return [evaluates, exports_after(config, step) and not is_exported(run.workdir, step)]

    evaluates, exports = broadcast_from_first(missed)
    return Start(
        request=request,
        checkpoint=checkpoint,
        position=position,
        ledger=ledger,
        weights=weights,
        recorded=recorded,
        evaluates=evaluates,
        exports=exports,
        time_after=history.time_after(step),
    )


def run_tokenizer(setup: Setup, meta: Mapping[str, Any] | None, workdir: Path) -> dict:
    """Return the record of the run's tokenizer; UserError where the data has another one.

    meta, workdir: of the checkpoint that the run continues from, if it does, and of its run.
    """
    saved = (meta or {}).get("tokenizer")
    if saved and saved["fingerprint"] == setup.mixture.tokenizer_fingerprint:
        return saved
    path = setup.mixture.sources[0].path
    ours = data.load_tokenizer(path)
    if saved is None or matches_record(ours, saved):
        return saved or tokenizer_record(ours)
    raise UserError(
        f"data.path: {path} was prepared with another tokenizer "
        f"({describe(tokenizer_record(ours))}) than the one that the checkpoints in {workdir} were "
        f"trained with ({describe(saved)}): its token ids mean other text; "
        f"{how_to_prepare(workdir / TOKENIZER, saved)}, or begin another --workdir"
    )


def _rope_scaling_changed(
    run: Run, meta: Mapping[str, Any] | None, weights: Weights | None
) -> str | None:
    """Return how the run's rotary scaling differs from that of the weights it began from, if so.

    meta: of the checkpoint that the run continues from, if it does. Warns where the run begins.
    """
    if meta is not None:
        return meta.get("rope_scaling_changed")
    ours = run.config.model.rope_scaling
    if weights is None or (theirs := weights.model.rope_scaling) == ours:
        return None
    before = f"were trained with rope_scaling {theirs}" if theirs else "have no rope_scaling"
    changed = f"the weights {before}; this run trains them on with {ours}"
    run.say(f"warning: {changed}")
    return changed


def changes(setup: Setup, checkpoint: Checkpoint, *, forked: bool = False) -> Iterator[str]:
    """Yield a line for each key, and each split of the data, that changed since a checkpoint.

    forked: whether it is another run's.
    """
    meta, step = checkpoint.meta, checkpoint.step
    before, now = from_json_dict(meta["config"]), setup.config
    keys = diff(before, now)
    if forked:
        keys.pop("train.fork", None)
    for key, (old, new) in keys.items():
        yield f"changed since step {step}: {key}: {old or 'none'} -> {new or 'none'}"
    if dtypes := new_moment_dtypes(setup.spec.in_stored_order.abstract(), checkpoint):
        yield f"the moments of step {step} are converted to {', '.join(dtypes)}"
    if step and (before.optim.ema_decay is None) != (now.optim.ema_decay is None):
        yield (
            f"the average of the weights begins at those of step {step}"
            if before.optim.ema_decay is None
            else f"the average of the weights ends with step {step}: optim.ema_decay is none"
        )
    begun_from = {"train.fork": now.train.fork}
    if not now.lora.rank and step:
        begun_from["train.init_from"] = now.train.init_from
    for key, where in begun_from.items():
        if key in keys:
            yield (
                f"warning: {key} counts where a run begins, and this one goes on from step {step}: "
                f"{where} is not read. Choose another --workdir to begin from it"
            )
    if keys and step < now.train.steps:
        rates = [
            float(optim.schedule(c.optim, steps=c.train.steps)(step + 1)) for c in (before, now)
        ]
        if not math.isclose(*rates, rel_tol=1e-5):
            old, new = (f"{rate:.6g}" for rate in rates)
            yield f"changed since step {step}: learning rate of step {step + 1}: {old} -> {new}"
    records = meta.get("data", setup.data_record), setup.data_record
    for split in dict.fromkeys([*records[0], *records[1]]):
        old, new = (record.get(split, "none") for record in records)
        if old != new:
            is_split = split in ("train", "validation")
            where = f"{split} split of {now.data.path}" if is_split else split
            yield f"data changed since step {step}: {where}: {old} -> {new}"
