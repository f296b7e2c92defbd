"""Where a run starts: checkpoint, place in the data, weights to import, and what has changed.

A run imports weights once (`train.init_from`). Afterwards its own checkpoints hold everything, but
for the frozen weights of a run with adapters: those are read again from where they were, and must
be the same ones.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llamajax import data, optim
from llamajax.checkpoint import Checkpoint
from llamajax.checkpoint.location import locate
from llamajax.checkpoint.restore import model_differences
from llamajax.config import diff, from_json_dict, to_json_dict
from llamajax.config.schema import LoraConfig, RunConfig
from llamajax.config.values import show
from llamajax.errors import UserError, combine
from llamajax.formats.weights import TOKENIZER, Weights, open_base, open_weights
from llamajax.monitoring.sinks import check_installed
from llamajax.processes.host_collectives import broadcast_from_first
from llamajax.tokenizers.tokenizer_identity import (
    data_mismatch,
    describe,
    matches_record,
    tokenizer_record,
)
from llamajax.training.fork import check_directories, check_same_origin, open_fork
from llamajax.training.resume import Request, choose_checkpoint, requested_start
from llamajax.training.run_record import History
from llamajax.training.setup import Setup, new_moment_dtypes
from llamajax.training.stages import check_past, stage_warnings
from llamajax.training.workdir import Run

# What must not change in a run with adapters: the function, or the arrays of its checkpoints.
_FIXED = ("rank", "alpha", "targets", "base_dtype")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run starts, resumes, or continues after a rollback.

    superseded: on process 0, steps of checkpoints that a rollback made invalid. weights: to
    import. recorded: the JSON object that its checkpoints hold besides the arrays and the ledger.
    is_evaluated: whether the evaluation of its step is on record. time_after: seconds of the rows
    after its step, which are removed.
    """

    request: Request
    checkpoint: Checkpoint | None  # to restore
    superseded: list[int]
    position: data.Position
    ledger: data.Ledger
    weights: Weights | None
    recorded: dict[str, Any]
    is_evaluated: bool
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


def first_start(run: Run) -> tuple[Start, History]:
    """Choose where a process starts, as its config asks; return also what counts of the record.

    As `find_start`.
    """
    broadcast_from_first(check_installed, run.config.monitoring.sinks)
    history = History.read(run.workdir)
    request = requested_start(run.config, history)
    if request == "restart":
        history = History(run.workdir, [], [])  # as if nothing were there
        run.rollbacks.entries.clear()
    return find_start(run, request, history), history


