"""Prove that a run of a config survives being killed, on this machine.

Three runs of a few steps are compared by their logged values and their ledgers of samples:
undisturbed; killed with SIGKILL again and again, then resumed; and the same killed run resumed on
another mesh.
"""

import dataclasses
import functools
import math
import random
import shutil
import sys
from pathlib import Path

from llamajax.backends import platform_facts
from llamajax.config import RunConfig, RunFlags, key
from llamajax.config.schema import MeshConfig
from llamajax.config.values import show
from llamajax.errors import UserError, combine, say
from llamajax.launching.worker_logs import last_lines
from llamajax.monitoring import read_run_facts
from llamajax.monitoring.row_comparison import TOLERANCES, largest_difference, logged_values
from llamajax.proving import trial

_KINDS = ("in save", "at step", "at start")
_RUNS = ("undisturbed", "killed", "other_mesh")
_SHOWN_LINES = 15


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProofOptions(RunFlags):
    """Flags of `verify_resume`."""

    workdir: str = key("directory for the runs of the proof alone", metavar="DIR", is_path=True)
    kills: int = key("how often it is killed", metavar="N", default=3, at_least=1)
    seed: int = key("seed of the moments", metavar="S", default=0)
    steps: int = key("steps of each run", metavar="N", default=12, at_least=6)
    other: str | None = key(
        "config keys of the other mesh, as mesh.fsdp=4,mesh.tensor=2; none: chosen here",
        metavar="KEY=VALUE,...",
        default=None,
    )
    processes: int | None = key(
        "resume the run with the other mesh as N processes of this machine; none: as one",
        metavar="N",
        default=None,
        at_least=2,
    )


def prove(options: ProofOptions) -> bool:
    """Run everything, print the findings and a verdict, and return whether the proof holds.

    Raises UserError when the config does not train at all, or the directory is in use.
    """
    workdir = Path(options.workdir)
    _make_room(workdir)
    say(f"undisturbed: {options.steps} steps")
    undisturbed, killed, moved = (workdir / name for name in _RUNS)
    _finish(options, undisturbed)
    other = other_mesh(options, undisturbed)
    if not _kill_repeatedly(options, killed, undisturbed):
        print("verdict: not proven; raise --steps or choose another --seed")
        return False
    if other is not None:
        shutil.copytree(killed, moved)
    say("killed run: resumed to the end")
    _finish(options, killed)
    if other is not None:
        split = "" if options.processes is None else f"{options.processes} processes and "
        say(f"killed run: resumed with {split}{' '.join(other)}")
        _finish(options, moved, *other, processes=options.processes)
    return judge(options, undisturbed, killed, moved if other is not None else None)


