"""One run of one config in one directory: started or resumed, trained, rolled back, ended.

What a user can do wrong is found in this order: machine, mesh and data first, then weights and
checkpoint, and only then memory and compilation.
"""

import time
from contextlib import ExitStack
from pathlib import Path

from llamajax.backends import report_checkpoint
from llamajax.checkpoint import CheckpointError, named_leaves
from llamajax.checkpoint.location import is_remote
from llamajax.config import RunConfig
from llamajax.errors import ExitCode, say
from llamajax.files import undo_new_folders
from llamajax.monitoring import MetricsWriter, Progress, StepTimer, write_run_facts
from llamajax.monitoring.blackbox import BLACKBOX
from llamajax.processes.host_collectives import broadcast_from_first
from llamajax.training.export import is_exported, write_adapters
from llamajax.training.feed import Feed
from llamajax.training.loop import Attempt, Saves, train_steps
from llamajax.training.messages import (
    previous_checkpoint,
    run_facts,
    run_header,
    run_summary,
    warn_undonated,
)
from llamajax.training.resume import requested_start, set_aside
from llamajax.training.run_record import History, end_event, write_end, write_start
from llamajax.training.run_start import Start, find_start
from llamajax.training.safety.hang import HangWatch
from llamajax.training.safety.rollback import remove_checkpoints, roll_back
from llamajax.training.safety.shutdown import Shutdown, exit_on_error
from llamajax.training.safety.step_checks import GuardStop, RollbackNeeded, StepChecks
from llamajax.training.setup import Programs, check_stored, compile_programs, initial_state, set_up
from llamajax.training.state import TrainState
from llamajax.training.workdir import (
    Run,
    check_shared,
    keep_tokenizer,
    lock_workdir,
    open_run,
    write_config,
)


def train(
    config: RunConfig,
    *,
    workdir: Path,
    shutdown: Shutdown,
    began_s: float | None = None,
    config_file: str | None = None,
) -> int:
    """Train to the end, to a stop signal or to a guard's stop; return the exit code.

    began_s: when this process started, `time.monotonic`. config_file: FILE.py[:ARG] as given, for
    the record. Raises UserError where the start is refused: then nothing has changed.
    """
    began_s = time.monotonic() if began_s is None else began_s
    undo = ExitStack()
    # Before the processes meet: afterwards another one may have made the folders.
    undo_new_folders(workdir.absolute(), undo)
    with exit_on_error():
        setup = set_up(config)
    if setup.machine.num_processes > 1:
        shutdown.take_back()
    with exit_on_error(), ExitStack() as stack:
        # The directory is locked and opened. Nothing in it changes before `_accept`: until then
        # events, log and black box are kept in memory.
        lock = lock_workdir(workdir, process_id=setup.machine.process_id, undo=undo)
        is_locked = stack.enter_context(lock)
        check_shared(workdir, key="--workdir")
        history = History.read(workdir)
        request = requested_start(config, history)
        run = open_run(
            setup, workdir, is_locked=is_locked, shutdown=shutdown, undo=undo, stack=stack
        )
        shutdown.call_before_exit(lambda: previous_checkpoint(run.checkpointer))
        # Where to start: finds most of what can refuse it.
        if request == "restart":
            history = History(workdir, [], [])
            run.rollbacks.entries.clear()
        start = find_start(run, request, history)
        if _is_finished(run, start, history):
            check_stored(setup, start.checkpoint)
            run.say(f"finished before, at step {start.step}: {workdir}")
            return ExitCode.FINISHED
        # From here on every way out is recorded, once the start is accepted.
        with end_event(run, start.step) as outcome:
            if run.is_primary:
                if dead := history.found_dead(start.step):
                    run.events.write("found_dead", **dead)
                write_start(run, step=start.step, began_s=began_s, config_file=config_file)
                report_checkpoint(start.step)
            del history
            for line in run_header(setup, start.step):
                run.say(line)
            outcome["code"] = code = _train(run, start)
            if code == ExitCode.FINISHED and config.lora.rank:
                for line in write_adapters(config, start.base, workdir):
                    run.say(f"warning: {line}")
    if run.is_primary:
        with run.log:  # after `end_event`, so that the report shows a run that has ended
            say(run_summary(workdir, run.checkpointer, code))
    return code


def _is_finished(run: Run, start: Start, history: History) -> bool:
    """Return whether an earlier process has done all that the config asks for."""

    def decide() -> bool:
        exports = run.config.checkpoint.export_hf_every
        exported = not exports or is_exported(run.workdir, start.step)
        return history.is_finished(start.step) and exported

    return start.step == run.config.train.steps and broadcast_from_first(decide)


