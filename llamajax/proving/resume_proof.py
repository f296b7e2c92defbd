"""The proof that a run of this config survives being killed, on this machine.

Three runs of a few steps: undisturbed; killed with SIGKILL again and again and then resumed; and
the same killed run resumed on another mesh. Their logged values and their ledgers of samples are
compared.
"""

import dataclasses
import math
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from llamajax.backends import platform_facts
from llamajax.config import RunConfig
from llamajax.config.schema import MeshConfig
from llamajax.errors import UserError, combine, say
from llamajax.launching.worker_logs import last_lines
from llamajax.monitoring import read_run_facts
from llamajax.monitoring.row_comparison import TOLERANCES, largest_difference, logged_values
from llamajax.proving.trial import Moment, TrialResult, at_start, at_step, in_save, read_meta, start

_KINDS = ("in_save", "at_step", "at_start")
_RUNS = ("undisturbed", "killed", "other_mesh")
_SHOWN_LINES = 15


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProofOptions:
    """train: the command line of `train` without its --workdir. other: overrides, or None.

    processes: into how many the other run is split, by `launch`; None: as the first one.
    """

    train: tuple[str, ...]
    config: RunConfig
    workdir: Path
    steps: int
    kills: int
    seed: int
    other: str | None
    processes: int | None = None


def prove(request: ProofOptions) -> bool:
    """Run everything; prints the findings and a verdict; whether it holds.

    Raises UserError when the config does not train at all, or the directory is in use.
    """
    _make_room(request.workdir)
    say(f"undisturbed: {request.steps} steps")
    undisturbed, killed, moved = (request.workdir / name for name in _RUNS)
    _finish(request, undisturbed)
    other = other_mesh(request, undisturbed)
    if not _kill_repeatedly(request, killed, undisturbed):
        print("verdict: not proven; raise --steps or choose another --seed")
        return False
    if other is not None:
        shutil.copytree(killed, moved)
    say("killed run: resumed to the end")
    _finish(request, killed)
    if other is not None:
        split = "" if request.processes is None else f"{request.processes} processes and "
        say(f"killed run: resumed with {split}{' '.join(other)}")
        _finish(request, moved, *other, processes=request.processes)
    return judge(request, undisturbed, killed, moved if other is not None else None)


def _make_room(workdir: Path) -> None:
    """The directory, empty of an earlier proof; UserError where something else is in it."""
    workdir.mkdir(parents=True, exist_ok=True)
    for path in workdir.iterdir():
        if path.name.partition(".")[0] not in _RUNS:
            raise UserError(f"--workdir={workdir}: holds {path.name}; choose a new directory")
    for path in workdir.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def shortened(config: RunConfig, steps: int) -> list[str]:
    """Overrides that make a run of a config short and let it show everything in its metrics."""
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
        "monitoring.tensorboard": "false",
    }
    if config.optim.decay_steps is not None:
        found["optim.decay_steps"] = min(config.optim.decay_steps, third)
    return [f"--config.{key}={value}" for key, value in found.items()]


def other_mesh(request: ProofOptions, undisturbed: Path) -> list[str] | None:
    """Overrides for another mesh than that of the undisturbed run; None where there is none.

    On the CPU also another number of devices. A batch or a model that the choice does not divide
    is refused by `train` itself, with a message; --other makes the choice.
    """
    if request.other is not None:
        return [f"--config.{part.strip()}" for part in request.other.split(",")]
    facts, processes = read_run_facts(undisturbed), request.processes
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


def _command(request: ProofOptions, workdir: Path, *overrides: str) -> list[str]:
    short = shortened(request.config, request.steps)
    python = [sys.executable, "-m", "llamajax.train", *request.train]
    return [*python, f"--workdir={workdir}", *short, *overrides]


def _finish(
    request: ProofOptions, workdir: Path, *overrides: str, processes: int | None = None
) -> None:
    """Run or resume to the end."""
    log = request.workdir / f"{workdir.name}.log"
    command = _command(request, workdir, *overrides)
    if processes is not None:
        launch = [sys.executable, "-m", "llamajax.launch", f"--processes_per_node={processes}"]
        command = [*launch, "--max_restarts=0", "--", *command]
    outcome = start(command, workdir=workdir, log=log)
    if outcome.code != 0 and overrides:
        raise combine(
            [str(_failed(outcome, log))],
            title="the other mesh does not train; --other=KEY=VALUE,... chooses another:",
        )
    if outcome.code != 0:
        raise _failed(outcome, log)


