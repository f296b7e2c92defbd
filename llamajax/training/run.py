"""One run of one config in one directory: restored or begun, compiled, carried to its end.

The order is that of the errors a user can make: the machine, the mesh and the data first, then the
weights and the checkpoint, and only then memory and compilation.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llamajax import data
from llamajax.checkpoint import Checkpoint, Checkpointer, CheckpointError, named_leaves
from llamajax.checkpoint.location import is_remote
from llamajax.config import RunConfig, to_json_dict
from llamajax.errors import ExitCode, UserError
from llamajax.formats.weights import Weights
from llamajax.monitoring import EventLog, MetricsWriter, Progress, StepTimer, write_run_facts
from llamajax.monitoring.blackbox import BLACKBOX, BlackBox
from llamajax.processes.host_collectives import broadcast_from_first
from llamajax.training.acceptance import Acceptance
from llamajax.training.changes import changes, run_tokenizer
from llamajax.training.continuation import Asked, check_start, choose, set_aside
from llamajax.training.export import exporter, is_exported, write_adapters
from llamajax.training.feed import Feed
from llamajax.training.loop import Loop
from llamajax.training.narration import (
    conclude,
    facts,
    greet,
    previous,
    rates,
    say_of_donation,
)
from llamajax.training.origin import base_record, open_origin
from llamajax.training.run_record import (
    end_written,
    is_evaluated,
    is_finished,
    logged,
    removed_time,
    write_end,
    write_start,
)
from llamajax.training.safety.audit import Audit
from llamajax.training.safety.canary import Canary
from llamajax.training.safety.departure import LeavingAtOnce
from llamajax.training.safety.guardian import Guardian, RolledBack, Stopped
from llamajax.training.safety.hang import HangWatch
from llamajax.training.safety.rollback import roll_back
from llamajax.training.safety.shutdown import Shutdown
from llamajax.training.session import Session, prepare
from llamajax.training.starting import check_stored, compile_steps, starting_state
from llamajax.training.state import TrainState, to_natural
from llamajax.training.workdir import (
    check_shared,
    keep_tokenizer,
    open_checkpoints,
    opened,
    say,
    write_config,
)


def train(
    config: RunConfig, *, workdir: Path, shutdown: Shutdown, began_s: float | None = None
) -> int:
    """Run to the end or to a signal; the exit code. began_s: process start, `time.monotonic`."""
    began_s = time.monotonic() if began_s is None else began_s
    acceptance = Acceptance(workdir)
    with LeavingAtOnce():
        session = prepare(config)
    if session.machine.num_processes > 1:
        shutdown.take_back()
    with LeavingAtOnce(), contextlib.ExitStack() as stack:
        undo, when_accepted = acceptance.undo, acceptance.when_accepted
        process_id, primary = session.machine.process_id, session.machine.is_primary
        locked = stack.enter_context(opened(workdir, process_id=process_id, undo=undo))
        check_shared(workdir, key="--workdir")
        asked = check_start(config, workdir)
        checkpointer = stack.enter_context(open_checkpoints(session, workdir, acceptance))
        when_accepted(lambda: set_aside(asked, config, workdir, checkpointer.directory))
        stack.enter_context(LeavingAtOnce())  # before the checkpointer waits for the others
        stack.callback(undo.close)  # before this process leaves
        shutdown.name_previous(lambda: previous(checkpointer))
        audit = Audit(workdir, primary=primary)
        stack.enter_context(logged(workdir, primary=primary, when_accepted=when_accepted))
        events = EventLog(workdir, primary=primary)
        box = BlackBox(workdir, steps=config.guard.blackbox_steps, primary=primary)
        for record in (events, box):
            when_accepted(record.begin)
        run = _Run(
            session=session,
            checkpointer=checkpointer,
            workdir=workdir,
            locked=locked,
            shutdown=shutdown,
            audit=audit,
            box=stack.enter_context(box),
            events=events,
            acceptance=acceptance,
        )
        if anew := asked == "restart":
            audit.rollbacks.clear()
        start = _where_to_start(run, asked)
        if is_finished(config, workdir, start.step):
            check_stored(session, start.checkpoint)
            say(f"finished before, at step {start.step}: {workdir}", primary=primary)
            return ExitCode.FINISHED
        newest = lambda: max(start.step, box.newest_step)  # noqa: E731
        ended = stack.enter_context(end_written(events, newest, shutdown, checkpointer))
        if primary:
            write_start(events, workdir, session, step=start.step, began_s=began_s, anew=anew)
            when_accepted(lambda: write_config(workdir, config))
            when_accepted(lambda: keep_tokenizer(workdir, config, start.tokenizer))
        greet(session, start.step)
        loop, code = _trained(run, start)
        if code == 0 and config.lora.rank:
            write_adapters(config, start.base, workdir)
        ended["code"] = code
    if primary:
        with logged(workdir, primary=primary):
            conclude(loop, workdir, code)
    return code


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """What a run has from its start to its end, however often it is rolled back between."""

    session: Session
    checkpointer: Checkpointer
    workdir: Path
    locked: bool  # against a second run
    shutdown: Shutdown
    audit: Audit
    box: BlackBox
    events: EventLog
    acceptance: Acceptance


def _trained(run: _Run, start: "_Start") -> tuple[Loop, int]:
    """Train, from an earlier step again where the guard asks for it: the last loop, the code."""
    compiled, primary = None, run.session.machine.is_primary
    while True:
        with contextlib.ExitStack() as stack:
            loop, state = _build(run, start, stack, compiled)
            compiled = (loop.step, loop.eval_step, loop.canary)
            try:
                with loop.hang:
                    return loop, _watched(loop, state, start.step, run.workdir)
            except Stopped as error:
                problem: Exception = error.with_traceback(None)  # it would hold the state
            except RolledBack as error:
                problem = error.with_traceback(None)
            except CheckpointError as error:
                fix = "Make room or mend the directory; a rerun continues from the last"
                say(f"error: {error}. {fix}")
                passes = is_remote(run.checkpointer.directory)
                return loop, ExitCode.TRANSIENT if passes else ExitCode.USER_ERROR
        del state
        began_s, reason = time.monotonic(), "stop" if isinstance(problem, Stopped) else "rollback"
        box = loop.guardian.write(reason, step=run.box.newest_step, cause=str(problem))
        try:
            if isinstance(problem, Stopped):
                raise problem
            told = roll_back(problem, run.checkpointer, run.audit, loop.guardian)
        except Stopped as error:
            say(
                f"error: {error}. Nothing was saved since; the black box is {box}, and "
                f"`python -m llamajax.replay --workdir={run.workdir} --step={run.box.newest_step}` "
                "looks into the step (docs/guards.md)",
                primary=primary,
            )
            return loop, error.exit_code
        to_step = run.audit.rollbacks[-1].to_step
        loop.record_saves()
        run.events.write("rollback", step=problem.step, to_step=to_step, reason=problem.reason)
        say(told, primary=primary)
        start = _where_to_start(run, "again")
        start = dataclasses.replace(start, rolled_back_s=time.monotonic() - began_s)


def _watched(loop: Loop, state: TrainState, start: int, workdir: Path) -> int:
    at = (workdir, start)
    if start and loop.eval_is_due(start) and not broadcast_from_first(is_evaluated, *at):
        loop.evaluate(start, state)  # a signal or a crash came between the save and this
    if start and loop.export_is_due(start) and not broadcast_from_first(is_exported, *at):
        loop.export(start, loop.at_rest(state))
    step = loop.run(state, start)
    return 0 if step == loop.train.steps and not loop.shutdown.requested else ExitCode.STOPPED


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Start:
    """Where a run takes up.

    checkpoint: what is restored, if anything. position: where in the data it ended. origin: weights
    to import. base: of a run with adapters, what its checkpoints say of the frozen weights.
    tokenizer: what they say of the tokenizer.
    """

    checkpoint: Checkpoint | None
    position: data.Position
    origin: Weights | None
    base: dict[str, str] | None
    ledger: data.Ledger
    tokenizer: dict[str, Any]
    rolled_back_s: float = 0.0  # seconds that going back here took, within a run

    @property
    def step(self) -> int:
        """Updates already applied."""
        return 0 if self.checkpoint is None else self.checkpoint.step


def _where_to_start(run: _Run, asked: Asked) -> _Start:
    """Says what changed since the newest whole checkpoint. UserError where weights do not fit."""
    session, checkpointer, audit, workdir = run.session, run.checkpointer, run.audit, run.workdir
    config, mixture = session.config, session.mixture
    now = {
        "batch_size": config.data.global_batch_size,
        "seq_len": config.data.seq_len,
        "mixture_hash": mixture.hash,
    }
    when_accepted = run.acceptance.when_accepted
    superseded = [] if asked == "older" else audit.superseded(checkpointer, when_accepted)
    checkpoint, words = choose(asked, config, workdir, checkpointer, superseded)
    for line in words:
        say(line, primary=session.machine.is_primary)
    meta = None if checkpoint is None else checkpoint.meta
    origin = open_origin(config, meta)
    base = base_record(origin) if config.lora.rank else None
    found = {"origin": origin, "base": base, "tokenizer": run_tokenizer(session, meta, workdir)}
    if meta is None:
        position = audit.position(data.Position.start(**now), step=0, rollbacks=0)
        position = position.continued(step=0, **now)
        ledger = data.Ledger(mixture, position, step=0, saved=None)
        return _Start(checkpoint=None, position=position, ledger=ledger, **found)
    start = checkpoint.step
    if start > config.train.steps:
        raise UserError(
            f"the newest checkpoint is of step {start}, beyond train.steps = {config.train.steps}: "
            "raise train.steps, or choose another --workdir"
        )
    for line in changes(session, meta, start):
        say(line, primary=session.machine.is_primary)
    before, saved = data.Position.from_json(meta["position"]), meta.get("ledger")
    if saved and start:
        data.check_ledger(saved, mixture, before, step=start)
    later = audit.position(before, step=start, rollbacks=meta.get("rollbacks", 0))
    position = later.continued(step=start, **now)
    ledger = data.Ledger(mixture, position, step=start, saved=saved)
    return _Start(checkpoint=checkpoint, position=position, ledger=ledger, **found)


def _build(
    run: _Run,
    start: _Start,
    stack: contextlib.ExitStack,
    compiled: tuple[Callable, Callable, Canary | None] | None,
) -> tuple[Loop, TrainState]:
    """Memory and compilation: the state, the two steps, and the loop around them.

    compiled: the steps, if this process has compiled them before.
    """
    session, checkpointer, workdir = run.session, run.checkpointer, run.workdir
    config, primary = session.config, session.machine.is_primary
    tokens = config.data.global_batch_size * config.data.seq_len
    timer = StepTimer(tokens_per_step=tokens)
    stack.callback(timer.close)
    feed = Feed(
        config,
        session.mesh,
        mixture=session.mixture,
        held_out=session.held_out,
        position=start.position,
    )
    state, steps = _prepared(run, start, feed, timer, compiled)
    metrics, progress = _logs(run, start, stack)
    if primary:
        write_run_facts(workdir, facts(session, steps[0]) | {"workdir_locked": run.locked})
    guardian, hang = _watchers(run, start, state, progress)
    batches = feed.train(start.step)
    return Loop(
        train=config.train,
        checkpoint=config.checkpoint,
        step=steps[0],
        eval_step=steps[1],
        train_batches=batches,
        eval_batches=feed.evaluation if session.held_out else None,
        rates=rates(session),
        tokens_seen=start.position.tokens_seen,
        meta=lambda step: _meta(session, start, run.audit),
        at_rest=functools.partial(
            to_natural, config=config.model, mesh=session.mesh, layout=session.layout
        ),
        export=exporter(config, workdir, progress),
        checkpointer=checkpointer,
        metrics=metrics,
        events=run.events,
        progress=progress,
        timer=timer,
        shutdown=run.shutdown,
        saw=start.ledger.add,
        guardian=guardian,
        hang=hang,
        canary=steps[2],
    ), state


def _prepared(
    run: _Run,
    start: _Start,
    feed: Feed,
    timer: StepTimer,
    compiled: tuple[Callable, Callable, Canary | None] | None,
) -> tuple[TrainState, tuple[Callable, Callable, Canary | None]]:
    """Return the state and the steps; enter the restore and the compilation in the record."""
    session, primary = run.session, run.session.machine.is_primary
    with timer.pause():
        state = starting_state(session, start.checkpoint, start.origin)
    source = "restore" if start.step else "import" if start.origin else "init"
    duration_s = timer.paused_s + start.rolled_back_s
    restored = {"step": start.step, "source": source, "duration_s": duration_s}
    if compiled is not None:
        removed = removed_time(run.workdir, start.step) if primary else {}
        run.events.write("restore", **restored, **removed)
        return state, compiled
    run.events.write("restore", **restored)
    with timer.pause():
        steps = compile_steps(session, feed, state)
    run.acceptance.accept()  # nothing can refuse the run any more
    # The rows after this step are removed next, so their time is entered here.
    removed = removed_time(run.workdir, start.step) if primary else {}
    run.events.write("compile", step=start.step, duration_s=timer.paused_s, **removed)
    say(f"ready    compiled in {timer.paused_s:.1f} s", primary=primary)
    say_of_donation(session, steps[0])
    return state, steps


def _logs(run: _Run, start: _Start, stack: contextlib.ExitStack) -> tuple[MetricsWriter, Progress]:
    """What rows are written to and shown on, until the stack ends."""
    config, primary = run.session.config, run.session.machine.is_primary
    metrics = MetricsWriter(
        run.workdir,
        tensorboard=config.monitoring.tensorboard,
        resume_step=start.step,
        primary=primary,
    )
    progress = Progress(
        total_steps=config.train.steps,
        start_step=start.step,
        mode=config.monitoring.progress,
        primary=primary,
    )
    stack.callback(metrics.close)
    stack.callback(progress.close)
    return metrics, progress


def _watchers(
    run: _Run, start: _Start, state: TrainState, progress: Progress
) -> tuple[Guardian, HangWatch]:
    """What looks at the numbers of every step, and at whether there is one."""
    session = run.session
    guardian = Guardian(
        config=session.config.guard,
        box=run.box,
        events=run.events,
        mixture=session.mixture,
        position=start.position,
        seed=session.config.train.seed,
        weights=tuple(named_leaves(state.trained)),
        note=progress.note,
    )
    hang = HangWatch(
        session.config.guard.hang_timeout_s,
        file=run.workdir / BLACKBOX / f"hang_process{session.machine.process_id}.txt",
        farewell=lambda text: _hung(run, guardian, text),
    )
    return guardian, hang


def _hung(run: _Run, guardian: Guardian, text: str) -> None:
    """Write the black box and the end of a run that hangs."""
    guardian.write("hang", step=run.box.newest_step, cause=text)
    write_end(run.events, run.box.newest_step, code=ExitCode.FAILED, error=text)


def _meta(session: Session, start: _Start, audit: Audit) -> dict[str, Any]:
    """What is saved with every checkpoint, besides the arrays."""
    meta = {"config": to_json_dict(session.config), "position": start.position.to_json()}
    meta |= {"tokenizer": start.tokenizer, "data": session.data_record}
    meta["ledger"] = start.ledger.to_json()
    meta["rollbacks"] = len(audit.rollbacks)
    return meta | ({"base": start.base} if start.base else {})
