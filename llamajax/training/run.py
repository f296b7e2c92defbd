"""A run of one config in one directory, from its start to its end.

`train` starts JAX on all processes, makes the mesh and opens the data (`set_up`), locks the
directory (`open_run`), and chooses the checkpoint to continue from (`find_start`). `_train` loads
the state, compiles the step, accepts the start, and calls the loop (`train_steps`). After a
rollback, which a check of the metrics asks for, it loads an older checkpoint and calls the loop
again, with the data behind the steps that went wrong.

Mistakes of the user are found in this order: machine, mesh and data; weights and checkpoint; memory
and compilation. A start that is refused leaves the directory as it was: events, log and black box
(the last steps, for the case that the run dies) are kept in memory until `_accept`.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from llamajax.backends import report_checkpoint, undonated_warnings
from llamajax.checkpoint import CheckpointError
from llamajax.checkpoint.location import is_remote
from llamajax.config import RunConfig
from llamajax.errors import ExitCode, say
from llamajax.files import undo_new_folders, write_file
from llamajax.monitoring import (
    MetricsWriter,
    Progress,
    StepTimer,
    load_events,
    write_run_facts,
)
from llamajax.monitoring.blackbox import BLACKBOX
from llamajax.monitoring.report.refresh import refreshed_report
from llamajax.monitoring.sinks import open_sinks
from llamajax.processes.host_collectives import broadcast_from_first
from llamajax.training.export import is_exported, write_adapters
from llamajax.training.hooks import Attempt, Hook
from llamajax.training.loop import train_steps
from llamajax.training.messages import run_facts, run_header, run_summary
from llamajax.training.resume import set_aside
from llamajax.training.run_record import History, end_event, write_end, write_start
from llamajax.training.run_start import Start, find_start, first_start
from llamajax.training.safety.hang import HangWatch
from llamajax.training.safety.rollback import remove_checkpoints, roll_back
from llamajax.training.safety.shutdown import Shutdown, exit_on_error
from llamajax.training.safety.step_checks import GuardStop, RollbackNeeded, StepChecks
from llamajax.training.setup import check_stored, initial_state, set_up
from llamajax.training.stages import StagePrograms
from llamajax.training.state import TrainState
from llamajax.training.workdir import Run, keep_tokenizer, open_run, write_config


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
    # Before the processes meet: afterwards another one may have made the folders.
    undo_new_folders(workdir.absolute(), undo)
    with exit_on_error():  # of several processes; with one it changes nothing
        setup = set_up(config)
    if setup.machine.num_processes > 1:
        shutdown.take_back()  # the signals, whose handlers jax.distributed has replaced
    with exit_on_error(), open_run(setup, workdir, shutdown=shutdown, undo=undo) as run:
        start, history = first_start(run)
        if _is_finished(run, start, history):
            if start.checkpoint is not None:
                check_stored(
                    setup.at(start.step), start.checkpoint
                )  # the config may be another one by now
            run.say(f"finished before, at step {start.step}: {workdir}")
            return ExitCode.FINISHED
        # If the start was accepted: write the `end` event and the report, however this is left.
        report = refreshed_report(workdir, primary=run.is_primary)
        with report, end_event(run, start.step) as outcome:
            if run.is_primary:
                if dead := history.found_dead(start.step):
                    run.events.write("found_dead", **dead)
                write_start(
                    run, step=start.step, fork=start.fork, began_s=began_s, config_file=config_file
                )
                report_checkpoint(start.step)  # to the launcher, which counts progress
            del history  # all rows and events
            for line in run_header(setup, start.position, start.step):
                run.say(line)
            outcome["code"] = code = _train(run, start, more_hooks)
            if code == ExitCode.FINISHED and config.lora.rank:
                for line in write_adapters(run, start.weights):
                    run.say(f"warning: {line}")
    if run.is_primary:
        with run.log:  # again, after `end_event`: the summary shows a run that has ended
            say(run_summary(workdir, run.checkpointer, code))
    return code


def _is_finished(run: Run, start: Start, history: History) -> bool:
    """Return whether an earlier process trained, evaluated and exported the last step."""

    def decide() -> bool:
        exports = run.config.checkpoint.export_hf_every
        exported = not exports or is_exported(run.workdir, start.step)
        return history.is_finished(start.step) and exported

    return start.step == run.config.train.steps and broadcast_from_first(decide)


def _train(run: Run, start: Start, more_hooks: Sequence[Callable[[Attempt], Hook]]) -> int:
    """Train from `start` to the end. After a rollback, train again from an earlier step."""
    programs, rolled_back_s, is_accepted = StagePrograms(run.setup), 0.0, False
    while True:
        with ExitStack() as stack:
            timer = StepTimer(tokens_of=run.setup.tokens_of)
            stack.callback(timer.close)
            state = _load(run, start, timer, rolled_back_s)
            if programs.lacks(start.step):  # at first, and after a rollback to an earlier stage
                _compile(run, programs, state, timer, step=start.step)
                if not is_accepted:
                    _accept(run, start, programs)
                    is_accepted = True
                run.events.write("compile", step=start.step, duration_s=timer.paused_s)
            # Those between the step that a rollback went back to and the one it came from.
            remove_checkpoints(run.checkpointer, start.superseded)
            attempt = _open_attempt(run, start, programs, timer, stack)
            try:
                with attempt.hang:
                    return train_steps(attempt, state, more_hooks)
            except (GuardStop, RollbackNeeded) as error:
                problem = error.with_traceback(None)  # a traceback would keep the state in memory
            except CheckpointError as error:
                fix = (
                    "Make room or repair the directory; a rerun continues from the last checkpoint"
                )
                say(f"error: {error}. {fix}")
                remote = is_remote(run.checkpointer.directory)
                return ExitCode.TRANSIENT if remote else ExitCode.USER_ERROR
        del state  # not donated if no update ran; its memory is needed for the next one
        began_s = time.monotonic()
        if (code := _go_back(attempt, problem)) is not None:
            return code
        start = find_start(run, "rollback", History.read(run.workdir))  # data behind the bad steps
        rolled_back_s = time.monotonic() - began_s


def _load(run: Run, start: Start, timer: StepTimer, rolled_back_s: float) -> TrainState:
    """Return the state to start from. rolled_back_s: seconds that the rollback to it took.

    The event `restore` is written for every source. It also has the place in the data, and the
    seconds of the rows after its step (`Start.time_after`): that work is done again.
    """
    with timer.pause():
        state = initial_state(run.setup.at(start.step), start.checkpoint, start.weights)
    source = "restore" if start.step else "import" if start.weights else "init"
    duration_s = timer.paused_s + rolled_back_s
    run.events.write(
        "restore",
        step=start.step,
        source=source,
        duration_s=duration_s,
        position=start.position.to_json()["segments"],
        **start.time_after,
    )
    return state


def _compile(
    run: Run, programs: StagePrograms, state: TrainState, timer: StepTimer, *, step: int
) -> None:
    """Compile what the run needs from `step` on, once for this process."""
    run.say("compiling the step; this may take minutes, and the next start reads it from disk")
    with timer.pause():
        new = programs.compile(state, step=step)
    run.say(f"ready    compiled in {timer.paused_s:.1f} s")
    for each in new:
        for line in undonated_warnings(each.update, "the step", "state"):
            run.say(f"warning: {line}")


def _accept(run: Run, start: Start, programs: StagePrograms) -> None:
    """Write what a start changes in the directory: nothing can refuse it any more.

    To be called by all processes: process 0 writes, and its failure is raised on all.
    """
    run.undo.pop_all()  # keep the folders that this start has made
    run.checkpointer.begin()
    resume_step = run.config.train.resume_step
    set_aside(start.request, run.workdir, run.checkpointer.directory, resume_step)
    if run.is_primary:
        run.log.begin()
        run.events.begin()
        run.box.begin()
        write_config(run.workdir, run.config)
        keep_tokenizer(run.workdir, run.config.data.paths[0], start.recorded["tokenizer"])
        if run.config.monitoring.dump_hlo:
            for name in ("update", "evaluate"):
                (run.workdir / "profile").mkdir(exist_ok=True)
                text = getattr(programs.at(start.step + 1), name).as_text()
                write_file(run.workdir / "profile" / f"{name}.hlo.txt", text)
        segment = start.position.segment(start.step)
        facts = run_facts(run.setup, programs.at(start.step + 1), segment) | programs.facts()
        facts |= {name: start.recorded[name] for name in ("origin", "rope_scaling_changed")}
        write_run_facts(run.workdir, facts | {"workdir_locked": run.is_locked})


def _open_attempt(
    run: Run, start: Start, programs: StagePrograms, timer: StepTimer, stack: ExitStack
) -> Attempt:
    """Open what logs and checks the steps from `start` on, until `stack` is closed."""
    setup, config, primary = run.setup, run.config, run.is_primary
    names, facts = config.monitoring.sinks, start.recorded["config"]
    metrics = MetricsWriter(
        run.workdir,
        resume_step=start.step,
        primary=primary,
        open_sinks=lambda step: open_sinks(names, run.workdir, after_step=step, config=facts),
    )
    stack.callback(metrics.close)
    progress = Progress(
        total_steps=config.train.steps,
        start_step=start.step,
        mode=config.monitoring.progress if primary else "none",
        title=run.name,
    )
    stack.callback(progress.close)
    starts = sum(event["event"] == "start" for event in load_events(run.workdir) if primary)
    progress.set_cell("restarts", f"{max(0, starts - 1)}")
    if run.rollbacks.entries:
        progress.set_cell("rollbacks", f"{len(run.rollbacks.entries)}")
    checks = StepChecks(
        config=config.guard,
        box=run.box,
        events=run.events,
        mixtures=setup.mixtures,
        position=start.position,
        seed=config.train.seed,
        weights=programs.at(start.step).weight_names,
        note=progress.note,
    )

    def on_hang(text: str) -> None:
        checks.write_box("hang", step=run.box.newest_step, cause=text)
        write_end(run, run.box.newest_step, code=ExitCode.FAILED, error=text)

    stacks = run.workdir / BLACKBOX / f"hang_process{setup.machine.process_id}.txt"
    return Attempt(
        run=run,
        start=start,
        programs=programs,
        timer=timer,
        metrics=metrics,
        progress=progress,
        checks=checks,
        hang=HangWatch(config.guard.hang_timeout_s, file=stacks, on_hang=on_hang),
    )


def _go_back(attempt: Attempt, problem: GuardStop | RollbackNeeded) -> int | None:
    """Record a rollback to an earlier checkpoint, or end the run and return its exit code.

    The run ends where a check stops it, or where there is nothing to go back to.
    """
    run = attempt.run
    newest = run.box.newest_step
    attempt.record_saves()  # those that were complete before the check
    reason = "rollback" if isinstance(problem, RollbackNeeded) else "stop"
    box = attempt.checks.write_box(reason, step=newest, cause=str(problem))
    try:
        if isinstance(problem, GuardStop):
            raise problem
        origin = attempt.start.recorded["origin"]
        words = roll_back(
            problem,
            run.checkpointer,
            run.rollbacks,
            attempt.checks,
            borders=run.setup.borders,
            origin_step=origin["step"] if origin else None,
        )
    except GuardStop as error:
        run.say(
            f"error: {error}. No later step was saved; the black box is {box}, and "
            f"`python -m llamajax.replay --workdir={run.workdir} --step={newest}` looks into the "
            "step (docs/guards.md)"
        )
        return error.exit_code
    to_step = run.rollbacks.entries[-1].to_step
    run.events.write("rollback", step=problem.step, to_step=to_step, reason=problem.reason)
    run.say(words)
    return None