def _train(run: Run, start: Start) -> int:
    """Train from `start` to the end. After a rollback, train again from an earlier step."""
    programs, rolled_back_s = None, 0.0
    while True:
        with ExitStack() as stack:
            attempt, state = _open_attempt(run, start, programs, rolled_back_s, stack)
            programs = attempt.programs
            try:
                with attempt.hang:
                    return train_steps(attempt, state)
            except (GuardStop, RollbackNeeded) as error:
                problem = error.with_traceback(None)  # a traceback would keep the state in memory
            except CheckpointError as error:
                fix = "Make room or repair the directory; a rerun continues from the last"
                say(f"error: {error}. {fix} checkpoint")
                remote = is_remote(run.checkpointer.directory)
                return ExitCode.TRANSIENT if remote else ExitCode.USER_ERROR
        del state  # its memory is needed for the next one
        began_s, newest = time.monotonic(), run.box.newest_step
        attempt.record_saves()
        reason = "rollback" if isinstance(problem, RollbackNeeded) else "stop"
        box = attempt.checks.write_box(reason, step=newest, cause=str(problem))
        try:
            if isinstance(problem, GuardStop):
                raise problem
            words = roll_back(problem, run.checkpointer, run.rollbacks, attempt.checks)
        except GuardStop as error:
            run.say(
                f"error: {error}. Nothing was saved since then; the black box is {box}, and "
                f"`python -m llamajax.replay --workdir={run.workdir} --step={newest}` looks into "
                "the step (docs/guards.md)"
            )
            return error.exit_code
        to_step = run.rollbacks.entries[-1].to_step
        run.events.write("rollback", step=problem.step, to_step=to_step, reason=problem.reason)
        run.say(words)
        start = find_start(run, "rollback", History.read(run.workdir))
        rolled_back_s = time.monotonic() - began_s


def _load(
    run: Run, start: Start, programs: Programs | None, timer: StepTimer, rolled_back_s: float
) -> tuple[TrainState, Programs]:
    """Load the state; at the first start of this process also compile, and accept the start.

    Deletes the checkpoints that a rollback has superseded, last of all.
    rolled_back_s: seconds that going back to this start took.
    """
    with timer.pause():
        state = initial_state(run.setup, start.checkpoint, start.weights)
    source = "restore" if start.step else "import" if start.weights else "init"
    duration_s = timer.paused_s + rolled_back_s
    run.events.write(
        "restore", step=start.step, source=source, duration_s=duration_s, **start.time_after
    )
    if programs is None:
        with timer.pause():
            programs = compile_programs(run.setup, state)
        _accept(run, start)
        run.events.write("compile", step=start.step, duration_s=timer.paused_s)
        run.say(f"ready    compiled in {timer.paused_s:.1f} s")
        for line in warn_undonated(programs.update):
            run.say(line)
    remove_checkpoints(run.checkpointer, start.superseded)
    return state, programs


def _open_attempt(
    run: Run, start: Start, programs: Programs | None, rolled_back_s: float, stack: ExitStack
) -> tuple[Attempt, TrainState]:
    """Load the state, and open what shows and watches the attempt until `stack` is closed."""
    setup, config, workdir, primary = run.setup, run.config, run.workdir, run.is_primary
    timer = StepTimer(tokens_per_step=config.data.global_batch_size * config.data.seq_len)
    stack.callback(timer.close)
    state, programs = _load(run, start, programs, timer, rolled_back_s)
    board = config.monitoring.tensorboard
    metrics = MetricsWriter(workdir, tensorboard=board, resume_step=start.step, primary=primary)
    stack.callback(metrics.close)
    progress = Progress(
        total_steps=config.train.steps,
        start_step=start.step,
        mode=config.monitoring.progress,
        primary=primary,
    )
    stack.callback(progress.close)
    if primary:
        facts = run_facts(setup, programs.update)
        write_run_facts(workdir, facts | {"workdir_locked": run.is_locked})
    checks = StepChecks(
        config=config.guard,
        box=run.box,
        events=run.events,
        mixture=setup.mixture,
        position=start.position,
        seed=config.train.seed,
        weights=tuple(named_leaves(state.trained)),
        note=progress.note,
    )

    def on_hang(text: str) -> None:
        checks.write_box("hang", step=run.box.newest_step, cause=text)
        write_end(run, run.box.newest_step, code=ExitCode.FAILED, error=text)

    splits = {"mixture": setup.mixture, "held_out": setup.held_out}
    stacks = workdir / BLACKBOX / f"hang_process{setup.machine.process_id}.txt"
    return Attempt(
        run=run,
        start=start,
        programs=programs,
        feed=Feed(config, setup.mesh, **splits, position=start.position),
        timer=timer,
        metrics=metrics,
        progress=progress,
        checks=checks,
        hang=HangWatch(config.guard.hang_timeout_s, file=stacks, on_hang=on_hang),
        saves=Saves(),
    ), state


def _accept(run: Run, start: Start) -> None:
    """Make the changes of a start in its directory, now that nothing can refuse it any more.

    To be called by all processes.
    """
    run.undo.pop_all()
    run.checkpointer.begin()
    set_aside(start.request, run.config, run.workdir, run.checkpointer.directory)
    if run.is_primary:
        run.log.begin()
        run.events.begin()
        run.box.begin()
        write_config(run.workdir, run.config)
        keep_tokenizer(run.workdir, run.config, start.tokenizer)