def _failed(outcome: TrialResult, log: Path) -> UserError:
    with log.open("rb") as file:
        lines = "\n".join(f"  | {line}" for line in last_lines(file.fileno(), _SHOWN_LINES))
    return UserError(f"a run ended with code {outcome.code}; the last lines of {log}:\n{lines}")


def _kill_repeatedly(request: ProofOptions, workdir: Path, undisturbed: Path) -> bool:
    """Start and kill so often as asked; False where a start came to its end before its kill."""
    rng = random.Random(request.seed)
    kinds = [_KINDS[i % len(_KINDS)] for i in range(request.kills)]
    times = read_run_facts(undisturbed)["time_breakdown"]
    step_s = times["steps_s"] / request.steps
    outcome = TrialResult(code=None, step=0, checkpoint=0)
    for number, kind in enumerate(kinds, 1):
        log = request.workdir / f"{workdir.name}.{number}.log"
        moment = _moment(
            kind, rng, request, workdir, log, outcome, step_s=step_s, compile_s=times["compile_s"]
        )
        command = _command(request, workdir)
        outcome = start(command, workdir=workdir, log=log, kill_at=moment)
        words = f"kill {number} of {request.kills} ({kind.replace('_', ' ')})"
        if outcome.code:
            raise _failed(outcome, log)
        if outcome.code == 0:
            say(f"{words}: the run came to its end first")
            return False
        saved = f"step {outcome.checkpoint}" if outcome.checkpoint else "none"
        say(f"{words}: after step {outcome.step}; newest complete checkpoint: {saved}")
    return True


def _moment(
    kind: str,
    rng: random.Random,
    request: ProofOptions,
    workdir: Path,
    log: Path,
    before: TrialResult,
    *,
    step_s: float,
    compile_s: float,
) -> Moment:
    """A random moment of one kind in a start that continues after `before`."""
    if kind == "at_start":
        return at_start(log, delay_s=rng.uniform(0, compile_s))
    # Two steps from the end at the latest, so that something is left to resume.
    step = rng.randint(before.checkpoint + 1, max(before.checkpoint + 1, request.steps - 3))
    if kind == "in_save":
        return in_save(workdir, earliest=min(step, before.checkpoint + request.steps // 3))
    return at_step(workdir, max(step, before.step + 1), delay_s=rng.uniform(0, step_s))


def judge(request: ProofOptions, undisturbed: Path, killed: Path, moved: Path | None) -> bool:
    """Compare the three finished runs and print the verdict; `moved` None: no other mesh."""
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
        limit = TOLERANCES[request.config.train.dtype]
        most = largest_difference(theirs, logged_values(moved))
        relative = 0.0 if most is None else most.relative
        good &= relative <= limit
        where = "" if most is None else f" ({most.what})"
        print(f"other mesh   {_described(moved)}")
        print(f"             largest relative difference {relative:.1e}, allowed {limit:g}{where}")
    ledgers = [read_meta(run, request.steps)["ledger"]["digest"] for run in runs]
    one = len(set(ledgers)) == 1
    good &= one
    words = f"the same {request.steps} batches in all runs" if one else "differ"
    print(f"samples      {words} (ledger {', '.join(dict.fromkeys(ledgers))})")
    if good:
        print(f"verdict: proven; {request.kills} kills cost no step on {platform}")
    elif same is not None and math.isfinite(same.relative) and not is_deterministic:
        print(
            "verdict: NOT proven. If the samples agree and the differences are small, operations "
            "of this accelerator are not deterministic; compare two undisturbed runs"
        )
    else:
        print("verdict: NOT proven")
    return good


def _described(run: Path) -> str:
    """Mesh and processes of a run, as it noted them."""
    facts = read_run_facts(run)
    mesh = ", ".join(f"{axis} {size}" for axis, size in facts["mesh"].items() if size > 1)
    count = facts["num_processes"]
    return f"{mesh or 'one device'}; {count} {'process' if count == 1 else 'processes'}"


def train_arguments(argv: Sequence[str], own: Sequence[str]) -> tuple[str, ...]:
    """What of a command line is meant for `train`: all but the flags named in `own`."""
    found, tokens = [], list(argv)
    while tokens:
        token = tokens.pop(0)
        if token.partition("=")[0].removeprefix("--") not in own:
            found.append(token)
        elif "=" not in token and tokens:
            tokens.pop(0)
    return tuple(found)