def find_start(run: Run, request: Request, history: History) -> Start:
    """Choose where to start, and say what has changed since the checkpoint there was saved.

    To be called by all processes. Raises UserError where something does not fit.
    """
    setup, config = run.setup, run.config
    check_directories(config, run.workdir, run.checkpointer.directory)
    superseded = [] if request == "older" else run.rollbacks.superseded(run.checkpointer)
    checkpoint, words = choose_checkpoint(
        request,
        run.checkpointer,
        history,
        resume_step=config.train.resume_step,
        superseded=superseded,
    )
    for line in words:
        run.say(line)
    origin = None
    if checkpoint is None:
        checkpoint, origin = open_fork(config)
        check_same_origin(origin, history.events, history.rows)
    if origin:
        run.say(f"forked from {checkpoint}")
    meta, step = (None, 0) if checkpoint is None else (checkpoint.meta, checkpoint.step)
    of = run.workdir if origin is None else Path(origin["run"])
    weights = open_initial_weights(config, meta, of=of)
    tokenizer = run_tokenizer(setup, meta, of)
    origin = origin or (meta or {}).get("origin")
    if step > config.train.steps:
        raise UserError(
            f"the newest checkpoint is of step {step}, beyond train.steps = {config.train.steps}: "
            "raise train.steps, or choose another --workdir"
        )
    for line in changes(setup, checkpoint, forked=of != run.workdir) if meta else ():
        run.say(line)
    if origin and origin["step"] == step:
        meta["rollbacks"] = 0  # those of this run count, not those of the one before the fork
    position, ledger = _place_in_data(run, meta, step, forked=of != run.workdir)
    recorded = {
        "config": to_json_dict(config),
        "position": position.to_json(),
        "tokenizer": tokenizer,
        "data": setup.data_record,
        "rollbacks": len(run.rollbacks.entries),
        "origin": origin,
        "rope_scaling_changed": _rope_scaling_changed(run, meta, weights),
    }
    if config.lora.rank:
        recorded["base"] = base_record(weights)
    return Start(
        request=request,
        checkpoint=checkpoint,
        superseded=superseded,
        position=position,
        ledger=ledger,
        weights=weights,
        recorded=recorded,
        is_evaluated=history.is_evaluated(step),
        time_after=history.time_after(step),
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
    changed = f"the weights have no rope_scaling; this run trains them on with {ours}"
    if theirs is not None:
        changed = (
            f"the weights were trained with rope_scaling {theirs}; this run has {ours} instead"
        )
    run.say(f"warning: {changed}")
    return changed


def _place_in_data(
    run: Run, meta: Mapping[str, Any] | None, step: int, *, forked: bool
) -> tuple[data.Position, data.Ledger]:
    """Return where in the data a run continues, and what it has read.

    meta, step: of the checkpoint that it continues from, if it does. forked: whether that is
    another run's.
    """
    mixtures, stages = run.setup.mixtures, run.setup.data_settings
    before, saved, rollbacks = data.Position.start(**stages[0][1]), None, 0
    if meta is not None:
        before = data.Position.from_json(meta["position"], reached=meta.get("reached")).until(step)
        saved = meta.get("ledger")
        if not forked:
            check_past(run.setup, from_json_dict(meta["config"]), before, step=step)
        rollbacks = meta.get("rollbacks", 0)
        if saved and step:
            data.check_ledger(saved, mixtures, before, step=step)
    position = run.rollbacks.position(before, step=step, rollbacks=rollbacks)
    position = data.with_stages(position, stages, mixtures, step=step)
    for line in stage_warnings(run.config, position, mixtures, step=step):
        run.say(line)
    return position, data.Ledger(mixtures, position, step=step, saved=saved)


def run_tokenizer(setup: Setup, meta: Mapping[str, Any] | None, workdir: Path) -> dict:
    """Return the record of the run's tokenizer; UserError where the data has another one.

    meta, workdir: of the checkpoint that the run continues from, if it does, and of its run.
    """
    saved, kept = (meta or {}).get("tokenizer"), workdir / TOKENIZER
    if meta is not None and saved is None and kept.is_dir():
        try:
            saved = tokenizer_record(data.load_tokenizer(kept))  # older checkpoints have no record
        except UserError as error:
            raise UserError(
                f"{error}; it is the only record of the tokenizer that these checkpoints were "
                f"trained with: copy that tokenizer into {kept}, or remove {kept} if it is the one "
                "that the data was prepared with"
            ) from error
    if saved and saved["fingerprint"] == setup.mixture.tokenizer_fingerprint:
        return saved
    path = setup.mixture.sources[0].path
    ours = data.load_tokenizer(path)
    if saved is None or matches_record(ours, saved):
        return saved or tokenizer_record(ours)
    raise UserError(
        f"data.path: {path} was prepared with another tokenizer "
        f"({describe(tokenizer_record(ours))}) than the one that the checkpoints in {workdir} were "
        f"trained with ({describe(saved)}): its token ids mean other text. Prepare the text again "
        f"with --tokenizer={kept}, or begin another --workdir"
    )


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
    if "data" not in meta:
        if meta["position"]["segments"][-1]["mixture_hash"] != setup.mixture.hash:
            yield f"data changed since step {step}; the checkpoint does not say what it was"
        return
    for split in dict.fromkeys([*meta["data"], *setup.data_record]):
        old, new = (record.get(split, "none") for record in (meta["data"], setup.data_record))
        if old != new:
            is_split = split in ("train", "validation")
            where = f"{split} split of {now.data.path}" if is_split else split
            yield f"data changed since step {step}: {where}: {old} -> {new}"


def open_initial_weights(
    config: RunConfig, meta: Mapping[str, Any] | None, *, of: str | Path = "this --workdir"
) -> Weights | None:
    """Return the weights to import before the first or next step; None where there are none.

    meta, of: of the checkpoint that the run continues from, if it does, and its run. Raises one
    UserError with everything that does not fit: architecture, tokenizer, the base of earlier
    adapters.
    """
    if meta is not None:
        before = from_json_dict(meta["config"], source="the config of the newest checkpoint")
        _check_adapters(before.lora, config.lora, of=of)
        if not config.lora.rank:
            return None
        moved = before.train.init_from != config.train.init_from
        path = locate(config.train.init_from) if moved else None
        return open_base(meta["base"], path=path, adapters=Path(of))
    if config.train.init_from is None:
        return None
    try:
        weights = open_weights(config.train.init_from)
    except UserError as error:
        raise UserError(f"train.init_from = {config.train.init_from}: {error}") from None
    problems = model_differences(*map(dataclasses.asdict, (weights.model, config.model)))
    if config.model.rope_scaling is not None:  # training to a longer context begins like this
        problems = [each for each in problems if not each.startswith("model.rope_scaling")]
    if (tokenizer := weights.tokenizer) is not None:
        path = config.data.paths[0]
        theirs = weights.load_tokenizer()
        ours = data.load_tokenizer(path)
        if problem := data_mismatch(f"data.path: {path}", ours, theirs, tokenizer):
            problems.append(problem)
    if problems:
        raise combine(
            problems, title=f"train.init_from = {config.train.init_from}: its weights do not fit:"
        )
    return weights


def base_record(weights: Weights) -> dict[str, str]:
    """Return what checkpoints of adapters record of the weights that they belong to."""
    return {"path": str(weights.path), "fingerprint": weights.fingerprint()}


def _check_adapters(old: LoraConfig, new: LoraConfig, *, of: str | Path) -> None:
    """Raise UserError when the run that continues has other adapters than the one that it was."""
    keys = _FIXED if old.rank and new.rank else ("rank",)
    pairs = {key: (show(getattr(old, key)), show(getattr(new, key))) for key in keys}
    problems = [f"lora.{k}: it was {a}, now it is {b}" for k, (a, b) in pairs.items() if a != b]
    if problems:
        raise combine(
            problems,
            title=f"the checkpoints in {of} have other adapters, or none; go back to what it was, "
            "or begin another --workdir with train.init_from and without train.fork:",
        )