def _make_room(workdir: Path) -> None:
    """Make the directory, and empty it of an earlier proof. UserError if it holds anything else."""
    workdir.mkdir(parents=True, exist_ok=True)
    for path in workdir.iterdir():
        if path.name.partition(".")[0] not in _RUNS:
            raise UserError(f"--workdir={workdir}: holds {path.name}; choose a new directory")
    for path in workdir.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def shortened(config: RunConfig, steps: int) -> list[str]:
    """Return overrides that make a run short and log every step."""
    third = max(1, steps // 3)
    found = {
        "train.steps": steps,
        "train.log_every": 1,
        "train.eval_batches": min(config.train.eval_batches or 2, 2),
        "optim.warmup_steps": min(config.optim.warmup_steps, third),
        "checkpoint.every_steps": max(1, steps // 6),
        "checkpoint.every_minutes": "none",
        "checkpoint.directory": "none",  # three runs, each with its own
        "checkpoint.export_hf_every": "none",
        "train.fork": "none",  # three runs from step 0
        "monitoring.sinks": "jsonl",
        "monitoring.profile_steps": "none",  # they may end behind `steps`
        "backend.deterministic": "true",  # runs are compared bit by bit
    }
    if stages := config.data.stages[: steps - 1]:  # evenly over the steps
        begin = [steps * (n + 1) // (len(stages) + 1) for n in range(len(stages))]
        found["data.stages"] = show(
            tuple(
                dataclasses.replace(stage, from_step=step, from_tokens=None)
                for stage, step in zip(stages, begin, strict=True)
            )
        )
    if config.optim.decay_steps is not None:
        found["optim.decay_steps"] = min(config.optim.decay_steps, third)
    return [f"--config.{key}={value}" for key, value in found.items()]


def other_mesh(options: ProofOptions, undisturbed: Path) -> list[str] | None:
    """Return overrides for another mesh than that of the undisturbed run; None if there is none.

    On the CPU also another number of devices. `train` itself refuses a choice that does not divide
    the batch or the model, with a message; --other makes another choice.
    """
    if options.other is not None:
        return [f"--config.{part.strip()}" for part in options.other.split(",")]
    facts, processes = read_run_facts(undisturbed), options.processes
    axes = {field.name: 1 for field in dataclasses.fields(MeshConfig)}
    devices, is_host = facts["num_devices"], platform_facts(facts["platform"]).is_host
    if is_host and processes is not None:
        devices = processes * max(1, devices // processes)
        mesh = axes | {"fsdp": devices}
    elif is_host:
        devices = devices // 2 if devices > 1 and devices % 2 == 0 else devices * 2
        mesh = axes | {"fsdp": devices}
    elif devices == 1:
        return None
    elif facts["mesh"].get("fsdp", 1) == devices:  # not all in `data`: it may not fit into one
        mesh = axes | {"fsdp": devices // 2, "tensor": 2}
    else:
        mesh = axes | {"fsdp": devices}
    found = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    if is_host:
        found.append(f"--config.backend.num_cpu_devices={devices // (processes or 1)}")
    return found


def _command(options: ProofOptions, workdir: Path, *overrides: str) -> list[str]:
    train = [sys.executable, "-m", "llamajax.train", f"--config={options.config_file}"]
    given = [f"--config.{path}={text}" for path, text in options.overrides.items()]
    short = shortened(options.config, options.steps)
    return [*train, f"--workdir={workdir}", *given, *short, *overrides]


def _finish(
    options: ProofOptions, workdir: Path, *overrides: str, processes: int | None = None
) -> None:
    """Run or resume to the end."""
    log = workdir.with_name(f"{workdir.name}.log")
    command = _command(options, workdir, *overrides)
    if processes is not None:
        launch = [sys.executable, "-m", "llamajax.launch", f"--processes_per_node={processes}"]
        command = [*launch, "--max_restarts=0", "--", *command]
    code = trial.run_trial(command, workdir=workdir, log=log).code
    if code != 0 and overrides:
        raise combine(
            [str(_failure(code, log))],
            title="the other mesh does not train; --other=KEY=VALUE,... chooses another:",
        )
    if code != 0:
        raise _failure(code, log)


def _failure(code: int, log: Path) -> UserError:
    with log.open("rb") as file:
        lines = "\n".join(f"  | {line}" for line in last_lines(file.fileno(), _SHOWN_LINES))
    return UserError(f"a run ended with code {code}; the last lines of {log}:\n{lines}")


def _kill_repeatedly(options: ProofOptions, workdir: Path, undisturbed: Path) -> bool:
    """Start and kill as often as asked. Return False where a start ended before its kill."""
    rng = random.Random(options.seed)
    times = read_run_facts(undisturbed)["time_breakdown"]
    step_s = times["steps_s"] / options.steps
    last = trial.TrialResult(code=None, step=0, checkpoint=0)
    for number in range(1, options.kills + 1):
        log = workdir.with_name(f"{workdir.name}.{number}.log")
        kind = _KINDS[(number - 1) % len(_KINDS)]
        # Two steps from the end at the latest, so that something is left to resume.
        first = last.checkpoint + 1
        step = rng.randint(first, max(first, options.steps - 3))
        if kind == "in save":
            earliest = min(step, last.checkpoint + options.steps // 3)
            kill_when, delay_s = functools.partial(trial.is_saving, workdir, earliest), 0.0
        elif kind == "at step":
            step = max(step, last.step + 1)
            kill_when = functools.partial(_has_logged, workdir, step)
            delay_s = rng.uniform(0, step_s)
        else:
            kill_when = functools.partial(trial.has_chosen_start, log)
            delay_s = rng.uniform(0, times["compile_s"])
        last = trial.run_trial(
            _command(options, workdir),
            workdir=workdir,
            log=log,
            kill_when=kill_when,
            delay_s=delay_s,
        )
        words = f"kill {number} of {options.kills} ({kind})"
        if last.code:
            raise _failure(last.code, log)
        if last.code == 0:
            say(f"{words}: the run came to its end first")
            return False
        saved = f"step {last.checkpoint}" if last.checkpoint else "none"
        say(f"{words}: after step {last.step}; newest complete checkpoint: {saved}")
    return True


def _has_logged(workdir: Path, step: int) -> bool:
    return trial.last_step(workdir) >= step


def judge(options: ProofOptions, undisturbed: Path, killed: Path, moved: Path | None) -> bool:
    """Compare the three finished runs, print the verdict and return whether it is good.

    moved: the run on the other mesh; None if there is none.
    """
    theirs = logged_values(undisturbed)
    platform = read_run_facts(undisturbed)["platform"]
    is_deterministic = platform_facts(platform).is_deterministic
    same = largest_difference(theirs, logged_values(killed))
    good = same is None
    said = (
        f"{len(theirs)} logged values are the same bit by bit" if good else f"differs: {same.what}"
    )
    print(f"same mesh    {said}")
    runs = [undisturbed, killed]
    if moved is None:
        print("other mesh   none with one device; --other=KEY=VALUE,... would choose one")
    else:
        runs.append(moved)
        limit = TOLERANCES[options.config.train.dtype]
        most = largest_difference(theirs, logged_values(moved))
        relative = 0.0 if most is None else most.relative
        good &= relative <= limit
        where = "" if most is None else f" ({most.what})"
        print(f"other mesh   {_described(moved)}")
        print(f"             largest relative difference {relative:.1e}, allowed {limit:g}{where}")
    ledgers = [trial.read_meta(run, options.steps)["ledger"]["digest"] for run in runs]
    one = len(set(ledgers)) == 1
    good &= one
    words = f"the same {options.steps} batches in all runs" if one else "differ"
    print(f"samples      {words} (ledger {', '.join(dict.fromkeys(ledgers))})")
    if good:
        print(f"verdict: proven; {options.kills} kills cost no step on {platform}")
    elif same is not None and math.isfinite(same.relative) and not is_deterministic:
        print(
            "verdict: NOT proven. If the samples agree and the differences are small, operations "
            "of this accelerator are not deterministic; compare two undisturbed runs"
        )
    else:
        print("verdict: NOT proven")
    return good


def _described(run: Path) -> str:
    """Return the mesh and the processes of a run in words."""
    facts = read_run_facts(run)
    mesh = ", ".join(f"{axis} {size}" for axis, size in facts["mesh"].items() if size > 1)
    count = facts["num_processes"]
    return f"{mesh or 'one device'}; {count} {'process' if count == 1 else 'processes'}"
