"""A run of one config in one directory, from its start to its end.

`train` starts JAX on all processes, makes the mesh and opens the data (`set_up`), locks the
directory (`open_run`), and chooses the checkpoint to continue from (`first_start`). `_train` loads
the state, compiles the programs, accepts the start, and calls the loop (`train_steps`). After a
rollback, which a check of the metrics asks for, it loads an older checkpoint and calls the loop
again, with data that comes after what the steps that went wrong have read.

Mistakes of the user are found in this order: machine, mesh and data (`set_up`); weights and
checkpoint (`first_start`, `_load`); memory and compilation (`_compile`). A start that is refused
leaves the directory as it was: until `accept_start`, what is written to events, log and black box
(the last steps, for whoever asks why a run died) is kept in memory.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from llamajax.backends import report_checkpoint, undonated_warnings
from llamajax.checkpoint import CheckpointError
from llamajax.checkpoint.location import how_to_fix, is_remote
from llamajax.config import RunConfig
from llamajax.errors import ExitCode, say
from llamajax.files import undo_new_folders
from llamajax.monitoring.report.refresh import refreshed_report
from llamajax.monitoring.run_history import History
from llamajax.processes.host_collectives import broadcast_from_first
from llamajax.training.attempt import Attempt
from llamajax.training.export import write_adapters
from llamajax.training.hooks import Hook
from llamajax.training.initial_state import check_stored, initial_state
from llamajax.training.loop import train_steps
from llamajax.training.messages import run_header, run_summary
from llamajax.training.programs import RunPrograms
from llamajax.training.run_record import accept_start, end_event, write_start
from llamajax.training.run_start import Start, find_start, first_start
from llamajax.training.safety.guard_stops import GuardStop, RollbackNeeded
from llamajax.training.safety.rollback import go_back
from llamajax.training.safety.shutdown import Shutdown, exit_on_error
from llamajax.training.setup import set_up
from llamajax.training.state import TrainState
from llamajax.training.workdir import Run, open_run


def train(
    config: RunConfig,
    *,
    workdir: Path,
    shutdown: Shutdown,
    began_s: float | None = None,
    config_file: str | None = None,
    more_hooks: Sequence[Callable[[Attempt], Hook]] = (),
) -> int:
    """Train to the end, to a stop signal or to a guard's stop; return the exit code.

    began_s: when this process started, `time.monotonic`. config_file: FILE.py[:ARG] as given, for
    the record. Raises UserError where the start is refused: then nothing has changed.
    """
    began_s = time.monotonic() if began_s is None else began_s
    undo = ExitStack()
    # Asked before the processes meet: afterwards another process may have made the folders.
    undo_new_folders(workdir.absolute(), undo)
    with exit_on_error():  # one process of several that fails ends the others
        setup = set_up(config)
    if setup.machine.num_processes > 1:
        shutdown.take_back()  # the signals, whose handlers jax.distributed has replaced
    with exit_on_error(), open_run(setup, workdir, shutdown=shutdown, undo=undo) as run:
        start, history = first_start(run)
        is_last = start.step == config.train.steps and not start.exports
        if is_last and broadcast_from_first(history.is_finished, start.step):
            check_stored(setup.at(start.step), start.checkpoint)  # refuses a config that changed
            run.say(f"finished before, at step {start.step}: {workdir}")
            return ExitCode.FINISHED
        # Both write only if the start was accepted, and then however this block is left.
        report = refreshed_report(workdir, primary=run.is_primary)
        with report, end_event(run, start.step) as outcome:
            if run.is_primary:
                write_start(run, start, history, began_s=began_s, config_file=config_file)
                report_checkpoint(start.step)  # to the launcher, which counts progress
            del history  # all rows and events
            for line in run_header(setup, start):
                run.say(line)
            outcome["code"] = code = _train(run, start, more_hooks)
            if code == ExitCode.FINISHED and config.lora.rank:
                for line in write_adapters(run, start.weights):
                    run.say(f"warning: {line}")
    if run.is_primary:
        with run.log:  # again, after `end_event`: the summary shows a run that has ended
            say(run_summary(workdir, run.checkpointer, code))
    return code


def _train(run: Run, start: Start, more_hooks: Sequence[Callable[[Attempt], Hook]]) -> int:
    """Train from `start` to the end. After a rollback, train again from an earlier step."""
    programs, began_s = RunPrograms(run.setup), time.monotonic()
    while True:
        state = _load(run, start, began_s)
        if programs.lacks(start.first_compiled):  # at first, and after some rollbacks
            _compile(run, start, programs, state)
        if start.request != "rollback":
            accept_start(run, start, programs)
        with ExitStack() as stack:
            attempt = Attempt(run, start, programs, stack)
            try:
                with attempt.hang:
                    return train_steps(attempt, state, more_hooks)
            except (GuardStop, RollbackNeeded) as error:
                problem = error.with_traceback(None)  # a traceback would keep the state in memory
            except CheckpointError as error:
                directory = run.checkpointer.directory
                remote = is_remote(directory)
                fix = how_to_fix(str(directory)) if remote else "make room or repair the directory"
                say(f"error: {error}. A rerun continues from the last checkpoint; {fix}")
                return ExitCode.TRANSIENT if remote else ExitCode.USER_ERROR
        del state  # its memory is needed for the state to load; still there if no update ran
        began_s = time.monotonic()
        if (code := go_back(attempt, problem)) is not None:
            return code  # a problem that going back does not mend, or once too often
        start = find_start(run, "rollback", History.read(run.workdir))


def _load(run: Run, start: Start, began_s: float) -> TrainState:
    """Return the state to start from. began_s: when the start, or the rollback to it, began.

    The event `restore` is written for every source. It also has the place in the data, and how long
    the steps took that will run again (`Start.time_after`).
    """
    state = initial_state(run.setup.at(start.step), start.checkpoint, start.weights)
    run.events.write(
        "restore",
        step=start.step,
        source="restore" if start.step else "import" if start.weights else "init",
        duration_s=time.monotonic() - began_s,
        position=start.position.to_json()["segments"],
        **start.time_after,
    )
    return state


def _compile(run: Run, start: Start, programs: RunPrograms, state: TrainState) -> None:
    """Compile what the run needs from `start` on, once for this process."""
    run.say("compiling the step; this may take minutes, and the next start reads it from disk")
    began_s = time.monotonic()
    new = programs.compile(state, step=start.first_compiled)
    duration_s = time.monotonic() - began_s
    run.say(f"ready    compiled in {duration_s:.1f} s")
    for each in new:
        for line in undonated_warnings(each.update, "the step", "state"):
            run.say(f"warning: {line}")
    run.events.write("compile", step=start.step, duration_s=duration_s)
